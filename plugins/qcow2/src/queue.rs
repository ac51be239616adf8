//! A queue of requests on an image: decides which are done at once and which wait for a thread.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, RwLock};

use vmm_block_file::{Job, Perform, Pool, Threads};
use vmm_plugin_api::abi::block::BLOCK_DISCARD;
use vmm_plugin_api::{BlockDone, BlockOp, BlockQueue, BlockRequest, Result};

use crate::disk::{Disk, MAX_SEGMENTS, Request};
use crate::scratch::Work;

/// What the threads of a queue use.
struct User {
    disk: Arc<Disk>,
    /// The queue's lock in the image.
    lock: Arc<RwLock<()>>,
}

impl Perform for User {
    type Scratch = Work;

    fn perform(&self, job: &Job, work: &mut Work) -> i32 {
        let request = Request {
            op: job.op,
            offset: job.offset,
            len: job.len,
            segments: &job.segments,
        };
        self.disk.perform(request, &self.lock, work)
    }
}

/// A queue on a disk in an image. Dropping it waits for what is in flight.
pub struct Qcow2Queue {
    // Before the lock is given back, so that nobody uses it any more.
    pool: Option<Pool<User>>,
    disk: Arc<Disk>,
    user: Arc<RwLock<()>>,
    depth: usize,
    /// Requests that the threads have.
    waiting: usize,
    /// Completions of requests that were done at once.
    done: VecDeque<BlockDone>,
}

impl Qcow2Queue {
    /// Opens a queue for `depth` requests with at most `workers` threads.
    ///
    /// # Errors
    /// Out of threads or descriptors.
    pub fn open(disk: Arc<Disk>, depth: u32, workers: u32) -> Result<Self> {
        let depth = depth.max(1) as usize;
        let user = disk.join();
        let threads = Threads {
            name: "qcow2",
            stack: 256 << 10,
            most: workers,
        };
        let shared = Arc::new(User {
            disk: disk.clone(),
            lock: user.clone(),
        });
        let pool = Pool::new(shared, depth, threads);
        let pool = pool.inspect_err(|_| disk.leave(&user))?;
        Ok(Self {
            pool: Some(pool),
            disk,
            user,
            depth,
            waiting: 0,
            done: VecDeque::with_capacity(depth),
        })
    }

    /// The result of a request that need not wait.
    fn at_once(&self, op: BlockOp, request: &BlockRequest, alone: bool) -> Option<i32> {
        let info = self.disk.info();
        let code = request.check(&info);
        if code != 0 {
            return Some(code);
        }
        let segments = request.segments();
        if segments.len() > MAX_SEGMENTS as usize {
            return Some(-libc::EINVAL);
        }
        match op {
            BlockOp::Discard if info.features & BLOCK_DISCARD == 0 => return Some(-libc::ENOTSUP),
            BlockOp::Flush => return None,
            _ if request.is_empty() => return Some(0),
            // Several reads are better done by several threads, unless memory has what they read.
            BlockOp::Read if !alone && !self.disk.in_memory() => return None,
            _ => {}
        }
        let (offset, len) = (request.offset(), request.len());
        let request = Request {
            op,
            offset,
            len,
            segments,
        };
        self.disk.perform_at_once(request, &self.user)
    }
}

impl BlockQueue for Qcow2Queue {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        let room = self.depth - self.waiting - self.done.len();
        let alone = batch.len() == 1 && self.waiting == 0;
        let mut taken = 0;
        for request in batch.iter().take(room) {
            let result = match request.op() {
                None => Some(-libc::ENOTSUP),
                Some(op) => self.at_once(op, request, alone),
            };
            if let Some(code) = result {
                self.done.push_back(request.done(code));
            } else if self.pool.as_mut().is_some_and(|pool| pool.push(request)) {
                self.waiting += 1;
            } else {
                break;
            }
            taken += 1;
        }
        if let Some(pool) = &mut self.pool {
            pool.start();
        }
        taken
    }

    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let first = done.len().min(self.done.len());
        for (slot, completion) in done.iter_mut().zip(self.done.drain(..first)) {
            *slot = completion;
        }
        let more = match &mut self.pool {
            Some(pool) if self.waiting > 0 => pool.reap(&mut done[first..]),
            _ => 0,
        };
        self.waiting -= more;
        first + more
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pool.as_ref().map(Pool::fd)
    }
}

impl Drop for Qcow2Queue {
    fn drop(&mut self) {
        self.pool = None;
        self.disk.leave(&self.user);
    }
}

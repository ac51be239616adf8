//! Threads that wait for the image on behalf of one queue. Started when there is something for them to do.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;

use anyhow::Context;
use vmm_plugin_api::{BlockDone, BlockOp, BlockRequest, EventFd, GuestSlice, Result};

use crate::disk::{Disk, Request};
use crate::scratch::Work;

/// A request that outlives submit. Reused, with the memory of its scatter list.
struct Job {
    token: u64,
    op: BlockOp,
    offset: u64,
    len: u64,
    segments: Vec<GuestSlice>,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            token: 0,
            op: BlockOp::Flush,
            offset: 0,
            len: 0,
            segments: Vec::with_capacity(8),
        }
    }
}

/// What queue and threads share.
struct Shared {
    disk: Arc<Disk>,
    /// The queue's lock in the image.
    user: Arc<RwLock<()>>,
    state: Mutex<State>,
    wake: Condvar,
    ready: EventFd,
}

struct State {
    waiting: VecDeque<Job>,
    finished: VecDeque<(Job, i32)>,
    /// Threads that wait for a job.
    resting: usize,
    closing: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads of one queue.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Most threads.
    workers: usize,
    /// Jobs not in use, with the memory for their scatter lists.
    idle: Vec<Job>,
    /// Jobs of the batch that is being submitted.
    batch: Vec<Job>,
}

impl Pool {
    /// Prepares for `depth` requests at once with at most `workers` threads, and starts one.
    ///
    /// # Errors
    /// Out of threads or descriptors.
    pub fn new(disk: Arc<Disk>, user: Arc<RwLock<()>>, depth: usize, workers: u32) -> Result<Self> {
        let state = State {
            waiting: VecDeque::with_capacity(depth),
            finished: VecDeque::with_capacity(depth),
            resting: 0,
            closing: false,
        };
        let shared = Arc::new(Shared {
            disk,
            user,
            state: Mutex::new(state),
            wake: Condvar::new(),
            ready: EventFd::new().context("no descriptor left for a disk queue")?,
        });
        let workers = (workers as usize).clamp(1, depth);
        let mut pool = Self {
            shared,
            threads: Vec::with_capacity(workers),
            workers,
            idle: std::iter::repeat_with(Job::default).take(depth).collect(),
            batch: Vec::with_capacity(depth),
        };
        pool.add_thread()
            .context("no thread left for a disk queue")?;
        Ok(pool)
    }

    fn add_thread(&mut self) -> std::io::Result<()> {
        let shared = self.shared.clone();
        let builder = std::thread::Builder::new().name("qcow2".into());
        let thread = builder.stack_size(256 << 10).spawn(move || work(&shared))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Takes a request into the batch; false when there is no room.
    pub fn push(&mut self, op: BlockOp, request: &BlockRequest) -> bool {
        let Some(mut job) = self.idle.pop() else {
            return false;
        };
        job.token = request.token();
        job.op = op;
        job.offset = request.offset();
        job.len = request.len();
        job.segments.clear();
        job.segments.extend_from_slice(request.segments());
        self.batch.push(job);
        true
    }

    /// Hands the batch to the threads.
    pub fn start(&mut self) {
        let count = self.batch.len();
        if count == 0 {
            return;
        }
        let mut state = self.shared.lock();
        state.waiting.extend(self.batch.drain(..));
        let missing = state.waiting.len().saturating_sub(state.resting);
        drop(state);
        match count {
            1 => self.shared.wake.notify_one(),
            _ => self.shared.wake.notify_all(),
        }
        for _ in 0..missing.min(self.workers - self.threads.len()) {
            // Those that there are do it all, if later.
            if self.add_thread().is_err() {
                break;
            }
        }
    }

    /// Stores completions; returns how many.
    pub fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let mut state = self.shared.lock();
        let count = done.len().min(state.finished.len());
        for (slot, (job, result)) in done.iter_mut().zip(state.finished.drain(..count)) {
            *slot = BlockDone {
                token: job.token,
                result,
                reserved: 0,
            };
            self.idle.push(job);
        }
        count
    }

    /// Readable when something has finished.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.shared.ready.as_fd()
    }
}

/// Requests that wait are still done: the device has been told that they were taken.
impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of a disk queue has panicked");
            }
        }
    }
}

fn work(shared: &Shared) {
    let mut scratch = Work::default();
    let mut state = shared.lock();
    loop {
        let Some(job) = state.waiting.pop_front() else {
            if state.closing {
                return;
            }
            state.resting += 1;
            state = shared
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.resting -= 1;
            continue;
        };
        drop(state);
        let request = Request {
            op: job.op,
            offset: job.offset,
            len: job.len,
            segments: &job.segments,
        };
        let result = shared.disk.perform(request, &shared.user, &mut scratch);
        state = shared.lock();
        state.finished.push_back((job, result));
        if state.finished.len() == 1 {
            shared.ready.signal();
        }
    }
}

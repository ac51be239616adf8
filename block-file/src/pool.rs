//! Threads that wait for a disk on behalf of one queue, which so shares no lock with others. Started when there is something for them
//! to do.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context;
use vmm_plugin_api::{BlockDone, BlockRequest, EventFd, Result};

use crate::queue::Job;

/// What the threads do.
pub trait Perform: Send + Sync + 'static {
    /// What a thread keeps from one job to the next.
    type Scratch: Default;

    /// Does a job, however long it takes; 0 or `-errno`.
    fn perform(&self, job: &Job, scratch: &mut Self::Scratch) -> i32;
}

/// What the threads are.
#[derive(Clone, Copy, Debug)]
pub struct Threads {
    /// Their name.
    pub name: &'static str,
    /// Bytes of the stack of each.
    pub stack: usize,
    /// Most of them; 0 is taken as 1.
    pub most: u32,
}

/// What queue and threads share.
struct Shared<P> {
    disk: Arc<P>,
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

impl<P> Shared<P> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads of one queue.
pub struct Pool<P> {
    shared: Arc<Shared<P>>,
    threads: Vec<JoinHandle<()>>,
    kind: Threads,
    /// Most threads.
    workers: usize,
    /// Jobs not in use, with the memory for their scatter lists.
    idle: Vec<Job>,
    /// Jobs of the batch that is being submitted.
    batch: Vec<Job>,
}

impl<P: Perform> Pool<P> {
    /// Prepares for `depth` requests at once, and starts one thread.
    ///
    /// # Errors
    /// Out of threads or descriptors.
    pub fn new(disk: Arc<P>, depth: usize, kind: Threads) -> Result<Self> {
        let state = State {
            waiting: VecDeque::with_capacity(depth),
            finished: VecDeque::with_capacity(depth),
            resting: 0,
            closing: false,
        };
        let shared = Arc::new(Shared {
            disk,
            state: Mutex::new(state),
            wake: Condvar::new(),
            ready: EventFd::new().context("no descriptor left for a disk queue")?,
        });
        let workers = (kind.most as usize).clamp(1, depth);
        let mut pool = Self {
            shared,
            threads: Vec::with_capacity(workers),
            kind,
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
        let builder = std::thread::Builder::new().name(self.kind.name.into());
        let builder = builder.stack_size(self.kind.stack);
        let thread = builder.spawn(move || work(&shared))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Takes a request into the batch; false when there is no room.
    pub fn push(&mut self, request: &BlockRequest) -> bool {
        let Some(mut job) = self.idle.pop() else {
            return false;
        };
        job.set(request);
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
            *slot = job.done(result);
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
impl<P> Drop for Pool<P> {
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

fn work<P: Perform>(shared: &Shared<P>) {
    let mut scratch = P::Scratch::default();
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
        let result = shared.disk.perform(&job, &mut scratch);
        state = shared.lock();
        state.finished.push_back((job, result));
        if state.finished.len() == 1 {
            shared.ready.signal();
        }
    }
}

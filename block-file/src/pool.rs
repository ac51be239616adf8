//! Threads that wait for the file, where there is no io_uring. Each queue has its own, so that queues share no lock.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context;
use vmm_plugin_api::{BlockDone, BlockRequest, EventFd, Result};

use crate::image::Image;
use crate::queue::Job;

/// What queue and threads share.
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    ready: EventFd,
}

struct State {
    waiting: VecDeque<Job>,
    finished: VecDeque<(Job, i32)>,
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
    /// Jobs not in use, with the memory for their scatter lists.
    idle: Vec<Job>,
    /// Jobs of the batch that is being submitted.
    batch: Vec<Job>,
}

impl Pool {
    /// Starts `workers` threads for at most `depth` requests.
    ///
    /// # Errors
    /// Out of threads or descriptors.
    pub fn new(image: &Arc<Image>, depth: usize, workers: u32) -> Result<Self> {
        let state = State {
            waiting: VecDeque::with_capacity(depth),
            finished: VecDeque::with_capacity(depth),
            closing: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wake: Condvar::new(),
            ready: EventFd::new().context("no descriptor left for a disk queue")?,
        });
        let mut pool = Self {
            shared,
            threads: Vec::new(),
            idle: std::iter::repeat_with(Job::default).take(depth).collect(),
            batch: Vec::with_capacity(depth),
        };
        for _ in 0..workers.min(u32::try_from(depth).unwrap_or(u32::MAX)).max(1) {
            let (shared, image) = (pool.shared.clone(), image.clone());
            let thread = std::thread::Builder::new()
                .name("disk".into())
                .stack_size(128 << 10)
                .spawn(move || work(&shared, &image))
                .context("no thread left for a disk queue")?;
            pool.threads.push(thread);
        }
        Ok(pool)
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
        self.shared.lock().waiting.extend(self.batch.drain(..));
        match count {
            0 => {}
            1 => self.shared.wake.notify_one(),
            _ => self.shared.wake.notify_all(),
        }
    }

    /// Stores completions; returns how many.
    pub fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let mut state = self.shared.lock();
        let count = done.len().min(state.finished.len());
        for (slot, (job, code)) in done.iter_mut().zip(state.finished.drain(..count)) {
            *slot = job.done(code);
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

fn work(shared: &Shared, image: &Image) {
    let mut state = shared.lock();
    loop {
        let Some(job) = state.waiting.pop_front() else {
            if state.closing {
                return;
            }
            state = shared
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(state);
        let code = job.perform(image, 0);
        state = shared.lock();
        state.finished.push_back((job, code));
        if state.finished.len() == 1 {
            shared.ready.signal();
        }
    }
}

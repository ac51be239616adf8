//! For backends that stand on others: the queue of the one below, and several descriptors as one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::{Batch, BlockDone, BlockQueue, BlockQueueHandle};

/// What takes a layer's batches: another backend's queue, or a [`BlockQueue`] of the layer's own.
pub trait Lower: Send {
    /// Takes at most the first `limit` requests of `batch`; returns how many.
    fn submit(&mut self, batch: &mut Batch, limit: usize) -> usize;
    /// As [`BlockQueue::reap`].
    fn reap(&mut self, done: &mut [BlockDone]) -> usize;
    /// As [`BlockQueue::fd`].
    fn fd(&self) -> Option<BorrowedFd<'_>>;
}

impl Lower for BlockQueueHandle {
    fn submit(&mut self, batch: &mut Batch, limit: usize) -> usize {
        self.submit_first(batch, limit)
    }
    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        Self::reap(self, done)
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Self::fd(self)
    }
}

impl<Q: BlockQueue> Lower for Q {
    fn submit(&mut self, batch: &mut Batch, limit: usize) -> usize {
        batch.submit_to(self, limit)
    }
    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        BlockQueue::reap(self, done)
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        BlockQueue::fd(self)
    }
}

/// A queue that a layer stands on, with what waits for it.
pub struct LowerQueue<Q = BlockQueueHandle> {
    queue: Q,
    /// Requests that the queue has not taken yet, in order.
    pub batch: Batch,
    in_flight: usize,
    has_fd: bool,
    /// Something was in flight at the last look, so the descriptor may be readable by now.
    armed: bool,
    /// The descriptor has been read at the last look.
    drained: bool,
    dead: bool,
}

impl<Q: Lower> LowerQueue<Q> {
    /// Around a fresh queue that is used for about `depth` requests at once.
    pub fn new(queue: Q, depth: usize) -> Self {
        Self {
            has_fd: queue.fd().is_some(),
            queue,
            batch: Batch::with_capacity(depth, 4 * depth),
            in_flight: 0,
            armed: false,
            drained: false,
            dead: false,
        }
    }

    /// Requests that the queue has taken and not completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Hands over the first `limit` requests of the batch, as far as the queue takes them; returns how many that were.
    pub fn submit(&mut self, limit: usize) -> usize {
        let wanted = limit.min(self.batch.len());
        if wanted == 0 || self.dead {
            return 0;
        }
        let taken = self.queue.submit(&mut self.batch, wanted);
        self.in_flight += taken;
        // A working queue always has room for one.
        self.dead = taken == 0 && self.in_flight == 0;
        taken
    }

    /// Stores completions; returns how many. Fewer than there is room for: there are no more now.
    pub fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        self.drained = false;
        if self.in_flight == 0 {
            return 0;
        }
        if self.armed {
            self.drain();
        }
        let count = self.queue.reap(done);
        self.in_flight = self.in_flight.saturating_sub(count);
        self.armed = self.has_fd && self.in_flight > 0;
        // A backend that has failed has no descriptor any more, and without one all is complete after submit.
        if count == 0 && self.in_flight > 0 && self.queue.fd().is_none() {
            self.dead = true;
        }
        count
    }

    /// Takes a readiness that came late: for a layer that was woken and has found no completion anywhere. True if it is worth
    /// looking again.
    pub fn quiet(&mut self) -> bool {
        if !self.has_fd || self.drained {
            return false;
        }
        self.drain();
        true
    }

    fn drain(&mut self) {
        if let Some(fd) = self.queue.fd() {
            crate::eventfd::drain(fd);
        }
        self.drained = true;
        self.armed = false;
    }

    /// Whether the backend below has failed, so that nothing more will ever come of its requests. A layer passes that on: it
    /// takes nothing and has no descriptor from then on.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.dead
    }

    /// The queue's descriptor.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.queue.fd()
    }

    /// Sees everything in batch and in flight through, for a layer that is dropped; what completes goes to `each`.
    pub fn finish(&mut self, mut each: impl FnMut(BlockDone)) {
        let mut done = [BlockDone::default(); 32];
        while (self.in_flight > 0 || !self.batch.is_empty()) && !self.dead {
            let taken = self.submit(usize::MAX);
            let count = self.reap(&mut done);
            done[..count].iter().for_each(|one| each(*one));
            if taken + count == 0 && !self.quiet() && !self.dead {
                wait(self.queue.fd());
            }
        }
    }
}

/// Sleeps until the descriptor is readable, or a moment where there is none.
fn wait(fd: Option<BorrowedFd<'_>>) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let moment = Timespec {
        tv_sec: 0,
        tv_nsec: 10_000_000,
    };
    let mut fds = fd.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    // An error is no more than a look without need.
    let _ = poll(fds.as_mut_slice(), Some(&moment));
}

/// One descriptor that is readable while any of several is. It can't be read from itself; the owner of the several reads them.
#[derive(Debug)]
pub struct JoinedFd(OwnedFd);

impl JoinedFd {
    /// Joins those of `fds` that there are, which stay open as long as it; `None` if there is none.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(fds: &[Option<BorrowedFd<'_>>]) -> std::io::Result<Option<Self>> {
        if fds.iter().all(Option::is_none) {
            return Ok(None);
        }
        let joined = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in fds.iter().flatten() {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&joined, fd, data, epoll::EventFlags::IN)?;
        }
        Ok(Some(Self(joined)))
    }
}

impl AsFd for JoinedFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A descriptor that gets readable at a time: for a queue that holds requests back, joined with that of the queue below.
#[derive(Debug)]
pub struct Alarm {
    timer: OwnedFd,
    at: Option<Instant>,
}

impl Alarm {
    /// One that is not set.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new() -> std::io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self { timer, at: None })
    }

    /// Sets it to `at`, and to nothing else.
    pub fn set(&mut self, at: Instant) {
        const NEVER: Timespec = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if self.at == Some(at) {
            return;
        }
        self.at = Some(at);
        // No time at all would switch it off.
        let wait = at.saturating_duration_since(Instant::now());
        let wait = wait.max(Duration::from_nanos(1));
        let spec = Itimerspec {
            it_interval: NEVER,
            it_value: Timespec::try_from(wait).unwrap_or(Timespec {
                tv_sec: i64::MAX,
                tv_nsec: 0,
            }),
        };
        // The descriptor is a timer and the time valid: there is nothing that could fail.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
    }

    /// Takes the readiness of a time that has come.
    pub fn quiet(&mut self) {
        if self.at.is_some_and(|at| at <= Instant::now()) {
            let _ = rustix::io::read(&self.timer, &mut [0; 8]);
            self.at = None;
        }
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

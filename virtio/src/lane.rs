//! One queue's thread, and how the control thread and vCPU threads tell it what to do without waiting for it.
//!
//! The thread sleeps on one descriptor, the doorbell, or on that and the backend's while requests are in flight. Whoever
//! wants something else of it leaves a note in the mailbox and rings the same doorbell.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vmm_plugin_api::{Counter, Pace, Queue, QueueError};

use crate::QueueWorker;
use crate::interrupt::{Interrupts, NO_VECTOR};

/// How often a thread whose requests take long asks whether the backend is still there: one that has failed never makes
/// its descriptor readable.
const LIVENESS: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// What a lane shares with the rest of the device.
pub(crate) struct Lane {
    /// Counts notifications. Blocking, so that an idle thread waits with the one read that also takes the count.
    bell: OwnedFd,
    /// The driver's notifications, as the host shows them.
    notifications: Counter,
    /// How many of the bell's count are not the driver's but tell of news in the mailbox.
    notes: AtomicU64,
    /// There is news in the mailbox.
    attention: AtomicBool,
    mailbox: Mutex<Mailbox>,
    changed: Condvar,
    /// MSI-X vector of the queue.
    pub(crate) vector: AtomicU16,
}

/// A queue that the driver has set up.
pub(crate) struct Ring {
    pub(crate) queue: Queue,
    pub(crate) features: u64,
}

#[derive(Default)]
struct Mailbox {
    paused: bool,
    exit: bool,
    /// Counts what is to be served: each start or stop of the queue makes a new one.
    epoch: u64,
    ring: Option<Ring>,
    /// The epoch that the thread has taken up; nothing of an earlier one touches guest memory.
    settled: u64,
    /// Paused, with nothing in flight.
    parked: bool,
    /// A thread serves the lane.
    running: bool,
}

impl Lane {
    pub(crate) fn new(notifications: Counter) -> std::io::Result<Self> {
        Ok(Self {
            bell: eventfd(0, EventfdFlags::CLOEXEC)?,
            notifications,
            notes: AtomicU64::new(0),
            attention: AtomicBool::new(false),
            mailbox: Mutex::default(),
            changed: Condvar::new(),
            vector: AtomicU16::new(NO_VECTOR),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a host binds as the queue's doorbell.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// The driver has notified the queue.
    pub(crate) fn ring(&self) {
        // A counter at its limit means that a wake-up waits; no driver gets it there.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    fn tell(&self, note: impl FnOnce(&mut Mailbox)) {
        note(&mut self.lock());
        self.attention.store(true, Ordering::Release);
        self.changed.notify_all();
        self.notes.fetch_add(1, Ordering::Relaxed);
        self.ring();
    }

    /// Serve `ring` from now on, or nothing. What is in flight is finished first, unseen by the driver.
    pub(crate) fn serve(&self, ring: Option<Ring>) {
        self.tell(|m| {
            m.epoch += 1;
            m.ring = ring;
        });
    }

    /// Whether nothing of an earlier epoch is in flight any more.
    pub(crate) fn settled(&self) -> bool {
        let m = self.lock();
        m.settled == m.epoch || !m.running
    }

    /// Whether `epoch` is still what the driver wants served.
    pub(crate) fn current(&self, epoch: u64) -> bool {
        self.lock().epoch == epoch
    }

    /// Begins to pause; [`Lane::wait_parked`] tells when it is done.
    pub(crate) fn pause(&self) {
        self.tell(|m| m.paused = true);
    }

    pub(crate) fn wait_parked(&self) {
        let mut m = self.lock();
        while m.running && !m.parked {
            m = self.changed.wait(m).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn resume(&self) {
        self.tell(|m| m.paused = false);
    }

    /// The thread is about to be started.
    pub(crate) fn open(&self) {
        self.lock().running = true;
    }

    /// The thread could not be started.
    pub(crate) fn close(&self) {
        self.lock().running = false;
        self.changed.notify_all();
    }

    /// The thread finishes what is in flight and ends.
    pub(crate) fn exit(&self) {
        self.tell(|m| m.exit = true);
    }

    /// Sleeps until the bell rings.
    fn wait_bell(&self) {
        let mut count = [0; 8];
        // EINTR and everything else: the caller looks at the queue, which does no harm.
        if rustix::io::read(&self.bell, &mut count).is_ok() {
            let notes = self.notes.swap(0, Ordering::Relaxed);
            let rung = u64::from_ne_bytes(count);
            self.notifications.add(rung.saturating_sub(notes));
        }
    }

    /// Sleeps until the bell rings or the backend has completions. False: the backend has nothing to sleep on.
    fn wait_either(&self, worker: &impl QueueWorker) -> bool {
        let Some(fd) = worker.fd() else { return false };
        let mut fds = [
            PollFd::new(&self.bell, PollFlags::IN),
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
        ];
        if poll(&mut fds, Some(&LIVENESS)).is_err() {
            return true;
        }
        let [rung, completed] = fds.map(|fd| !fd.revents().is_empty());
        if completed {
            worker.acknowledge();
        }
        if rung {
            self.wait_bell();
        }
        true
    }
}

/// What a queue's thread runs.
pub(crate) struct Thread<'a, W> {
    pub(crate) lane: &'a Lane,
    pub(crate) interrupts: &'a Interrupts,
    pub(crate) worker: W,
    pub(crate) queue: Option<Queue>,
    pub(crate) epoch: u64,
    pub(crate) pace: Pace,
    /// How many chains of the queue had been taken when the thread last slept.
    pub(crate) counted: u16,
}

/// Tells whoever waits for the thread that it is gone, also when it panics.
struct Gone<'a>(&'a Lane);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl<W: QueueWorker> Thread<'_, W> {
    /// Serves the lane until it is told to exit. `broken` gets each queue that its driver broke, with the epoch.
    pub(crate) fn run(mut self, broken: impl Fn(u64, QueueError)) {
        let _gone = Gone(self.lane);
        loop {
            if self.lane.attention.swap(false, Ordering::AcqRel) && !self.obey() {
                return;
            }
            match self.turn() {
                Ok(()) => {
                    let requests = self.count();
                    self.pace.sleeps(requests);
                    self.sleep();
                    self.pace.woken();
                }
                Err(error) => {
                    self.finish(true);
                    self.queue = None;
                    broken(self.epoch, error);
                }
            }
        }
    }

    /// Does what the mailbox says; false: exit. While paused it does not return.
    fn obey(&mut self) -> bool {
        let lane = self.lane;
        let mut mail = lane.lock();
        loop {
            if mail.epoch != self.epoch {
                drop(mail);
                self.finish(false);
                mail = lane.lock();
                self.epoch = mail.epoch;
                self.counted = 0;
                mail.settled = mail.epoch;
                self.queue = mail.ring.take().map(|ring| {
                    self.worker.activate(ring.features);
                    ring.queue
                });
            } else if mail.exit {
                drop(mail);
                self.finish(true);
                return false;
            } else if mail.paused && self.worker.in_flight() > 0 {
                drop(mail);
                self.finish(true);
                mail = lane.lock();
            } else if mail.paused {
                mail.parked = true;
                lane.changed.notify_all();
                mail = lane
                    .changed
                    .wait(mail)
                    .unwrap_or_else(PoisonError::into_inner);
                mail.parked = false;
            } else {
                return true;
            }
        }
    }

    /// Works until there is nothing to do but wait.
    fn turn(&mut self) -> Result<(), QueueError> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        loop {
            queue.disable_notify();
            let taken = self.worker.take(queue);
            self.worker.complete(Some(queue));
            if queue.publish() {
                self.interrupts
                    .queue(self.lane.vector.load(Ordering::Relaxed));
            }
            taken?;
            if self.lane.attention.load(Ordering::Relaxed)
                || !self.worker.has_room()
                || !queue.enable_notify()?
            {
                return Ok(());
            }
        }
    }

    /// Requests that were taken since the last call.
    fn count(&mut self) -> usize {
        let taken = self.queue.as_ref().map_or(0, Queue::taken);
        let before = std::mem::replace(&mut self.counted, taken);
        taken.wrapping_sub(before).into()
    }

    fn sleep(&self) {
        if self.lane.attention.load(Ordering::Acquire) {
            return;
        }
        if self.worker.in_flight() == 0 {
            self.lane.wait_bell();
        } else {
            // Without a descriptor the worker has something to complete at once.
            self.lane.wait_either(&self.worker);
        }
    }

    /// Waits until nothing is in flight. `visible`: the driver sees it done.
    fn finish(&mut self, visible: bool) {
        loop {
            match &mut self.queue {
                Some(queue) if visible => {
                    self.worker.complete(Some(queue));
                    if queue.publish() {
                        self.interrupts
                            .queue(self.lane.vector.load(Ordering::Relaxed));
                    }
                }
                _ => self.worker.complete(None),
            }
            if self.worker.in_flight() == 0 {
                return;
            }
            if let Some(fd) = self.worker.fd() {
                let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
                if poll(&mut fds, Some(&LIVENESS)) == Ok(1) {
                    self.worker.acknowledge();
                }
            }
        }
    }
}

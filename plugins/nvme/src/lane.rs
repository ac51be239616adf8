//! How a thread of the controller sleeps, and how others tell it what to do.
//!
//! The thread sleeps on one descriptor, its bell, or on that and the backend's while requests are in flight. Whoever wants
//! something of it leaves a note in its mailbox and rings. vCPU threads ring only when it sleeps.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vmm_plugin_api::BlockQueueHandle;

/// How often a thread whose requests take long asks whether the backend is still there: one that has failed never makes
/// its descriptor readable.
const LIVENESS: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// The way to one thread, with notes of type `N`.
pub(crate) struct Lane<N> {
    /// Blocking, so that an idle thread waits with the one read that also takes the count.
    bell: OwnedFd,
    /// The thread is about to sleep, or does.
    asleep: AtomicBool,
    /// There is something besides the queues to look at.
    attention: AtomicBool,
    mailbox: Mutex<Mailbox<N>>,
    changed: Condvar,
}

struct Mailbox<N> {
    notes: VecDeque<N>,
    /// Notes ever left, and dealt with.
    left: u64,
    done: u64,
    paused: bool,
    /// Paused, with nothing in flight.
    parked: bool,
    /// A thread serves the lane.
    running: bool,
}

/// What a thread does next.
pub(crate) enum Next<N> {
    /// What a note says, then [`Lane::done`].
    Note(N),
    /// Finish what is in flight, then [`Lane::park`].
    Park,
    /// Its work.
    Work,
}

impl<N> Lane<N> {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            bell: eventfd(0, EventfdFlags::CLOEXEC)?,
            asleep: AtomicBool::new(false),
            attention: AtomicBool::new(false),
            mailbox: Mutex::new(Mailbox {
                notes: VecDeque::new(),
                left: 0,
                done: 0,
                paused: false,
                parked: false,
                running: false,
            }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Mailbox<N>> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a host binds as a doorbell.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// There is work; wakes the thread if it sleeps.
    pub(crate) fn ring(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.signal();
        }
    }

    fn signal(&self) {
        // A counter at its limit means that a wake-up waits; nothing gets it there.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// There is something besides the queues to look at.
    pub(crate) fn poke(&self) {
        self.attention.store(true, Ordering::SeqCst);
        self.ring();
    }

    /// Leaves a note.
    pub(crate) fn tell(&self, note: N) {
        let mut mail = self.lock();
        mail.notes.push_back(note);
        mail.left += 1;
        drop(mail);
        self.announce();
    }

    /// Leaves a note and waits until the thread has dealt with it; without a thread, does nothing.
    pub(crate) fn ask(&self, note: N) {
        let mut mail = self.lock();
        if !mail.running {
            return;
        }
        mail.notes.push_back(note);
        mail.left += 1;
        let ticket = mail.left;
        drop(mail);
        self.announce();
        let mut mail = self.lock();
        while mail.running && mail.done < ticket {
            mail = self.wait_changed(mail);
        }
    }

    fn announce(&self) {
        self.attention.store(true, Ordering::SeqCst);
        self.changed.notify_all();
        self.signal();
    }

    fn wait_changed<'a>(&self, mail: MutexGuard<'a, Mailbox<N>>) -> MutexGuard<'a, Mailbox<N>> {
        self.changed
            .wait(mail)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to pause; [`Lane::wait_parked`] tells when it is done.
    pub(crate) fn pause(&self) {
        self.lock().paused = true;
        self.announce();
    }

    /// Waits until the thread is parked; without a thread, does not wait.
    pub(crate) fn wait_parked(&self) {
        let mut mail = self.lock();
        while mail.running && !mail.parked {
            mail = self.wait_changed(mail);
        }
    }

    pub(crate) fn resume(&self) {
        self.lock().paused = false;
        self.announce();
    }

    /// The thread is about to be started; it is not paused and has no notes.
    pub(crate) fn open(&self) {
        let mut mail = self.lock();
        mail.notes.clear();
        mail.done = mail.left;
        mail.paused = false;
        mail.running = true;
    }

    /// The thread is gone, or could not be started.
    pub(crate) fn close(&self) {
        self.lock().running = false;
        self.changed.notify_all();
    }

    // What follows is for the thread itself.

    /// Whether [`Lane::next`] has something to say; takes the news.
    pub(crate) fn take_attention(&self) -> bool {
        self.attention.swap(false, Ordering::SeqCst)
    }

    /// Whether there is news.
    pub(crate) fn wanted(&self) -> bool {
        self.attention.load(Ordering::SeqCst)
    }

    pub(crate) fn next(&self) -> Next<N> {
        let mut mail = self.lock();
        match mail.notes.pop_front() {
            Some(note) => Next::Note(note),
            None if mail.paused => Next::Park,
            None => Next::Work,
        }
    }

    /// A note has been dealt with.
    pub(crate) fn done(&self) {
        self.lock().done += 1;
        self.changed.notify_all();
    }

    /// Waits while paused, until there is a note or the pause ends.
    pub(crate) fn park(&self) {
        let mut mail = self.lock();
        mail.parked = true;
        self.changed.notify_all();
        while mail.paused && mail.notes.is_empty() {
            mail = self.wait_changed(mail);
        }
        mail.parked = false;
    }

    /// From now on [`Lane::ring`] leaves a wake-up: look for work once more, then [`Lane::sleep`] or [`Lane::stay_awake`].
    pub(crate) fn fall_asleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
    }

    pub(crate) fn stay_awake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// Sleeps until the bell rings or `backend`, if any of its requests are in flight, has completions.
    pub(crate) fn sleep(&self, backend: Option<&BlockQueueHandle>) {
        if !self.wanted() {
            match backend {
                None => self.take_bell(),
                Some(backend) => self.wait_either(backend),
            }
        }
        self.stay_awake();
    }

    fn take_bell(&self) {
        let mut count = [0; 8];
        // EINTR and everything else: the caller looks at its queues, which does no harm.
        let _ = rustix::io::read(&self.bell, &mut count);
    }

    fn wait_either(&self, backend: &BlockQueueHandle) {
        // Without a descriptor the backend has completed everything already.
        let Some(fd) = backend.fd() else { return };
        let mut fds = [
            PollFd::new(&self.bell, PollFlags::IN),
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
        ];
        if poll(&mut fds, Some(&LIVENESS)).is_err() {
            return;
        }
        let [rung, completed] = fds.map(|fd| !fd.revents().is_empty());
        if completed {
            backend.drain();
        }
        if rung {
            self.take_bell();
        }
    }
}

/// Waits until a backend has completions, or for a while.
pub(crate) fn wait_backend(backend: &BlockQueueHandle) {
    if let Some(fd) = backend.fd() {
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        if poll(&mut fds, Some(&LIVENESS)) == Ok(1) {
            backend.drain();
        }
    }
}

/// Tells whoever waits for a lane's thread that it is gone, also when it panics.
pub(crate) struct Gone<'a, N>(pub(crate) &'a Lane<N>);

impl<N> Drop for Gone<'_, N> {
    fn drop(&mut self) {
        self.0.close();
    }
}

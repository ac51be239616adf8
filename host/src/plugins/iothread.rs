//! The I/O thread: watches descriptors and timers for plugins and calls the object that asked.
//!
//! One thread serves all objects, so that simple devices need no thread and no lock of their own. No lock is held while an
//! object is called: it may watch, unwatch and set timers from there, and from any other thread at the same time.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vmm_abi::device::EVENT_TIMER;

use super::instance::Instance;
use crate::thread;

/// An object's token, with the object's number: what a watch or timer belongs to.
type Key = (u64, u64);

/// The thread and what it serves. Dropping the last handle ends it.
pub struct IoThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// The part that objects and the thread share.
pub struct Shared {
    state: Mutex<State>,
    /// Signalled after each call into an object.
    idle: Condvar,
    wake: OwnedFd,
    epoch: Instant,
}

#[derive(Default)]
struct State {
    /// Descriptors are duplicates: closing one that is still watched can't make the thread watch another's.
    watches: BTreeMap<Key, (Arc<OwnedFd>, u32)>,
    timers: BTreeMap<Key, u64>,
    objects: BTreeMap<u64, &'static Instance>,
    changed: bool,
    calling: Option<u64>,
    thread: Option<ThreadId>,
    stop: bool,
}

impl IoThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system is out of threads or descriptors.
    pub fn start() -> Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            idle: Condvar::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .context("no descriptor for the I/O thread")?,
            epoch: Instant::now(),
        });
        let served = shared.clone();
        let thread = thread::spawn("io", move || served.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// What objects use.
    #[must_use]
    pub fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A full counter means that a wake-up is waiting already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Nanoseconds since the VM's process began to serve objects.
    #[must_use]
    pub fn clock(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// From now on `object` can be called.
    pub fn add(&self, number: u64, object: &'static Instance) {
        self.lock().objects.insert(number, object);
    }

    /// Calls `object` with `token` for as long as `fd` is ready for `events`.
    pub fn watch(&self, object: u64, token: u64, fd: OwnedFd, events: u32) {
        let mut state = self.lock();
        state
            .watches
            .insert((object, token), (Arc::new(fd), events));
        self.note_change(state);
    }

    /// Ends a watch; false if there is none.
    pub fn unwatch(&self, object: u64, token: u64) -> bool {
        let mut state = self.lock();
        let found = state.watches.remove(&(object, token)).is_some();
        self.note_change(state);
        found
    }

    /// Calls `object` once at `deadline`; `u64::MAX` cancels.
    pub fn timer(&self, object: u64, token: u64, deadline: u64) {
        let mut state = self.lock();
        if deadline == u64::MAX {
            // The thread wakes once for nothing, which is cheaper than waking it now to tell it so.
            state.timers.remove(&(object, token));
            return;
        }
        let next = state.timers.values().copied().min();
        state.timers.insert((object, token), deadline);
        if next.is_none_or(|next| deadline < next) {
            self.note_change(state);
        }
    }

    fn note_change(&self, mut state: MutexGuard<'_, State>) {
        let own_thread = state.thread == Some(std::thread::current().id());
        let first = !std::mem::replace(&mut state.changed, true);
        drop(state);
        if first && !own_thread {
            self.wake();
        }
    }

    /// Forgets `object`; on return it is not being called and never will be. Not on the I/O thread.
    pub fn forget(&self, object: u64) {
        let mut state = self.lock();
        state.watches.retain(|key, _| key.0 != object);
        state.timers.retain(|key, _| key.0 != object);
        state.objects.remove(&object);
        state.changed = true;
        while state.calling == Some(object) {
            state = self
                .idle
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.wake();
    }

    fn run(&self) {
        self.lock().thread = Some(std::thread::current().id());
        let mut watched: Vec<(Key, Arc<OwnedFd>, u32)> = Vec::new();
        let mut fresh = true;
        loop {
            let wait = {
                let mut state = self.lock();
                if state.stop {
                    return;
                }
                if std::mem::take(&mut state.changed) || fresh {
                    fresh = false;
                    watched.clear();
                    watched.extend(
                        state
                            .watches
                            .iter()
                            .map(|(key, (fd, events))| (*key, fd.clone(), *events)),
                    );
                }
                state.timers.values().copied().min()
            };
            let ready = self.wait(&watched, wait);
            for (key, events) in ready {
                self.call(key, events, |state| state.watches.contains_key(&key));
            }
            self.expire();
        }
    }

    /// Sleeps until something is ready or the deadline `until`; returns what is.
    fn wait(&self, watched: &[(Key, Arc<OwnedFd>, u32)], until: Option<u64>) -> Vec<(Key, u32)> {
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        fds.extend(watched.iter().map(|(_, fd, events)| {
            // `EVENT_*` are the poll flags' values; how wide those are differs by system.
            let flags = PollFlags::from_bits_truncate((*events).try_into().unwrap_or_default());
            PollFd::from_borrowed_fd(fd.as_fd(), flags)
        }));
        let wait = until.map(|at| {
            let left = Duration::from_nanos(at.saturating_sub(self.clock()));
            Timespec {
                tv_sec: left.as_secs().cast_signed(),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        if poll(&mut fds, wait.as_ref()).is_err() {
            return Vec::new();
        }
        if !fds[0].revents().is_empty() {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        let ready = fds[1..]
            .iter()
            .zip(watched)
            .filter(|(fd, _)| !fd.revents().is_empty());
        ready
            .map(|(fd, watch)| (watch.0, fd.revents().bits() as u32))
            .collect()
    }

    fn expire(&self) {
        let now = self.clock();
        loop {
            let key = {
                let mut state = self.lock();
                let Some(key) = state.timers.iter().find(|t| *t.1 <= now).map(|t| *t.0) else {
                    return;
                };
                state.timers.remove(&key);
                key
            };
            self.call(key, EVENT_TIMER, |_| true);
        }
    }

    /// Calls the object of `key`, unless it is gone or `still` says that it no longer wants to know.
    fn call(&self, key: Key, events: u32, still: impl FnOnce(&State) -> bool) {
        let object = {
            let mut state = self.lock();
            if !still(&state) {
                return;
            }
            let Some(object) = state.objects.get(&key.0).copied() else {
                return;
            };
            state.calling = Some(key.0);
            object
        };
        object.ready(key.1, events);
        self.lock().calling = None;
        self.idle.notify_all();
    }
}

//! Output on its way from the guest to clients that the I/O thread serves.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_plugin_api::EventFd;

use crate::ring::{Copied, Ring};

/// The ring, and what wakes the I/O thread. A vCPU copies its bytes and makes a system call only when the I/O thread has
/// said that it sleeps.
pub(crate) struct Output {
    state: Mutex<State>,
    wake: EventFd,
}

struct State {
    ring: Ring,
    asleep: bool,
}

impl Output {
    /// A ring of `size` bytes. The I/O thread counts as awake.
    pub(crate) fn new(size: usize) -> std::io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                ring: Ring::new(size),
                asleep: false,
            }),
            wake: EventFd::new()?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all of `bytes`. Any thread.
    pub(crate) fn write(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.ring.push(bytes);
        if std::mem::take(&mut state.asleep) {
            self.wake.signal();
        }
    }

    /// Position of the oldest byte kept.
    pub(crate) fn start(&self) -> u64 {
        self.lock().ring.start()
    }

    /// Position after the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.lock().ring.end()
    }

    pub(crate) fn copy(&self, from: u64, out: &mut [u8]) -> Copied {
        self.lock().ring.copy(from, out)
    }

    /// The I/O thread has seen everything up to `end` and wants to be woken for more. False: there is more already.
    pub(crate) fn sleep(&self, end: u64) -> bool {
        let mut state = self.lock();
        state.asleep = state.ring.end() == end;
        state.asleep
    }

    /// Wakes the I/O thread whether or not there is output.
    pub(crate) fn wake(&self) {
        self.wake.signal();
    }

    /// The descriptor that wakes the I/O thread.
    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Takes note of the wake-up.
    pub(crate) fn awake(&self) {
        self.wake.drain();
    }
}

//! A counter that threads and the kernel signal each other with.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

/// A nonblocking eventfd: `signal` adds one, `drain` takes all.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new one, at 0.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// Adds one. A counter at its limit stays there, which wakes the reader all the same.
    pub fn signal(&self) {
        signal(self.0.as_fd());
    }

    /// Takes the count and leaves 0.
    pub fn drain(&self) -> u64 {
        drain(self.0.as_fd())
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

pub(crate) fn signal(fd: BorrowedFd<'_>) {
    // The only failure of a valid eventfd is EAGAIN at the limit: the reader has a wake-up waiting anyway.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

pub(crate) fn drain(fd: BorrowedFd<'_>) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(8) => u64::from_ne_bytes(count),
        _ => 0,
    }
}

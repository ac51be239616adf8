//! Input on its way to the guest.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_plugin_api::EventFd;

/// Bytes taken from clients ahead of the guest. What is beyond stays in the client's end of the connection.
pub(crate) const CAPACITY: usize = 4096;

/// A bounded queue with a descriptor that is readable while there is something in it.
pub(crate) struct Input {
    queue: Mutex<Queue>,
    ready: EventFd,
}

struct Queue {
    bytes: VecDeque<u8>,
    /// Somebody has found no room and waits to be told.
    wanted: bool,
}

/// What [`Input::take`] did.
pub(crate) struct Taken {
    /// Bytes taken, if there were any.
    pub(crate) len: Option<usize>,
    /// There is room again for somebody who found none.
    pub(crate) room: bool,
}

impl Input {
    pub(crate) fn new() -> std::io::Result<Self> {
        let queue = Queue {
            bytes: VecDeque::with_capacity(CAPACITY),
            wanted: false,
        };
        Ok(Self {
            queue: Mutex::new(queue),
            ready: EventFd::new()?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable while [`Input::take`] gives something.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    /// How many bytes fit, 0 for fewer than `least`. After a 0, the next [`Input::take`] that makes room says so.
    pub(crate) fn room(&self, least: usize) -> usize {
        let mut queue = self.lock();
        let room = CAPACITY - queue.bytes.len();
        if room < least {
            queue.wanted = true;
            return 0;
        }
        room
    }

    /// Appends `bytes`, which fit: only one thread appends, after it has asked for room.
    pub(crate) fn push(&self, bytes: &[u8]) {
        let mut queue = self.lock();
        let was_empty = queue.bytes.is_empty();
        queue.bytes.extend(bytes);
        if was_empty && !bytes.is_empty() {
            self.ready.signal();
        }
    }

    /// Takes up to `buf.len()` bytes.
    pub(crate) fn take(&self, buf: &mut [u8]) -> Taken {
        let mut queue = self.lock();
        let len = buf.len().min(queue.bytes.len());
        for (to, from) in buf.iter_mut().zip(queue.bytes.drain(..len)) {
            *to = from;
        }
        if len > 0 && queue.bytes.is_empty() {
            self.ready.drain();
        }
        // A quarter at a time: not a read of the client for every FIFO of the guest.
        let room = queue.wanted && queue.bytes.len() <= CAPACITY * 3 / 4;
        if room {
            queue.wanted = false;
        }
        Taken {
            len: (len > 0).then_some(len),
            room,
        }
    }
}

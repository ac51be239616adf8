//! A queue used by a thread that waits for each request: at creation, and to write the map.

use std::io;

use rustix::event::{PollFd, PollFlags, poll};
use vmm_plugin_api::{BlockDone, BlockOp, GuestSlice, Lower, LowerQueue, Result};

/// Bytes of the buffer.
pub const BUFFER: usize = 64 << 10;

/// The queue, and a buffer that requests on it may point at.
pub struct Blocking<Q> {
    queue: LowerQueue<Q>,
    buffer: GuestSlice,
}

impl<Q: Lower> Blocking<Q> {
    /// Around a fresh queue. The buffer is of [`BUFFER`] bytes, or a block if that is more.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(queue: Q, buffer: GuestSlice) -> Self {
        Self {
            queue: LowerQueue::new(queue, 1),
            buffer,
        }
    }

    /// Reads `to.len()` bytes, at most the buffer's.
    ///
    /// # Errors
    /// The backend's.
    pub fn read(&mut self, offset: u64, to: &mut [u8]) -> Result<(), io::Error> {
        let part = self.buffer.part(0, to.len());
        self.queue.batch.transfer(0, BlockOp::Read, offset, &[part]);
        self.wait()?;
        part.read(0, to);
        Ok(())
    }

    /// Writes `from`, at most the buffer's bytes.
    ///
    /// # Errors
    /// The backend's.
    pub fn write(&mut self, offset: u64, from: &[u8]) -> Result<(), io::Error> {
        let part = self.buffer.part(0, from.len());
        part.write(0, from);
        let op = BlockOp::Write { fua: false };
        self.queue.batch.transfer(0, op, offset, &[part]);
        self.wait()
    }

    /// Waits until all that has completed is on stable storage.
    ///
    /// # Errors
    /// The backend's.
    pub fn flush(&mut self) -> Result<(), io::Error> {
        self.queue.batch.control(0, BlockOp::Flush, 0, 0);
        self.wait()
    }

    fn wait(&mut self) -> Result<(), io::Error> {
        let mut done = [BlockDone::default()];
        loop {
            self.queue.submit(usize::MAX);
            if self.queue.reap(&mut done) > 0 {
                return match done[0].result {
                    0 => Ok(()),
                    code => Err(io::Error::from_raw_os_error(-code)),
                };
            }
            if self.queue.is_dead() {
                return Err(io::Error::other("the backend has failed"));
            }
            if let Some(fd) = self.queue.fd() {
                // An error is a look without need.
                let _ = poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None);
            }
        }
    }
}

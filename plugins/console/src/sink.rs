//! Output to a descriptor that may block: a thread of its own takes it from a ring.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, write};
use vmm_plugin_api::{Counter, Host};

use crate::ring::Ring;

/// Output that may wait for a slow descriptor before the oldest is lost.
const BUFFER: usize = 1 << 20;
/// Bytes per write.
const CHUNK: usize = 32 << 10;
/// How long output gathers between two writes, so that a guest that writes byte by byte does not cost a wake-up per byte.
const GATHER: Duration = Duration::from_millis(2);
/// How long to wait after a failure.
const RETRY: Duration = Duration::from_millis(100);
/// How long the end of the VM waits for the last output to be written.
const FINISH: Duration = Duration::from_secs(2);

/// A ring, and the thread that empties it.
pub(crate) struct Sink {
    shared: Arc<Shared>,
    host: Host,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    ring: Ring,
    /// Position up to which the thread has dealt with output.
    at: u64,
    asleep: bool,
    ending: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink {
    /// Starts the thread, which writes to `fd`; `what` names it in messages.
    pub(crate) fn new(
        host: &Host,
        what: String,
        fd: impl AsFd + Send + 'static,
    ) -> std::io::Result<Self> {
        let state = State {
            ring: Ring::new(BUFFER),
            at: 0,
            asleep: false,
            ending: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wake: Condvar::new(),
        });
        let writer = Writer {
            shared: shared.clone(),
            host: host.clone(),
            lost: host.counter("lost_bytes"),
            what,
            said: [false; 2],
        };
        let thread = host.spawn("console-out", move || writer.run(fd.as_fd()))?;
        Ok(Self {
            shared,
            host: host.clone(),
            thread: Some(thread),
        })
    }

    /// Takes all of `bytes`. Any thread.
    pub(crate) fn write(&self, bytes: &[u8]) -> usize {
        let mut state = self.shared.lock();
        state.ring.push(bytes);
        if std::mem::take(&mut state.asleep) {
            self.shared.wake.notify_one();
        }
        bytes.len()
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.wake.notify_one();
        let Some(thread) = self.thread.take() else {
            return;
        };
        let end = Instant::now() + FINISH;
        while !thread.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            // Its panic is reported as a fault already.
            let _ = thread.join();
            return;
        }
        let state = self.shared.lock();
        let left = state.ring.end() - state.at;
        self.host.log(
            log::Level::Warn,
            format_args!("the last {left} bytes of output are not written: nobody takes them"),
        );
    }
}

/// The thread's side.
struct Writer {
    shared: Arc<Shared>,
    host: Host,
    lost: Counter,
    what: String,
    /// Whether the log knows that output is lost to slowness, and to errors.
    said: [bool; 2],
}

impl Writer {
    fn run(mut self, fd: BorrowedFd<'_>) {
        let mut bytes = vec![0; CHUNK];
        while let Some((lost, len)) = self.next(&mut bytes) {
            if lost > 0 {
                self.lose(0, lost, "takes output too slowly");
                let text = format!(
                    "\r\n[{lost} bytes of console output are lost: written too slowly]\r\n"
                );
                self.put(fd, text.as_bytes());
            }
            let put = self.put(fd, &bytes[..len]);
            let mut state = self.shared.lock();
            state.at += len as u64;
            let pause = if put { GATHER } else { RETRY };
            if !state.ending {
                // Nobody signals while `asleep` is false, except the end.
                drop(self.shared.wake.wait_timeout(state, pause));
            } else if !put {
                return;
            }
        }
    }

    /// Waits for output; `None` when there will be no more.
    fn next(&self, bytes: &mut [u8]) -> Option<(u64, usize)> {
        let mut state = self.shared.lock();
        while state.ring.end() == state.at {
            if state.ending {
                return None;
            }
            state.asleep = true;
            state = self
                .shared
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.asleep = false;
        let copied = state.ring.copy(state.at, bytes);
        state.at += copied.lost;
        Some((copied.lost, copied.len))
    }

    /// Writes all of `bytes`; what can't be written is lost. Gives whether it could.
    fn put(&mut self, fd: BorrowedFd<'_>, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            match write(fd, bytes) {
                Ok(len) => bytes = &bytes[len..],
                Err(Errno::INTR) => {}
                // Another program that shares standard output may have made it nonblocking.
                Err(Errno::AGAIN) => {
                    let _ = poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::OUT)], None);
                }
                Err(error) => {
                    let why = std::io::Error::from(error).to_string();
                    self.lose(1, bytes.len() as u64, &why);
                    return false;
                }
            }
        }
        true
    }

    /// Counts lost output; the first loss of a kind is logged.
    fn lose(&mut self, kind: usize, bytes: u64, why: &str) {
        self.lost.add(bytes);
        if !std::mem::replace(&mut self.said[kind], true) {
            self.host.log(
                log::Level::Error,
                format_args!("{}: {why}; output is lost (`lost_bytes` counts)", self.what),
            );
        }
    }
}

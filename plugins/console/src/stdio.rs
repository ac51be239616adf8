//! `type = "stdio"`: standard input and output of vmm-host.
//!
//! Both are shared with whoever started vmm-host, so they are never made nonblocking; each has a thread that may block.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read};
use rustix::stdio::{stdin, stdout};
use rustix::termios::isatty;
use vmm_plugin_api::{CharBackend, EventFd, Host, Options};

use crate::escape::Escape;
use crate::input::Input;
use crate::sink::Sink;
use crate::terminal::{RawTerminal, in_foreground};

/// There is one standard input.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// How long the end of the VM waits for the thread that reads.
const FINISH: Duration = Duration::from_millis(200);

/// Standard input and output. Fields are dropped in order: the last output is written before the terminal is restored.
pub(crate) struct Stdio {
    reader: Reader,
    sink: Sink,
    _terminal: Option<RawTerminal>,
    _claim: Claim,
}

/// Frees [`TAKEN`].
struct Claim;

impl Drop for Claim {
    fn drop(&mut self) {
        TAKEN.store(false, Ordering::Release);
    }
}

impl CharBackend for Stdio {
    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let escape = Escape::parse(options.str("escape")?)?;
        if TAKEN.swap(true, Ordering::AcqRel) {
            bail!("another [char_dev] has `type = \"stdio\"` already; there is one standard input");
        }
        let claim = Claim;
        let interactive = isatty(stdin());
        let reads = !interactive || in_foreground(stdin());
        let (terminal, escape) = if interactive && reads {
            let terminal =
                RawTerminal::new(stdin()).context("can't switch the terminal to raw mode")?;
            if let Some(hint) = escape.hint() {
                host.log(
                    log::Level::Info,
                    format_args!("the console is on this terminal: {hint}"),
                );
            }
            (terminal, escape)
        } else {
            if !reads {
                host.log(
                    log::Level::Warn,
                    format_args!(
                        "running in the background: the console takes no input from the terminal"
                    ),
                );
            }
            (None, Escape::default())
        };
        Ok(Self {
            reader: Reader::new(host, escape, reads)?,
            sink: Sink::new(host, "standard output".into(), stdout())?,
            _terminal: terminal,
            _claim: claim,
        })
    }

    fn read(&self, buf: &mut [u8]) -> Option<usize> {
        let taken = self.reader.shared.input.take(buf);
        if taken.room {
            self.reader.shared.attention.signal();
        }
        taken.len
    }

    fn write(&self, buf: &[u8]) -> usize {
        self.sink.write(buf)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.reader.shared.input.fd())
    }
}

/// The thread that reads standard input.
struct Reader {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    input: Input,
    /// Tells the thread that there is room again, or that it is to end.
    attention: EventFd,
    ending: AtomicBool,
}

impl Reader {
    fn new(host: &Host, escape: Escape, reads: bool) -> Result<Self> {
        let shared = Arc::new(Shared {
            input: Input::new()?,
            attention: EventFd::new()?,
            ending: AtomicBool::new(false),
        });
        let mut thread = None;
        if reads {
            let (shared, owner) = (shared.clone(), host.clone());
            thread = Some(host.spawn("console-in", move || shared.run(escape, &owner))?);
        }
        Ok(Self { shared, thread })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        self.shared.attention.signal();
        let Some(thread) = self.thread.take() else {
            return;
        };
        let end = Instant::now() + FINISH;
        // If another process has taken input between poll and read, the thread is stuck in read: the process's end will end it.
        while !thread.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Shared {
    fn run(&self, mut escape: Escape, host: &Host) {
        let mut typed = [0; crate::input::CAPACITY / 2];
        let mut out = Vec::with_capacity(crate::input::CAPACITY);
        while !self.ending.load(Ordering::Acquire) {
            // A byte can become two, when it follows the prefix key.
            let room = self.input.room(2) / 2;
            let mut fds = [
                PollFd::from_borrowed_fd(self.attention.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(
                    stdin(),
                    if room > 0 {
                        PollFlags::IN
                    } else {
                        PollFlags::empty()
                    },
                ),
            ];
            let watched = if room > 0 {
                &mut fds[..]
            } else {
                &mut fds[..1]
            };
            if poll(watched, None).is_err() {
                continue;
            }
            if !fds[0].revents().is_empty() {
                self.attention.drain();
                continue;
            }
            match read(stdin(), &mut typed[..room]) {
                // The end of input is not the end of the VM.
                Ok(0) => return,
                Ok(len) => {
                    out.clear();
                    if escape.filter(&typed[..len], &mut out) {
                        host.request_power_off("the escape sequence was typed on the console");
                    }
                    self.input.push(&out);
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => {
                    host.log(
                        log::Level::Warn,
                        format_args!(
                            "standard input: {}; no more input",
                            std::io::Error::from(error)
                        ),
                    );
                    return;
                }
            }
        }
    }
}

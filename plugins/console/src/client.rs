//! One reader and writer of a console: a nonblocking stream and its place in the output.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, write};
use vmm_plugin_api::Events;

use crate::input::Input;
use crate::output::Output;

/// Bytes moved per system call.
const CHUNK: usize = 16 << 10;
/// Bytes of output given to one client before others get their turn.
const TURN: usize = 256 << 10;

/// A connected client.
pub(crate) struct Client {
    stream: OwnedFd,
    /// Position in the output of what it gets next.
    at: u64,
    /// Rest of a message about lost output, which goes first.
    notice: Vec<u8>,
    /// All output that it lost.
    pub(crate) lost: u64,
    /// It has no room for output now.
    blocked: bool,
    /// It sends nothing any more.
    input_ended: bool,
    /// It takes nothing any more.
    output_ended: bool,
    /// Both directions are closed at its end.
    hung_up: bool,
}

impl Client {
    /// A client over a nonblocking stream, which first gets what is kept.
    pub(crate) fn new(stream: OwnedFd, output: &Output) -> Self {
        Self {
            stream,
            at: output.start(),
            notice: Vec::new(),
            lost: 0,
            blocked: false,
            input_ended: false,
            output_ended: false,
            hung_up: false,
        }
    }

    pub(crate) fn stream(&self) -> &OwnedFd {
        &self.stream
    }

    /// What to watch its stream for; `None`: not at all, or its hang-up, which can't be handled before the guest has taken
    /// what it sent, would be reported without end.
    pub(crate) fn interest(&self, room: bool) -> Option<Events> {
        let mut events = Events(0);
        if !self.input_ended && room {
            events = events | Events::READ;
        }
        if self.blocked && !self.output_ended {
            events = events | Events::WRITE;
        }
        (events != Events(0) || self.input_ended).then_some(events)
    }

    /// Whether nothing goes either way any more.
    pub(crate) fn gone(&self) -> bool {
        self.input_ended && (self.output_ended || self.hung_up)
    }

    /// Notes a hang-up, handles readiness. Gives the bytes of output that it lost.
    pub(crate) fn ready(&mut self, events: Events, input: &Input, output: &Output) -> u64 {
        self.hung_up |= events.hangup();
        if events.readable() {
            self.receive(input);
        }
        if events.writable() || events.hangup() {
            self.send(output)
        } else {
            0
        }
    }

    /// Takes what it sends, as far as there is room.
    fn receive(&mut self, input: &Input) {
        let mut bytes = [0; crate::input::CAPACITY];
        while !self.input_ended {
            let room = input.room(1);
            if room == 0 {
                return;
            }
            match read(&self.stream, &mut bytes[..room]) {
                Ok(0) => self.input_ended = true,
                Ok(len) => input.push(&bytes[..len]),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                // Connection reset and the like: what it sent before is read already.
                Err(_) => self.input_ended = true,
            }
        }
    }

    /// Sends what it has not got yet, as far as it takes it, in turns of [`TURN`]. Gives the bytes that are lost to it because
    /// they are not kept any more.
    pub(crate) fn send(&mut self, output: &Output) -> u64 {
        let (mut bytes, mut sent, mut lost) = ([0; CHUNK], 0, 0);
        self.blocked = false;
        while !self.blocked && !self.output_ended {
            if !self.notice.is_empty() {
                let len = self.put(&self.notice);
                let len = self.note(len);
                self.notice.drain(..len);
                continue;
            }
            let copied = output.copy(self.at, &mut bytes);
            if copied.lost > 0 {
                let text = format!(
                    "\r\n[{} bytes of console output are lost: read too slowly]\r\n",
                    copied.lost
                );
                // The gap ends here only when there is room for the notice: until then it may grow.
                let len = self.put(text.as_bytes());
                let len = self.note(len);
                if len > 0 {
                    self.notice = text.as_bytes()[len..].to_vec();
                    self.at += copied.lost;
                    lost += copied.lost;
                }
                continue;
            }
            if copied.len == 0 {
                break;
            }
            let len = self.put(&bytes[..copied.len]);
            let len = self.note(len);
            self.at += len as u64;
            sent += len;
            self.blocked |= sent >= TURN;
        }
        self.lost += lost;
        lost
    }

    /// One write, repeated when a signal interrupts it.
    fn put(&self, bytes: &[u8]) -> Result<usize, Errno> {
        loop {
            match write(&self.stream, bytes) {
                Err(Errno::INTR) => {}
                other => return other,
            }
        }
    }

    /// Takes note of why a write wrote nothing; gives how much it wrote.
    fn note(&mut self, written: Result<usize, Errno>) -> usize {
        match written {
            Ok(len) => return len,
            Err(Errno::AGAIN) => self.blocked = true,
            Err(_) => self.output_ended = true,
        }
        0
    }

    /// Sends what is left, for as long as the client takes some every tenth of a second and `end` has not come.
    pub(crate) fn finish(&mut self, output: &Output, end: Instant) {
        const STALL: Timespec = Timespec {
            tv_sec: 0,
            tv_nsec: Duration::from_millis(100).subsec_nanos() as _,
        };
        loop {
            self.send(output);
            if !self.blocked || self.output_ended || Instant::now() >= end {
                return;
            }
            let mut fds = [PollFd::from_borrowed_fd(
                self.stream.as_fd(),
                PollFlags::OUT,
            )];
            match poll(&mut fds, Some(&STALL)) {
                Ok(0) => return,
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

//! The debug port: where firmware writes what it does, one character at a time.
//!
//! A guest's string output arrives as one write for each byte, on a vCPU thread. So characters are gathered into lines, and only a
//! whole line, or a full buffer, goes any further. The last of them are kept in any case.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bus::Registers;

/// The port.
pub(super) const DEBUG_PORT: u16 = 0x402;
/// What it reads as: firmware looks for that before it writes.
const PRESENT: u64 = 0xe9;

/// How much is kept of what the guest wrote.
const KEPT: usize = 64 << 10;
/// How much of that [`DebugPort::tail`] shows.
const TAIL_LINES: usize = 100;
/// A line of the log is cut here.
const LOG_LINE: usize = 256;
/// A file gets at most this much at once.
const FILE_BUFFER: usize = 4096;

/// Where the characters go, besides being kept.
#[derive(Debug, Default)]
pub enum DebugOutput {
    /// Nowhere.
    #[default]
    Off,
    /// Into the log, line by line.
    Log,
    /// Into a file. It must not block: a vCPU waits for the write.
    File(File),
}

#[derive(Default)]
struct State {
    output: DebugOutput,
    /// Not yet passed on.
    line: Vec<u8>,
    kept: VecDeque<u8>,
    /// Whether everything is elsewhere too.
    passed_on: bool,
}

/// Port 0x402. Callable on any thread.
#[derive(Default)]
pub struct DebugPort {
    state: Mutex<State>,
}

impl DebugPort {
    /// A port whose characters go to `output`.
    #[must_use]
    pub fn new(output: DebugOutput) -> Self {
        let passed_on = !matches!(output, DebugOutput::Off);
        Self {
            state: Mutex::new(State {
                output,
                passed_on,
                ..State::default()
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on a line that has no end yet. When the guest has ended.
    pub fn flush(&self) {
        self.lock().pass_on();
    }

    /// The last lines that the guest wrote, if they went nowhere else.
    #[must_use]
    pub fn tail(&self) -> Option<String> {
        let mut state = self.lock();
        if state.passed_on || state.kept.is_empty() {
            return None;
        }
        let bytes = state.kept.make_contiguous().trim_ascii_end();
        let lines: Vec<&[u8]> = bytes.split(|&byte| byte == b'\n').collect();
        let skipped = lines.len().saturating_sub(TAIL_LINES);
        let pieces = lines[skipped..].iter().map(|line| {
            let (shown, cut) = line.split_at(line.len().min(LOG_LINE));
            let more = if cut.is_empty() { "" } else { "..." };
            printable(shown) + more
        });
        Some(pieces.collect::<Vec<_>>().join("\n"))
    }
}

/// The text with everything that a terminal could take for a command escaped.
fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes.strip_suffix(b"\r").unwrap_or(bytes) {
        match byte {
            b' '..=b'~' | b'\t' => text.push(char::from(byte)),
            // Writing to a string does not fail.
            _ => drop(write!(text, "\\x{byte:02x}")),
        }
    }
    text
}

impl State {
    fn take(&mut self, byte: u8) {
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(byte);
        let room = match self.output {
            DebugOutput::Off => return,
            DebugOutput::Log => LOG_LINE,
            DebugOutput::File(_) => FILE_BUFFER,
        };
        self.line.push(byte);
        if byte == b'\n' || self.line.len() >= room {
            self.pass_on();
        }
    }

    fn pass_on(&mut self) {
        if self.line.is_empty() {
            return;
        }
        match &mut self.output {
            DebugOutput::Off => {}
            DebugOutput::Log => {
                let line = self.line.strip_suffix(b"\n").unwrap_or(&self.line);
                log::info!(target: "debug_port", "debug port: {}", printable(line));
            }
            DebugOutput::File(file) => {
                if let Err(error) = file.write_all(&self.line) {
                    log::warn!("the debug port's file can't be written, and gets no more: {error}");
                    self.output = DebugOutput::Off;
                    self.passed_on = false;
                }
            }
        }
        self.line.clear();
    }
}

impl Registers for DebugPort {
    fn read(&self, _: u32, _: u64, _: u8) -> u64 {
        PRESENT
    }

    fn write(&self, _: u32, _: u64, _: u8, value: u64) {
        self.lock().take(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(port: &DebugPort, text: &[u8]) {
        for &byte in text {
            port.write(0, 0, 1, byte.into());
        }
    }

    #[test]
    fn what_goes_nowhere_else_is_kept_to_be_shown() {
        let port = DebugPort::default();
        assert_eq!(port.read(0, 0, 1), 0xe9);
        assert_eq!(port.tail(), None);
        say(&port, b"SecCoreStartup\r\n\x1b[2Jred\xff\ttab\r\nno end");
        assert_eq!(
            port.tail().as_deref(),
            Some("SecCoreStartup\n\\x1b[2Jred\\xff\ttab\nno end")
        );
        let logged = DebugPort::new(DebugOutput::Log);
        say(&logged, b"line\n");
        assert_eq!(logged.tail(), None);
    }

    #[test]
    fn only_the_last_lines_and_bytes_stay() {
        let port = DebugPort::default();
        for number in 0..20_000 {
            say(&port, format!("line {number}\n").as_bytes());
        }
        let tail = port.tail().unwrap();
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.starts_with("line 19900\n") && tail.ends_with("line 19999"));
        say(&port, &vec![b'x'; 10 * KEPT]);
        assert_eq!(port.lock().kept.len(), KEPT);
        assert_eq!(port.tail().unwrap(), "x".repeat(LOG_LINE) + "...");
    }

    #[test]
    fn a_file_gets_every_byte_in_few_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("debug");
        let port = DebugPort::new(DebugOutput::File(File::create(&path).unwrap()));
        say(&port, b"one\ntw");
        assert_eq!(std::fs::read(&path).unwrap(), b"one\n");
        say(&port, &[0; FILE_BUFFER]);
        assert_eq!(std::fs::read(&path).unwrap().len(), 4 + FILE_BUFFER);
        port.flush();
        let mut all = b"one\ntw".to_vec();
        all.extend([0; FILE_BUFFER]);
        assert_eq!(std::fs::read(&path).unwrap(), all);
        assert_eq!(port.tail(), None);
    }

    #[test]
    fn a_full_disk_ends_the_file_and_the_rest_is_kept() {
        let Ok(full) = File::options().write(true).open("/dev/full") else {
            println!("SKIPPED: a_full_disk_ends_the_file_and_the_rest_is_kept: no /dev/full here");
            return;
        };
        let port = DebugPort::new(DebugOutput::File(full));
        say(&port, b"first\nsecond\n");
        assert!(matches!(port.lock().output, DebugOutput::Off));
        assert!(port.lock().line.is_empty());
        assert_eq!(port.tail().as_deref(), Some("first\nsecond"));
    }
}

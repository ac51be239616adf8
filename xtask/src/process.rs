//! Commands that are bounded in time and whose output is kept.

use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the output of a command that was killed is waited for.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How a bounded command ended.
pub struct Outcome {
    /// Its status, or None when its time was up and it was killed.
    pub status: Option<ExitStatus>,
    /// What it wrote to its standard output, then what to its standard error.
    pub output: String,
    /// How long it took.
    pub elapsed: Duration,
}

impl Outcome {
    /// Its exit code, if it ended by one.
    pub fn code(&self) -> Option<i32> {
        self.status.and_then(|status| status.code())
    }

    /// How it ended, in words.
    pub fn ending(&self) -> String {
        match self.status {
            Some(status) => status.to_string(),
            None => format!(
                "killed, it had not ended after {:.0} s",
                self.elapsed.as_secs_f64()
            ),
        }
    }

    /// The last lines of its output, indented, for a report of failure.
    pub fn tail(&self, lines: usize) -> String {
        tail(&self.output, lines)
    }
}

/// The last lines of a text, indented, for a report of failure.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    let mut last = String::new();
    for line in &all[all.len().saturating_sub(lines)..] {
        last.push_str("    | ");
        last.push_str(line.trim_end());
        last.push('\n');
    }
    last
}

/// A command under way, its output being collected.
pub struct Running {
    child: Child,
    console: Arc<Mutex<Vec<u8>>>,
    log: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
    started: Instant,
}

fn collect(
    mut from: impl Read + Send + 'static,
    into: Arc<Mutex<Vec<u8>>>,
    show: bool,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if show {
                // Showing is a courtesy; the copy below is what counts.
                let _ = std::io::stdout().write_all(&buffer[..count]);
                let _ = std::io::stdout().flush();
            }
            into.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend_from_slice(&buffer[..count]);
        }
    })
}

/// Starts a command; `show` copies its output to ours as well.
pub fn start(command: &mut Command, show: bool) -> Result<Running> {
    let name = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    // Kept apart, or a line of the log may come to lie within one of the console.
    let (console, log) = (Arc::default(), Arc::default());
    let mut readers = Vec::new();
    if let Some(stream) = child.stdout.take() {
        readers.push(collect(stream, Arc::clone(&console), show));
    }
    if let Some(stream) = child.stderr.take() {
        readers.push(collect(stream, Arc::clone(&log), show));
    }
    Ok(Running {
        child,
        console,
        log,
        readers,
        started: Instant::now(),
    })
}

fn text_of(console: &Mutex<Vec<u8>>, log: &Mutex<Vec<u8>>) -> String {
    let mut bytes = console
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    if bytes.last().is_some_and(|byte| *byte != b'\n') {
        bytes.push(b'\n');
    }
    bytes.extend_from_slice(&log.lock().unwrap_or_else(PoisonError::into_inner));
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Running {
    /// Its process id.
    pub fn id(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// What it has written so far: its standard output, then its standard error.
    pub fn output(&self) -> String {
        text_of(&self.console, &self.log)
    }

    /// What it has written to its standard output so far, without its first `from` bytes. What is no UTF-8 is a question mark
    /// each, so that the text is as long as the bytes.
    pub fn console(&self, from: usize) -> String {
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = console.get(from..).unwrap_or_default();
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                let ascii = |&byte: &u8| {
                    if byte.is_ascii() {
                        char::from(byte)
                    } else {
                        '?'
                    }
                };
                bytes.iter().map(ascii).collect()
            }
        }
    }

    /// Gives it no more input.
    pub fn close_input(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Ends it at once.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("cannot kill the command")
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Writes to its standard input.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("the input is closed")?;
        stdin
            .write_all(bytes)
            .context("cannot write to the command's input")?;
        stdin.flush().context("cannot write to the command's input")
    }

    /// Waits until its output has a text; false if it ends or the time is up without.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> bool {
        let start = Instant::now();
        loop {
            if self.output().contains(text) {
                return true;
            }
            if self.ended() || start.elapsed() > limit {
                // What it wrote just before it ended may still be on its way.
                std::thread::sleep(Duration::from_millis(50));
                return self.output().contains(text);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for its end, and kills it when the time since its start is up.
    pub fn finish(mut self, limit: Duration) -> Result<Outcome> {
        let status = loop {
            if let Some(status) = self
                .child
                .try_wait()
                .context("cannot wait for the command")?
            {
                break Some(status);
            }
            if self.started.elapsed() > limit {
                self.child.kill().context("cannot kill the command")?;
                self.child.wait().context("cannot wait for the command")?;
                break None;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let elapsed = self.started.elapsed();
        // What a command has started outlives it when it is killed, and keeps its output open.
        let end = status.is_none().then(|| Instant::now() + LAST_WORDS);
        for reader in self.readers {
            while end.is_some_and(|end| Instant::now() < end) && !reader.is_finished() {
                std::thread::sleep(Duration::from_millis(10));
            }
            if end.is_none() || reader.is_finished() {
                // A reader that panicked has nothing more to give.
                let _ = reader.join();
            }
        }
        let output = text_of(&self.console, &self.log);
        Ok(Outcome {
            status,
            output,
            elapsed,
        })
    }
}

/// Runs a command to its end or to its limit, without input.
pub fn bounded(command: &mut Command, limit: Duration, show: bool) -> Result<Outcome> {
    let mut running = start(command, show)?;
    running.close_input();
    running.finish(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_command_has_started_is_not_waited_for() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo before; sleep 20 & wait"]);
        let outcome = bounded(&mut command, Duration::from_millis(300), false).unwrap();
        assert!(outcome.status.is_none(), "{}", outcome.ending());
        assert_eq!(outcome.output.trim(), "before");
    }
}

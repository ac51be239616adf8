//! For tests: what is done to a file, in order, and failures on demand.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_plugin_api::GuestSlice;

/// What was done.
#[derive(Clone, Debug)]
pub enum Event {
    /// Bytes were stored at an offset.
    Write(u64, Vec<u8>),
    /// The file has this many bytes at least.
    Grow(u64),
    /// A range was given back.
    Punch(u64, u64),
    /// All that went before is on stable storage.
    Sync,
}

#[derive(Default)]
struct State {
    events: Vec<Event>,
    on: bool,
    /// Events until one fails.
    left: Option<u64>,
    error: i32,
}

/// A file's record.
#[derive(Default)]
pub struct Trace(Mutex<State>);

impl Trace {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records from now on.
    pub fn start(&self) {
        self.state().on = true;
    }

    /// Events so far.
    pub fn len(&self) -> usize {
        self.state().events.len()
    }

    /// All events.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.state().events)
    }

    /// Lets `count` more writes and syncs succeed; those after them fail with `error`, until this is called again.
    pub fn fail_after(&self, count: Option<u64>, error: i32) {
        let mut state = self.state();
        (state.left, state.error) = (count, error);
    }

    fn add(&self, event: impl FnOnce() -> Event) -> io::Result<()> {
        let mut state = self.state();
        match &mut state.left {
            Some(0) => return Err(io::Error::from_raw_os_error(state.error)),
            Some(left) => *left -= 1,
            None => {}
        }
        if state.on {
            let event = event();
            state.events.push(event);
        }
        Ok(())
    }

    /// Before a write.
    pub fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.add(|| Event::Write(at, bytes.to_vec()))
    }

    /// Before a write of guest memory.
    pub fn write_list(&self, at: u64, list: &[GuestSlice]) -> io::Result<()> {
        self.add(|| {
            let mut bytes = Vec::new();
            for slice in list {
                let from = bytes.len();
                bytes.resize(from + slice.len(), 0);
                slice.read(0, &mut bytes[from..]);
            }
            Event::Write(at, bytes)
        })
    }

    /// Before the file grows.
    pub fn grow(&self, len: u64) -> io::Result<()> {
        self.add(|| Event::Grow(len))
    }

    /// Before a hole is made.
    pub fn punch(&self, at: u64, bytes: u64) {
        let mut state = self.state();
        if state.on {
            state.events.push(Event::Punch(at, bytes));
        }
    }

    /// Before a sync.
    pub fn sync(&self) -> io::Result<()> {
        self.add(|| Event::Sync)
    }
}

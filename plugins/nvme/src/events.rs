//! Asynchronous events (section 5.2).

use crate::status::Status;

/// Most requests outstanding (`AERL` and one).
pub(crate) const LIMIT: usize = 4;

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A write to the doorbell of a queue that is not there.
    InvalidRegister,
    /// A write of a value that is not in the queue.
    InvalidValue,
    /// The temperature is past a threshold.
    Temperature,
    /// What Identify says of a namespace has changed.
    NamespaceChanged,
}

/// Types of events, and the log page that goes with each.
const TYPES: usize = 3;
const LOG_PAGES: [u8; TYPES] = [0x01, 0x02, 0x04];

impl Event {
    /// Type and information (figures 145 to 148).
    fn code(self) -> (usize, u32) {
        match self {
            Self::InvalidRegister => (0, 0),
            Self::InvalidValue => (0, 1),
            Self::Temperature => (1, 1),
            Self::NamespaceChanged => (2, 0),
        }
    }
}

/// Requests, and what they are to be answered with.
#[derive(Default)]
pub(crate) struct Events {
    /// Command identifiers, the oldest first.
    requests: Vec<u16>,
    /// By type: information of an event that has not been delivered.
    pending: [Option<u32>; TYPES],
    /// By type: one has been delivered, and the guest has not read the log page.
    masked: [bool; TYPES],
}

impl Events {
    /// A request arrives; it is answered by [`Events::deliver`].
    ///
    /// # Errors
    /// There are too many.
    pub(crate) fn request(&mut self, command: u16) -> Result<(), Status> {
        if self.requests.len() >= LIMIT {
            return Err(Status::EVENT_LIMIT_EXCEEDED);
        }
        self.requests.push(command);
        Ok(())
    }

    /// Something has happened. Of one type, the first is reported until the guest has read the log page.
    pub(crate) fn add(&mut self, event: Event) {
        let (kind, information) = event.code();
        if !self.masked[kind] {
            self.pending[kind].get_or_insert(information);
        }
    }

    /// A request to answer, and the result to answer it with.
    pub(crate) fn deliver(&mut self) -> Option<(u16, u32)> {
        let kind = self.pending.iter().position(Option::is_some)?;
        if self.requests.is_empty() {
            return None;
        }
        let information = self.pending[kind].take()?;
        self.masked[kind] = true;
        let result = kind as u32 | information << 8 | u32::from(LOG_PAGES[kind]) << 16;
        Some((self.requests.remove(0), result))
    }

    /// The guest has read log page `page`.
    pub(crate) fn acknowledge(&mut self, page: u8) {
        for (kind, of_page) in LOG_PAGES.into_iter().enumerate() {
            if of_page == page {
                self.masked[kind] = false;
            }
        }
    }

    /// Takes back a request; false if there is none of that identifier.
    pub(crate) fn abort(&mut self, command: u16) -> bool {
        let at = self.requests.iter().position(|id| *id == command);
        at.map(|at| self.requests.remove(at)).is_some()
    }
}

//! The error information log (section 5.14.1.1).

use crate::command::Command;
use crate::status::Status;

/// Entries that are kept (`ELPE` and one).
pub(crate) const ENTRIES: usize = 16;
/// Bytes of an entry.
const BYTES: usize = 64;

/// The last commands that failed. Kept over controller resets, gone with the machine's power.
pub(crate) struct ErrorLog {
    entries: [[u8; BYTES]; ENTRIES],
    /// Errors since power-on.
    count: u64,
}

impl Default for ErrorLog {
    fn default() -> Self {
        Self {
            entries: [[0; BYTES]; ENTRIES],
            count: 0,
        }
    }
}

impl ErrorLog {
    /// A command of queue `queue` has failed.
    pub(crate) fn add(&mut self, queue: u16, command: &Command, status: Status) {
        self.count += 1;
        let mut entry = [0; BYTES];
        let mut put = |at: usize, bytes: &[u8]| entry[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.count.to_le_bytes());
        put(8, &queue.to_le_bytes());
        put(10, &command.id().to_le_bytes());
        put(12, &status.with_phase(false).to_le_bytes());
        // Not one bit of the command in particular.
        put(14, &[0xff, 0xff]);
        if queue != 0 {
            put(16, &command.qword(10).to_le_bytes());
        }
        put(24, &command.namespace().to_le_bytes());
        self.entries.rotate_right(1);
        self.entries[0] = entry;
    }

    /// Errors since power-on.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The log page: the latest entry first.
    pub(crate) fn page(&self) -> Vec<u8> {
        self.entries.concat()
    }
}

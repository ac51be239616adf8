//! What a PS/2 device has to say: the answer to the last command, byte by byte.

/// Longest answer: acknowledgement and three bytes.
const LONGEST: usize = 4;

/// Bytes that wait for the controller to take them. A new command drops them, as devices do.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answer {
    bytes: [u8; LONGEST],
    len: usize,
    at: usize,
    last: u8,
}

impl Answer {
    /// Replaces what waits; bytes beyond the longest answer are cut off.
    pub fn set(&mut self, bytes: &[u8]) {
        self.len = bytes.len().min(LONGEST);
        self.at = 0;
        self.bytes[..self.len].copy_from_slice(&bytes[..self.len]);
    }

    /// The next byte.
    pub fn take(&mut self) -> Option<u8> {
        let byte = *self.bytes[..self.len].get(self.at)?;
        self.at += 1;
        self.last = byte;
        Some(byte)
    }

    /// Says the last byte again.
    pub fn repeat(&mut self) {
        self.set(&[self.last]);
    }
}

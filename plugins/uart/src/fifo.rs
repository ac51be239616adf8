//! The receive FIFO: sixteen bytes in place.

/// Bytes that the FIFO holds.
pub(crate) const DEPTH: usize = 16;

/// A queue of at most [`DEPTH`] bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fifo {
    bytes: [u8; DEPTH],
    first: usize,
    len: usize,
}

impl Fifo {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Adds a byte; false: full, the byte is not taken.
    pub(crate) fn push(&mut self, byte: u8) -> bool {
        if self.len == DEPTH {
            return false;
        }
        self.bytes[(self.first + self.len) % DEPTH] = byte;
        self.len += 1;
        true
    }

    /// Takes the oldest byte.
    pub(crate) fn pop(&mut self) -> Option<u8> {
        if self.len == 0 {
            return None;
        }
        let byte = self.bytes[self.first];
        self.first = (self.first + 1) % DEPTH;
        self.len -= 1;
        Some(byte)
    }

    /// The bytes, oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u8> + '_ {
        (0..self.len).map(|i| self.bytes[(self.first + i) % DEPTH])
    }
}

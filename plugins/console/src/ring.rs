//! The latest output, found by its position in the whole stream.

/// The last bytes of a stream. Positions count from the stream's first byte.
pub(crate) struct Ring {
    bytes: Box<[u8]>,
    written: u64,
}

/// What [`Ring::copy`] found at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copied {
    /// Bytes between the position asked for and the oldest kept.
    pub(crate) lost: u64,
    /// Bytes copied, which follow those lost.
    pub(crate) len: usize,
}

impl Ring {
    /// A ring that keeps `size` bytes, at least one.
    pub(crate) fn new(size: usize) -> Self {
        // Zeroed memory of this size is mapped lazily: what is never written is never there.
        Self {
            bytes: vec![0; size.max(1)].into_boxed_slice(),
            written: 0,
        }
    }

    /// Position after the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.written
    }

    /// Position of the oldest byte kept.
    pub(crate) fn start(&self) -> u64 {
        self.written.saturating_sub(self.bytes.len() as u64)
    }

    /// Appends `data`.
    pub(crate) fn push(&mut self, data: &[u8]) {
        let size = self.bytes.len();
        self.written += data.len() as u64;
        let kept = &data[data.len().saturating_sub(size)..];
        let first = self.index(self.written - kept.len() as u64);
        let (head, tail) = kept.split_at(kept.len().min(size - first));
        self.bytes[first..first + head.len()].copy_from_slice(head);
        self.bytes[..tail.len()].copy_from_slice(tail);
    }

    /// Copies what follows position `from` into `out`.
    pub(crate) fn copy(&self, from: u64, out: &mut [u8]) -> Copied {
        let at = from.clamp(self.start(), self.written);
        let len = out
            .len()
            .min(usize::try_from(self.written - at).unwrap_or(usize::MAX));
        let first = self.index(at);
        let head = len.min(self.bytes.len() - first);
        out[..head].copy_from_slice(&self.bytes[first..first + head]);
        out[head..len].copy_from_slice(&self.bytes[..len - head]);
        Copied {
            lost: at.saturating_sub(from),
            len,
        }
    }

    fn index(&self, position: u64) -> usize {
        (position % self.bytes.len() as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_bytes_of_any_stream() {
        let stream: Vec<u8> = (0..5000u32).map(|i| (i * 7 + i / 251) as u8).collect();
        for size in [1, 2, 7, 64, 4096, 9000] {
            let mut ring = Ring::new(size);
            let mut pushed = 0;
            for step in (0..).map(|i| i * 13 % 170) {
                let next = (pushed + step).min(stream.len());
                ring.push(&stream[pushed..next]);
                pushed = next;
                let mut out = vec![0; size + 10];
                let start = pushed.saturating_sub(size);
                let copied = ring.copy(0, &mut out);
                assert_eq!(
                    copied,
                    Copied {
                        lost: start as u64,
                        len: pushed - start
                    }
                );
                assert_eq!(out[..copied.len], stream[start..pushed]);
                if pushed == stream.len() {
                    break;
                }
            }
        }
    }

    #[test]
    fn a_push_larger_than_the_ring_leaves_its_tail() {
        let mut ring = Ring::new(4);
        ring.push(b"ab");
        ring.push(b"0123456789");
        let mut out = [0; 8];
        assert_eq!(ring.copy(1, &mut out), Copied { lost: 7, len: 4 });
        assert_eq!(&out[..4], b"6789");
    }
}

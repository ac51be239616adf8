//! Arbitrary bytes as numbers. When they have run out, all numbers are 0.

/// What is left of them.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    /// Two bytes.
    pub fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// Four bytes.
    pub fn word(&mut self) -> u32 {
        u32::from(self.half()) | u32::from(self.half()) << 16
    }

    /// Eight bytes.
    pub fn long(&mut self) -> u64 {
        u64::from(self.word()) | u64::from(self.word()) << 32
    }

    /// A number from 0 to `n` - 1, of one byte.
    pub fn below(&mut self, n: u8) -> u8 {
        self.byte() % n.max(1)
    }

    /// One of these.
    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::from(self.byte()) % all.len()]
    }

    /// A guest address: mostly at a place of the pool, sometimes anything.
    pub fn address(&mut self, pool: u64, unit: u64) -> u64 {
        match self.below(16) {
            0 => self.long(),
            1 => pool + u64::from(self.half()),
            2 => u64::from(self.half()) << 12,
            n => pool + u64::from(n - 3) * unit,
        }
    }

    /// A number that means something in one place or another, or any.
    pub fn value(&mut self) -> u64 {
        match self.below(4) {
            0 => self.long(),
            1 => u64::from(self.half()),
            2 => 1 << self.below(64),
            _ => u64::from(self.byte()),
        }
    }
}

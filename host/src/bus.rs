//! The port and MMIO buses: which device owns an address.
//!
//! A lookup on a vCPU thread takes no lock: the map is an immutable sorted table that a change replaces as a whole.

/// What owns a range of guest addresses. Called on any vCPU thread, several at once.
pub trait Registers: Send + Sync {
    /// Reads `width` (1, 2, 4 or 8) bytes at `offset` into region number `region`.
    fn read(&self, region: u32, offset: u64, width: u8) -> u64;
    /// Writes the low `width` bytes of `value`.
    fn write(&self, region: u32, offset: u64, width: u8, value: u64);
}

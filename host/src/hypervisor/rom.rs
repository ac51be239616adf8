//! Memory that the guest reads and executes at full speed, and whose writes reach the host: bootroms and flash.
#![allow(unsafe_code)] // accesses a mapping that the guest reads at the same time

use std::ptr;

use anyhow::{Result, ensure};

use super::backing::Mapping;
use crate::memory::PAGE;

/// A range of the guest's address space with contents of its own. Made by [`Vm::create_rom`](super::Vm::create_rom).
#[derive(Debug)]
pub struct Rom {
    gpa: u64,
    mapping: Mapping,
}

impl Rom {
    /// What `mapping` shows, zeros at first, for guest address `gpa`, not mapped into any guest yet.
    pub(super) fn new(gpa: u64, mapping: Mapping) -> Self {
        Self { gpa, mapping }
    }

    /// One that no VM has mapped.
    #[cfg(test)]
    pub(crate) fn detached(gpa: u64, len: u64) -> Result<Self> {
        check(gpa, len)?;
        Ok(Self::new(gpa, Mapping::anonymous(usize::try_from(len)?)?))
    }

    /// Guest physical address of the first byte.
    #[must_use]
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Bytes: whole pages.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Never true: an empty ROM can't be made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mapping.is_empty()
    }

    /// Host address of the first byte, valid as long as the ROM.
    #[must_use]
    pub fn host(&self) -> *mut u8 {
        self.mapping.pointer().as_ptr()
    }

    /// Copies contents from `offset` on into `into`; what lies beyond the end reads as ones.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        for (at, byte) in (offset..).zip(into) {
            *byte = if at < self.len() {
                // SAFETY: inside the mapping, which lives as long as `self`; a byte can't be torn.
                unsafe { ptr::read_volatile(self.host().add(at as usize)) }
            } else {
                0xff
            };
        }
    }

    /// Replaces contents from `offset` on; what goes beyond the end is dropped.
    pub fn write(&self, offset: u64, from: &[u8]) {
        for (at, byte) in (offset..self.len()).zip(from) {
            // SAFETY: as in `read`.
            unsafe { ptr::write_volatile(self.host().add(at as usize), *byte) };
        }
    }
}

/// Whether `len` bytes at guest address `gpa` are whole pages, as a ROM has to be.
///
/// # Errors
/// They are not.
pub(super) fn check(gpa: u64, len: u64) -> Result<()> {
    ensure!(
        len > 0 && gpa.is_multiple_of(PAGE) && len.is_multiple_of(PAGE),
        "ROM of {len} bytes at {gpa:#x} is not in whole pages"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_end_at_their_bounds() {
        let rom = Rom::detached(0xffff_f000, 0x1000).unwrap();
        rom.write(0xffe, &[1, 2, 3]);
        rom.write(u64::MAX, &[9]);
        let mut back = [0; 4];
        rom.read(0xffd, &mut back);
        assert_eq!(back, [0, 1, 2, 0xff]);
        assert!(Rom::detached(0xffff_f001, 0x1000).is_err());
        assert!(Rom::detached(0xffff_f000, 0x800).is_err());
        assert!(Rom::detached(0xffff_f000, 0).is_err());
    }
}

//! Guest RAM as a device sees it: checked, volatile, never a Rust reference.
//!
//! The guest changes its memory at any moment, so nothing here hands out a `&[u8]`: bytes are copied in and out with
//! volatile accesses, and ring indexes are read and written atomically.

#![allow(unsafe_code)] // volatile and atomic access to mapped guest memory

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use vmm_abi::block::Iov;
use vmm_abi::host::{MemRegion, MemTable};

/// All guest RAM. A copyable handle, valid for the life of the process.
#[derive(Clone, Copy)]
pub struct GuestMemory {
    table: &'static MemTable,
}

// SAFETY: the table is immutable; guest memory itself is only accessed volatile or atomically.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

/// An access outside of guest RAM, or across the end of one of its ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryError {
    /// First guest physical address of the access.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

impl std::fmt::Display for MemoryError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} bytes at guest address {:#x} are not RAM",
            self.len, self.address
        )
    }
}

impl std::error::Error for MemoryError {}

const PAGE: u64 = 4096;

impl GuestMemory {
    pub(crate) fn new(table: &'static MemTable) -> Self {
        Self { table }
    }

    fn regions(&self) -> &'static [MemRegion] {
        // SAFETY: the ABI promises `count` regions, static for ever.
        unsafe { std::slice::from_raw_parts(self.table.regions, self.table.count) }
    }

    /// The ranges of RAM: guest physical address and bytes of each.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        self.regions().iter().map(|r| (r.gpa, r.len))
    }

    #[inline]
    fn find(&self, address: u64, len: u64) -> Result<(&'static MemRegion, u64), MemoryError> {
        for region in self.regions() {
            if let Some(offset) = address.checked_sub(region.gpa)
                && offset < region.len
                && len <= region.len - offset
            {
                return Ok((region, offset));
            }
        }
        Err(MemoryError { address, len })
    }

    /// `len` bytes from guest physical `address`, for the device to read.
    ///
    /// # Errors
    /// Not all of it is RAM.
    #[inline]
    pub fn readable(&self, address: u64, len: u64) -> Result<GuestSlice, MemoryError> {
        let (region, offset) = self.find(address, len)?;
        // SAFETY: `find` has checked that the range lies in the mapping.
        let host = unsafe { region.host.add(offset as usize) };
        Ok(GuestSlice(Iov {
            host,
            len: len as usize,
        }))
    }

    /// `len` bytes from guest physical `address`, for the device to write. Marks the pages as written when the host tracks
    /// that; whoever writes later than now (DMA that completes) calls [`GuestMemory::mark_written`] again then.
    ///
    /// # Errors
    /// Not all of it is RAM.
    #[inline]
    pub fn writable(&self, address: u64, len: u64) -> Result<GuestSlice, MemoryError> {
        let slice = self.readable(address, len)?;
        if self.tracking() {
            self.mark_written(address, len);
        }
        Ok(slice)
    }

    /// Whether the host wants to know which pages are written.
    #[inline]
    #[must_use]
    pub fn tracking(&self) -> bool {
        // SAFETY: the ABI promises a valid aligned word that is accessed atomically.
        unsafe { AtomicU32::from_ptr(self.table.tracking.cast_mut()) }.load(Ordering::Relaxed) != 0
    }

    /// Marks the pages of a range as written. Ranges outside RAM are ignored.
    #[cold]
    pub fn mark_written(&self, address: u64, len: u64) {
        let Ok((region, offset)) = self.find(address, len) else {
            return;
        };
        if len == 0 || region.dirty.is_null() {
            return;
        }
        for page in offset / PAGE..=(offset + len - 1) / PAGE {
            // SAFETY: the bitmap has a bit for each page of the region.
            let word = unsafe { AtomicU64::from_ptr(region.dirty.add((page / 64) as usize)) };
            word.fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }

    /// Copies from guest memory.
    ///
    /// # Errors
    /// Not all of it is RAM; then nothing was copied.
    pub fn read(&self, address: u64, to: &mut [u8]) -> Result<(), MemoryError> {
        self.readable(address, to.len() as u64)?.read(0, to);
        Ok(())
    }

    /// Copies to guest memory.
    ///
    /// # Errors
    /// Not all of it is RAM; then nothing was copied.
    pub fn write(&self, address: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.writable(address, from.len() as u64)?.write(0, from);
        Ok(())
    }
}

/// A contiguous piece of memory that others change at any time: guest RAM, or a buffer that a device lends a backend. Its
/// memory stays mapped for as long as the handle is used: guest RAM for the life of the process.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct GuestSlice(pub(crate) Iov);

// SAFETY: access through it is volatile or atomic only.
unsafe impl Send for GuestSlice {}
// SAFETY: as above.
unsafe impl Sync for GuestSlice {}

impl GuestSlice {
    /// Bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Where it is mapped in this process; for system calls that read or write it.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.host
    }

    /// The part of at most `len` bytes from `offset` on; empty when `offset` is past the end.
    #[inline]
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> Self {
        let offset = offset.min(self.0.len);
        // SAFETY: `offset` is at most the length.
        let host = unsafe { self.0.host.add(offset) };
        Self(Iov {
            host,
            len: len.min(self.0.len - offset),
        })
    }

    /// Copies from `offset` on into `to`; returns how many bytes there were.
    #[inline]
    pub fn read(&self, offset: usize, to: &mut [u8]) -> usize {
        let from = self.part(offset, to.len());
        // SAFETY: `from` is mapped and no longer than `to`; the two can't overlap, `to` is a Rust slice.
        unsafe { volatile_copy(from.0.host, to.as_mut_ptr(), from.0.len) };
        from.0.len
    }

    /// Copies `from` to `offset` on; returns how many bytes there was room for.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> usize {
        let to = self.part(offset, from.len());
        // SAFETY: as in `read`.
        unsafe { volatile_copy(from.as_ptr(), to.0.host, to.0.len) };
        to.0.len
    }

    /// Sets every byte to `byte`.
    pub fn fill(&self, byte: u8) {
        // SAFETY: the range is mapped. A concurrent reader may see any mix of old and new bytes, which it has to expect of guest memory.
        unsafe { std::ptr::write_bytes(self.0.host, byte, self.0.len) };
    }

    /// A little-endian 16-bit ring index, with acquire ordering; `None` outside the slice or misaligned.
    #[inline]
    #[must_use]
    pub fn load_u16(&self, offset: usize) -> Option<u16> {
        // SAFETY: `aligned` has checked bounds and alignment.
        self.aligned(offset, 2)
            .map(|p| u16::from_le(unsafe { AtomicU16::from_ptr(p.cast()) }.load(Ordering::Acquire)))
    }

    /// Stores a little-endian 16-bit ring index with release ordering; false outside the slice or misaligned.
    #[inline]
    pub fn store_u16(&self, offset: usize, value: u16) -> bool {
        let Some(p) = self.aligned(offset, 2) else {
            return false;
        };
        // SAFETY: `aligned` has checked bounds and alignment.
        unsafe { AtomicU16::from_ptr(p.cast()) }.store(value.to_le(), Ordering::Release);
        true
    }

    #[inline]
    fn aligned(&self, offset: usize, size: usize) -> Option<*mut u8> {
        let part = self.part(offset, size);
        (part.0.len == size && (part.0.host as usize).is_multiple_of(size)).then_some(part.0.host)
    }
}

/// Copies bytes that another CPU may be changing. Words where both sides are aligned, so that the guest never sees a torn field.
///
/// # Safety
/// Both ranges are mapped for `len` bytes and do not overlap.
unsafe fn volatile_copy(from: *const u8, to: *mut u8, len: usize) {
    let mut done = 0;
    // SAFETY: all accesses stay below `len` in ranges the caller vouches for; alignment is checked before the word loop.
    unsafe {
        if (from as usize).is_multiple_of(8) && (to as usize).is_multiple_of(8) {
            while len - done >= 8 {
                to.add(done)
                    .cast::<u64>()
                    .write_volatile(from.add(done).cast::<u64>().read_volatile());
                done += 8;
            }
        }
        while done < len {
            to.add(done).write_volatile(from.add(done).read_volatile());
            done += 1;
        }
    }
}

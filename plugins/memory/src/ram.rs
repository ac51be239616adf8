//! The disk's bytes: one anonymous mapping that queues read and write without a lock.

#![allow(unsafe_code)] // maps memory, and copies between it and guest memory

use std::ffi::c_void;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use vmm_plugin_api::GuestSlice;

/// Zeroes at first; the system gives a page when it is first written.
pub struct Ram {
    start: *mut u8,
    len: u64,
}

// SAFETY: the mapping lives as long as the value and is only accessed by copies that bear a concurrent one.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

/// Bytes of physical memory in this machine; `u64::MAX` where the system does not say.
pub fn machine_bytes() -> u64 {
    // SAFETY: sysconf has no preconditions.
    let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
    u64::try_from(pages).map_or(u64::MAX, |n| {
        n.saturating_mul(rustix::param::page_size() as u64)
    })
}

impl Ram {
    /// Maps `len` bytes.
    ///
    /// # Errors
    /// Out of address space.
    pub fn new(len: u64) -> std::io::Result<Self> {
        let size = usize::try_from(len).map_err(|_| rustix::io::Errno::NOMEM)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        Ok(Self {
            start: start.cast(),
            len,
        })
    }

    /// The part at `offset` of at most `len` bytes, clipped to the mapping.
    fn part(&self, offset: u64, len: u64) -> (*mut u8, usize) {
        let offset = offset.min(self.len);
        let len = len.min(self.len - offset);
        // SAFETY: `offset` is at most the mapping's length, which is a `usize`.
        (unsafe { self.start.add(offset as usize) }, len as usize)
    }

    /// Copies from `offset` on into `to`.
    pub fn read(&self, offset: u64, to: &GuestSlice) {
        let (from, len) = self.part(offset, to.len() as u64);
        // SAFETY: both are mapped for `len` bytes and never overlap: this mapping is private to the disk. The guest may change
        // either meanwhile and then finds a mix of old and new bytes; no reference to them exists, no value depends on them.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_ptr(), len) };
    }

    /// Copies `from` to `offset` on.
    pub fn write(&self, offset: u64, from: &GuestSlice) {
        let (to, len) = self.part(offset, from.len() as u64);
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, len) };
    }

    /// Zeroes `len` bytes from `offset` on, and gives whole pages back to the system.
    pub fn clear(&self, offset: u64, len: u64) {
        let page = rustix::param::page_size() as u64;
        let end = offset.saturating_add(len);
        let (first, last) = (offset.next_multiple_of(page).min(end), end - end % page);
        if first < last && self.give_back(first, last - first) {
            self.zero(offset, first - offset);
            self.zero(last, end - last);
        } else {
            self.zero(offset, len);
        }
    }

    fn zero(&self, offset: u64, len: u64) {
        let (start, len) = self.part(offset, len);
        // SAFETY: the range is mapped; concurrent copies bear it, as said in `read`.
        unsafe { std::ptr::write_bytes(start, 0, len) };
    }

    /// Zeroes whole pages and gives them back to the system; false where that can't be done.
    #[cfg(target_os = "linux")]
    fn give_back(&self, offset: u64, len: u64) -> bool {
        let (start, len) = self.part(offset, len);
        // SAFETY: the pages lie in this private mapping, of which no references exist; they read as zero afterwards.
        unsafe {
            rustix::mm::madvise(
                start.cast::<c_void>(),
                len,
                rustix::mm::Advice::LinuxDontNeed,
            )
        }
        .is_ok()
    }

    /// The same: madvise(3C) takes the pages when it likes, and until then they keep what is in them, which so has to be zeroes.
    #[cfg(target_os = "illumos")]
    fn give_back(&self, offset: u64, len: u64) -> bool {
        self.zero(offset, len);
        let (start, len) = self.part(offset, len);
        // SAFETY: the pages lie in this private mapping, of which no references exist, and read as zero before and after. A failure
        // only keeps the memory.
        unsafe { libc::madvise(start.cast::<c_void>(), len, libc::MADV_FREE) };
        true
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the whole mapping, which nothing uses any more.
        let _ = unsafe { munmap(self.start.cast::<c_void>(), self.len as usize) };
    }
}

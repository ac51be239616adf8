//! Where guest RAM comes from on an operating system, its mapping, and how to give pages back.
//!
//! RAM that nobody asks anything of is anonymous: that is what the system gives large pages to unasked. RAM of a named
//! file, and of large pages kept in reserve, lies in a file that others can map.
#![allow(unsafe_code)] // maps and unmaps memory

mod source;
mod view;

use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use anyhow::{Context, Result, ensure};
use rustix::mm::{MapFlags, ProtFlags};

pub use source::{Backing, HugePage, Opened, Source, check, open};
pub use view::{Mapped, View};

/// Guest and host addresses agree below this, so that both stages of translation can use large pages.
pub const ALIGNMENT: usize = 2 << 20;

/// What nobody can touch below guest RAM: an access that runs off its start faults, and no thread's stack, which is as large as a
/// large page, comes to lie at its foot on a large page's boundary and becomes one.
const GUARD: usize = 4096;

/// How much memory this machine has, in bytes, if the system tells.
pub fn memory_of_machine() -> Option<u64> {
    let number = |name| {
        // SAFETY: takes a number, changes nothing.
        u64::try_from(unsafe { libc::sysconf(name) }).ok()
    };
    number(libc::_SC_PHYS_PAGES)?.checked_mul(number(libc::_SC_PAGESIZE)?)
}

/// A writable mapping, of part of a file or of private memory that starts as zeros. Unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    pointer: NonNull<u8>,
    len: usize,
    /// Bytes of address space below that are kept empty.
    guard: usize,
    #[cfg_attr(not(target_os = "linux"), allow(dead_code))]
    shared: bool,
}

// SAFETY: a mapping is plain memory that any thread may touch; what they do to it concurrently is the business
// of those who access it (volatile and atomic only).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset`, shared with others who map it, at a multiple of `align`, which is a power of
    /// two of at least [`ALIGNMENT`]. What backs the file is reserved now if that is how its filesystem does it.
    ///
    /// # Errors
    /// Out of address space or of what backs the file, or the descriptor can't be mapped.
    pub fn shared(fd: BorrowedFd<'_>, offset: u64, len: usize, align: usize) -> Result<Self> {
        let (start, reserved) = reserve(len, align)?;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: FIXED replaces only pages of the reservation just made.
        let mapped = unsafe { rustix::mm::mmap(start.cast(), len, WRITABLE, flags, fd, offset) };
        mapped.with_context(|| cannot_map(len))?;
        Self::take(start, len, true, reserved)
    }

    /// Maps `len` private zero bytes at a multiple of [`ALIGNMENT`], which take no memory until touched, and then whole
    /// large pages where the system has them.
    ///
    /// # Errors
    /// Out of address space.
    pub fn private(len: usize) -> Result<Self> {
        let (start, reserved) = reserve(len, ALIGNMENT)?;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: FIXED replaces only pages of the reservation just made.
        let mapped = unsafe { rustix::mm::mmap_anonymous(start.cast(), len, WRITABLE, flags) };
        mapped.with_context(|| cannot_map(len))?;
        let mapping = Self::take(start, len, false, reserved)?;
        mapping.advise_huge();
        Ok(mapping)
    }

    /// Becomes the owner of `len` bytes at `start` and of the guard below, and gives back the rest of the reservation.
    fn take(start: *mut u8, len: usize, shared: bool, mut reserved: Reservation) -> Result<Self> {
        let pointer = NonNull::new(start).with_context(|| cannot_map(len))?;
        reserved.keep(start.wrapping_sub(GUARD), GUARD + len);
        Ok(Self {
            pointer,
            len,
            guard: GUARD,
            shared,
        })
    }

    /// Maps `len` private zero bytes that cost nothing until touched.
    ///
    /// # Errors
    /// Out of address space.
    pub fn anonymous(len: usize) -> Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let mapped = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, WRITABLE, flags) };
        let start = mapped.with_context(|| cannot_map(len))?.cast();
        let pointer = NonNull::new(start).with_context(|| cannot_map(len))?;
        Ok(Self {
            pointer,
            len,
            guard: 0,
            shared: false,
        })
    }

    /// First byte. Valid for [`Mapping::len`] bytes as long as the mapping lives.
    pub fn pointer(&self) -> NonNull<u8> {
        self.pointer
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is mapped; never true, since an empty mapping can't be made.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[cfg(target_os = "linux")]
    fn advise_huge(&self) {
        // SAFETY: the range is ours, and this advice changes only what backs it. A kernel without transparent huge
        // pages refuses it, which costs speed alone.
        let _ = unsafe {
            rustix::mm::madvise(
                self.pointer.as_ptr().cast(),
                self.len,
                rustix::mm::Advice::LinuxHugepage,
            )
        };
    }

    #[cfg(not(target_os = "linux"))]
    fn advise_huge(&self) {}

    /// Lets the first `len` bytes, a multiple of 4 KiB and no more than there are, be made of small pages, where they have not been
    /// touched and are private.
    #[cfg(target_os = "linux")]
    pub fn advise_small(&self, len: usize) {
        let (start, advice) = (
            self.pointer.as_ptr().cast(),
            rustix::mm::Advice::LinuxNoHugepage,
        );
        // SAFETY: the range is ours, and this advice changes only what backs it.
        let _ = unsafe { rustix::mm::madvise(start, len.min(self.len), advice) };
    }

    /// Nothing to do: on illumos guest RAM is the vmm driver's, which chooses its pages.
    #[cfg(not(target_os = "linux"))]
    pub fn advise_small(&self, _: usize) {}

    /// Allocates every page now.
    ///
    /// # Errors
    /// There is not enough of what backs them, or the system can't do it.
    #[cfg(target_os = "linux")]
    pub fn populate(&self) -> Result<()> {
        let start = self.pointer.as_ptr().cast();
        // SAFETY: the range is ours; its contents stay as they are.
        unsafe { rustix::mm::madvise(start, self.len, rustix::mm::Advice::LinuxPopulateWrite) }
            .with_context(|| {
                format!(
                    "Cannot allocate {} MiB of guest memory up front ([main] prefault)",
                    self.len >> 20
                )
            })
    }

    /// Allocates every page now, which no other system does so far: [`check`] has said so.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(target_os = "linux"))]
    pub fn populate(&self) -> Result<()> {
        anyhow::bail!("Cannot allocate guest memory up front on this system")
    }

    /// Makes `len` bytes from offset `from` read as zeros again. Unless they are to `keep`, their pages, whose size both are
    /// multiples of, are returned to the system where it takes them.
    ///
    /// # Errors
    /// They are not all inside the mapping.
    pub fn zero(&self, from: usize, len: usize, keep: bool) -> Result<()> {
        let start = self.part(from, len)?;
        if keep || !self.give_back(start, len) {
            // SAFETY: the range is ours and writable; its users access it as memory that changes at any time.
            unsafe { ptr::write_bytes(start, 0, len) };
        }
        Ok(())
    }

    /// Whether the range's pages were returned, so that it has new ones; a file would still have the old.
    #[cfg(target_os = "linux")]
    fn give_back(&self, start: *mut u8, len: usize) -> bool {
        let advice = rustix::mm::Advice::LinuxDontNeed;
        // SAFETY: the range is part of a mapping of ours; its users access it as memory that changes at any time.
        !self.shared && unsafe { rustix::mm::madvise(start.cast(), len, advice) }.is_ok()
    }

    #[cfg(not(target_os = "linux"))]
    fn give_back(&self, _: *mut u8, _: usize) -> bool {
        false
    }

    /// The address of a range that lies in the mapping.
    fn part(&self, from: usize, len: usize) -> Result<*mut u8> {
        ensure!(
            from.checked_add(len).is_some_and(|end| end <= self.len),
            "Bytes {from} to {from} + {len} are not all inside a mapping of {}",
            self.len
        );
        Ok(self.pointer.as_ptr().wrapping_add(from))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `self` owns, and whoever borrowed its address had to keep `self` alive.
        unsafe {
            unmap(
                self.pointer.as_ptr().wrapping_sub(self.guard),
                self.guard + self.len,
            );
        }
    }
}

/// # Safety
/// Nobody uses the range any more.
unsafe fn unmap(start: *mut u8, len: usize) {
    if len != 0 {
        // SAFETY: by this function's contract. Unmapping a valid range can't fail in a way that could be handled.
        let _ = unsafe { rustix::mm::munmap(start.cast(), len) };
    }
}

fn cannot_map(len: usize) -> String {
    format!("Cannot map {len} bytes of guest memory")
}

const WRITABLE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// Address space that is ours and holds nothing yet. Unmapped on drop, but for what was kept.
struct Reservation {
    start: *mut u8,
    span: usize,
}

/// Address space for `len` bytes at a multiple of `align`, and where they begin, with room for a guard below.
fn reserve(len: usize, align: usize) -> Result<(*mut u8, Reservation)> {
    let span = len.checked_add(align).with_context(|| cannot_map(len))?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    let reserved =
        unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), span, ProtFlags::empty(), flags) }
            .with_context(|| cannot_map(len))?;
    let start: *mut u8 = reserved.cast();
    let guarded = start.wrapping_add(GUARD);
    let first = guarded.wrapping_add(guarded.align_offset(align));
    Ok((first, Reservation { start, span }))
}

impl Reservation {
    /// Gives `len` bytes from `first`, which lie inside, to somebody else, and what is around them back.
    fn keep(&mut self, first: *mut u8, len: usize) {
        let lead = first.addr() - self.start.addr();
        // SAFETY: both parts lie inside the reservation and outside of what is kept.
        unsafe {
            unmap(self.start, lead);
            unmap(first.wrapping_add(len), self.span - lead - len);
        }
        self.span = 0;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: nobody knows of the range but `self`; it is empty if part of it was kept.
        unsafe { unmap(self.start, self.span) };
    }
}

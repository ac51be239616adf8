//! Where guest RAM comes from on an operating system: one file, its mapping, and how to give pages back.
//!
//! Plugins that run in a process of their own map the same file, so RAM is always file-backed and shared.
#![allow(unsafe_code)] // maps and unmaps memory

use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};

use anyhow::{Context, Result, ensure};
use rustix::mm::{MapFlags, ProtFlags};

/// Guest and host addresses agree below this, so that both stages of translation can use large pages.
pub const ALIGNMENT: usize = 2 << 20;

/// A file of `bytes` zero bytes that exists only as long as its descriptors and mappings.
///
/// # Errors
/// Out of descriptors, or of space where the file has to live on a file system.
pub fn create(bytes: u64) -> Result<OwnedFd> {
    let fd = anonymous_file().context("Cannot create the file behind guest memory")?;
    rustix::fs::ftruncate(&fd, bytes)
        .with_context(|| format!("Cannot give guest memory its {bytes} bytes"))?;
    seal(&fd)?;
    Ok(fd)
}

#[cfg(target_os = "linux")]
fn anonymous_file() -> Result<OwnedFd> {
    use rustix::fs::MemfdFlags;
    Ok(rustix::fs::memfd_create(
        "guest-ram",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?)
}

/// A process that shares the file must not be able to shrink it: the next access here would be a SIGBUS.
#[cfg(target_os = "linux")]
fn seal(fd: &OwnedFd) -> Result<()> {
    use rustix::fs::SealFlags;
    rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .context("Cannot seal the size of guest memory")
}

#[cfg(not(target_os = "linux"))]
fn anonymous_file() -> Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let path =
        std::env::temp_dir().join(format!("guest-ram.{}.{:p}", std::process::id(), &ALIGNMENT));
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let fd = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
        .with_context(|| format!("Cannot create {}", path.display()))?;
    rustix::fs::unlink(&path).with_context(|| format!("Cannot unlink {}", path.display()))?;
    Ok(fd)
}

#[cfg(not(target_os = "linux"))]
fn seal(_: &OwnedFd) -> Result<()> {
    Ok(())
}

/// A shared, writable mapping of part of a file, or an anonymous private one. Unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    pointer: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is plain memory that any thread may touch; what they do to it concurrently is the business
// of those who access it (volatile and atomic only).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset` at a multiple of [`ALIGNMENT`].
    ///
    /// # Errors
    /// Out of address space, or the descriptor can't be mapped.
    pub fn shared(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Self> {
        let describe = || format!("Cannot map {len} bytes of guest memory");
        let span = len.checked_add(ALIGNMENT).with_context(describe)?;
        let none = MapFlags::PRIVATE | no_reserve();
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let reserved =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), span, ProtFlags::empty(), none) }
                .with_context(describe)?;
        let lead = reserved.cast::<u8>().align_offset(ALIGNMENT);
        let start = reserved.cast::<u8>().wrapping_add(lead);
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED | no_reserve();
        // SAFETY: FIXED replaces only pages of the reservation just made: lead < ALIGNMENT and span = len + ALIGNMENT.
        let mapped = unsafe { rustix::mm::mmap(start.cast(), len, prot, flags, fd, offset) };
        // SAFETY: both ends lie inside the reservation and outside the new mapping. munmap of nothing is skipped.
        unsafe {
            unmap(reserved.cast(), if mapped.is_ok() { lead } else { span });
            if mapped.is_ok() {
                unmap(start.wrapping_add(len), ALIGNMENT - lead);
            }
        }
        let pointer = NonNull::new(mapped.with_context(describe)?.cast()).with_context(describe)?;
        let mapping = Self { pointer, len };
        mapping.advise_huge();
        Ok(mapping)
    }

    /// Maps `len` private zero bytes that cost nothing until touched.
    ///
    /// # Errors
    /// Out of address space.
    pub fn anonymous(len: usize) -> Result<Self> {
        let describe = || format!("Cannot map {len} bytes");
        let flags = MapFlags::PRIVATE | no_reserve();
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        };
        let pointer = NonNull::new(mapped.with_context(describe)?.cast()).with_context(describe)?;
        Ok(Self { pointer, len })
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
        if log::log_enabled!(log::Level::Debug) {
            hint_at_huge_pages();
        }
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

    /// Makes `len` bytes from offset `from` of a shared mapping, both multiples of the page size, read as zeros again and
    /// returns their pages to the system.
    ///
    /// # Errors
    /// They are not all inside the mapping, or the system refused; the contents are then undefined.
    #[cfg(target_os = "linux")]
    pub fn discard(&self, from: usize, len: usize) -> Result<()> {
        let start = self.part(from, len)?;
        // SAFETY: the range is part of a shared file mapping of ours; its users access it as memory that changes at any time.
        unsafe { rustix::mm::madvise(start.cast(), len, rustix::mm::Advice::LinuxRemove) }
            .context("Cannot discard guest memory")
    }

    /// Makes `len` bytes from offset `from` read as zeros again.
    ///
    /// # Errors
    /// They are not all inside the mapping.
    #[cfg(not(target_os = "linux"))]
    pub fn discard(&self, from: usize, len: usize) -> Result<()> {
        let start = self.part(from, len)?;
        // SAFETY: the range is ours and writable; its users access it as memory that changes at any time.
        unsafe { ptr::write_bytes(start, 0, len) };
        Ok(())
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
        unsafe { unmap(self.pointer.as_ptr(), self.len) };
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

fn no_reserve() -> MapFlags {
    MapFlags::NORESERVE
}

/// Advice counts only where the system lets shared memory have huge pages, and by default it doesn't.
#[cfg(target_os = "linux")]
fn hint_at_huge_pages() {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    if std::fs::read_to_string(SETTING).is_ok_and(|text| text.contains("[never]")) {
        log::debug!(
            "Guest memory has small pages, which costs the guest speed: \"echo advise > {SETTING}\" helps"
        );
    }
}

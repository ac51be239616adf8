//! Part of a file as memory, to be copied from once instead of twice, while nobody can change them.

use std::fs::File;
use std::ops::Range;
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::slice;

#[cfg(target_os = "linux")]
use rustix::mm::{MapFlags, ProtFlags};

/// asm-generic/fcntl.h; the libc crate does not have it.
#[cfg(target_os = "linux")]
const F_SETSIG: libc::c_int = 10;

/// What offsets of mappings are multiples of on x86.
#[cfg(target_os = "linux")]
const PAGE: usize = 4096;

/// Part of a file of which nobody can change anything, mapped. It is unmapped and let go on drop.
#[derive(Debug)]
pub struct View<'a> {
    /// From the start of a page.
    mapped: Mapped,
    lead: usize,
    _lease: Lease<'a>,
}

impl View<'_> {
    /// The contents.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is readable for its whole length, of parts of the file that the lease keeps as they are, and lives as
        // long as the view, whose bytes are lent no longer than itself.
        let mapped = unsafe { slice::from_raw_parts(self.mapped.start.as_ptr(), self.mapped.len) };
        mapped.get(self.lead..).unwrap_or_default()
    }

    /// Lets go of the file. What remains is a mapping that nobody reads, to be dropped when there is time: that takes as long as
    /// faulting it in.
    #[must_use]
    pub fn close(self) -> Mapped {
        self.mapped
    }
}

/// A mapping of a file's bytes, unmapped on drop.
#[derive(Debug)]
pub struct Mapped {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it is memory that nobody writes to, and unmapping is any thread's to do.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: this is its own mapping, and nobody has a reference into it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Makes whoever opens a file for writing, or shortens it, wait for its end.
#[derive(Debug)]
struct Lease<'a> {
    #[cfg(target_os = "linux")]
    file: &'a File,
    #[cfg(not(target_os = "linux"))]
    _none: std::marker::PhantomData<&'a File>,
}

#[cfg(target_os = "linux")]
impl<'a> Lease<'a> {
    /// `None`: it is open for writing, it belongs to somebody else, or its filesystem can't do it.
    fn take(file: &'a File) -> Option<Self> {
        let fd = file.as_raw_fd();
        // The notice that somebody waits is a signal, by default one that kills; this one is ignored.
        // SAFETY: both commands change only the kernel's record of this descriptor.
        let taken = unsafe {
            libc::fcntl(fd, F_SETSIG, libc::SIGURG) == 0
                && libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) == 0
        };
        taken.then_some(Self { file })
    }
}

#[cfg(target_os = "linux")]
impl Drop for Lease<'_> {
    fn drop(&mut self) {
        // SAFETY: changes only the kernel's record of this descriptor.
        unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
    }
}

#[cfg(target_os = "linux")]
impl<'a> View<'a> {
    /// The bytes in `range`, or `None` where this can't be had: the file is shorter or open for writing, it belongs to somebody
    /// else, or its filesystem can't do it.
    ///
    /// Without a lease (fcntl(2), "Leases"), the file's end could move below a mapping, and the next access be a SIGBUS.
    pub fn new(file: &'a File, range: Range<usize>) -> Option<Self> {
        let lease = Lease::take(file)?;
        let long = file
            .metadata()
            .is_ok_and(|metadata| metadata.len() >= range.end as u64);
        if range.is_empty() || !long {
            return None;
        }
        let lead = range.start % PAGE;
        let (offset, len) = (range.start - lead, range.len() + lead);
        // Not POPULATE: it costs five times what the faults do, each of which maps 16 pages.
        let flags = MapFlags::PRIVATE;
        let (anywhere, read) = (std::ptr::null_mut(), ProtFlags::READ);
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let mapped = unsafe { rustix::mm::mmap(anywhere, len, read, flags, file, offset as u64) };
        let start = NonNull::new(mapped.ok()?.cast())?;
        Some(Self {
            mapped: Mapped { start, len },
            lead,
            _lease: lease,
        })
    }
}

#[cfg(not(target_os = "linux"))]
impl<'a> View<'a> {
    /// Only Linux can hold a file still.
    pub fn new(_: &'a File, _: Range<usize>) -> Option<Self> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_file_is_seen_only_while_nobody_can_change_it() {
        let mut writer = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..9000_u32).map(|n| n as u8).collect();
        writer.write_all(&bytes).unwrap();
        let path = writer.path().to_owned();
        let file = File::open(&path).unwrap();
        assert!(View::new(&file, 0..1).is_none(), "it is open for writing");
        let (_closed, path) = (writer.into_temp_path(), path);
        let Some(view) = View::new(&file, 4000..8193) else {
            println!("SKIPPED: a_file_is_seen_only_while_nobody_can_change_it: no leases here");
            return;
        };
        assert_eq!(view.bytes(), &bytes[4000..8193]);
        // Nobody waits: O_NONBLOCK makes it an error (open(2), EWOULDBLOCK).
        let change = || {
            rustix::fs::open(
                &path,
                rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK,
                rustix::fs::Mode::empty(),
            )
        };
        assert!(change().is_err());
        let mapped = view.close();
        assert!(change().is_ok());
        drop(mapped);
        assert!(View::new(&file, 8999..9001).is_none(), "beyond its end");
        assert!(View::new(&file, 5..5).is_none());
    }
}

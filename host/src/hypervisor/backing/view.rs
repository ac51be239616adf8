//! Part of a file as memory, to be copied from once instead of twice, while nobody can change them.

use std::fs::File;
use std::ops::Range;
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd;

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
    mapped: &'a [u8],
    lead: usize,
    #[cfg(target_os = "linux")]
    file: &'a File,
}

impl View<'_> {
    /// The contents.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.mapped.get(self.lead..).unwrap_or_default()
    }
}

#[cfg(target_os = "linux")]
impl<'a> View<'a> {
    /// The bytes in `range`, or `None` where this can't be had: the file is shorter or open for writing, it belongs to somebody
    /// else, or its filesystem can't do it.
    ///
    /// A lease makes whoever opens the file for writing, or shortens it, wait for its end (fcntl(2), "Leases"): without, the file's
    /// end could move below a mapping, and the next access be a SIGBUS.
    pub fn new(file: &'a File, range: Range<usize>) -> Option<Self> {
        let fd = file.as_raw_fd();
        // The notice that somebody waits is a signal, by default one that kills; this one is ignored.
        // SAFETY: both commands change only the kernel's record of this descriptor.
        let leased = unsafe {
            libc::fcntl(fd, F_SETSIG, libc::SIGURG) == 0
                && libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) == 0
        };
        if !leased {
            return None;
        }
        // From here on the lease ends with the view.
        let lead = range.start % PAGE;
        let mut view = Self {
            mapped: &[],
            lead,
            file,
        };
        let long = file
            .metadata()
            .is_ok_and(|metadata| metadata.len() >= range.end as u64);
        if range.is_empty() || !long {
            return None;
        }
        let (offset, len) = (range.start - lead, range.len() + lead);
        // Not POPULATE: it costs five times what the faults do, each of which maps 16 pages.
        let flags = MapFlags::PRIVATE;
        let (anywhere, read) = (std::ptr::null_mut(), ProtFlags::READ);
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let mapped = unsafe { rustix::mm::mmap(anywhere, len, read, flags, file, offset as u64) };
        // SAFETY: the mapping is readable for `len` bytes of the file, which the lease keeps as they are, and lives as long as the
        // view, whose bytes are lent no longer than itself.
        view.mapped = unsafe { std::slice::from_raw_parts(mapped.ok()?.cast::<u8>(), len) };
        Some(view)
    }
}

#[cfg(target_os = "linux")]
impl Drop for View<'_> {
    fn drop(&mut self) {
        if !self.mapped.is_empty() {
            let start = self.mapped.as_ptr().cast_mut().cast();
            // SAFETY: this is the view's own mapping, and nobody has a reference into it any more.
            let _ = unsafe { rustix::mm::munmap(start, self.mapped.len()) };
        }
        // SAFETY: changes only the kernel's record of this descriptor.
        unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
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
        drop(view);
        assert!(change().is_ok());
        assert!(View::new(&file, 8999..9001).is_none(), "beyond its end");
        assert!(View::new(&file, 5..5).is_none());
    }
}

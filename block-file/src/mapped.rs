//! Reads of images in memory through a mapping: no system call, and a copy in words of eight bytes instead of the kernel's, which
//! some processors do by the byte.
//!
//! Only for files whose filesystem keeps them in memory. A mapping of a file on a disk would make its queue's thread wait in a
//! fault for what is not cached, and the system is loath to take mapped pages back from its cache.
//!
//! A fault in a hole takes a page for it, so that a sparse image would fill up by being read: read(2) does not. Hence only pages
//! that are known to be there are read here. mincore(2) tells, once for 64 pages, of which enough have been read to be worth it; after
//! that this process' own writes and discards do. A hole that another process makes meanwhile is only filled again.
//!
//! Shared, although nothing is written through it: of a private mapping POSIX does not say whether it shows later writes.

#![allow(unsafe_code)] // maps the file, and copies from it into guest memory

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags};
use vmm_plugin_api::GuestSlice;

use crate::guarded::Guard;

/// x86-64's.
const PAGE: u64 = 4096;
/// Pages that one word tells of, and one mincore(2).
const GROUP: u64 = u64::BITS as u64;
/// Pages of a group that are read by read(2) before mincore(2) is asked: as often as it takes for that, and the faults that follow, to
/// be made up for.
const WORTH: u8 = 16;
/// In place of a number of pages: it has been asked.
const ASKED: u8 = u8::MAX;
/// The largest image that is mapped: nine bytes for 256 KiB make 36 MiB, of which only what is used takes memory.
const MOST: u64 = 1 << 40;

/// An image's mapping, as large as the image was when it was opened.
#[derive(Debug)]
pub struct Mapped {
    start: NonNull<u8>,
    /// Bytes of the image, without what it has grown by.
    bytes: u64,
    guard: Guard,
    /// Pages that are in memory: one bit for each, one word for each group.
    present: Box<[AtomicU64]>,
    /// How many pages of each group have been read otherwise, or [`ASKED`].
    read: Box<[AtomicU8]>,
    /// The last page that has been seen in memory.
    top: AtomicU64,
}

// SAFETY: the mapping belongs to the process, and this type alone unmaps it; nothing refers to its bytes.
unsafe impl Send for Mapped {}
// SAFETY: as above; what changes is atomic.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps `bytes` bytes of a file that lives in memory. `None` where that can't be: reads go without.
    pub fn new(file: &File, bytes: u64) -> Option<Self> {
        if !(1..=MOST).contains(&bytes) {
            return None;
        }
        let guard = match Guard::install() {
            Ok(guard) => guard,
            Err(error) => {
                log::debug!("images in memory are read without a mapping: {error}");
                return None;
            }
        };
        // SAFETY: a new mapping, over nothing. It may end behind the file.
        let start = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                length(bytes),
                ProtFlags::READ,
                MapFlags::SHARED,
                file.as_fd(),
                0,
            )
        };
        let start = match start {
            Ok(start) => NonNull::new(start.cast())?,
            Err(error) => {
                log::debug!("an image in memory is read without a mapping: {error}");
                return None;
            }
        };
        let groups = usize::try_from(bytes.div_ceil(PAGE * GROUP)).ok()?;
        let mapped = Self {
            start,
            bytes,
            guard,
            // SAFETY: all-zero is a valid `AtomicU64`.
            present: unsafe { zeroed(groups) },
            // SAFETY: all-zero is a valid `AtomicU8`.
            read: unsafe { zeroed(groups) },
            top: AtomicU64::new(0),
        };
        // Its contents are no part of this process' core. A refusal costs nothing else.
        // SAFETY: the range is the mapping's; the advice changes nothing in it.
        let _ = unsafe {
            rustix::mm::madvise(start.as_ptr().cast(), length(bytes), Advice::LinuxDontDump)
        };
        // To who neither owns the file nor may write to it, the kernel says that all pages are there, even those behind its end.
        let end = bytes.div_ceil(PAGE);
        (mapped.resident(end, 1) == Some(0)).then_some(mapped)
    }

    /// Fills `list` from `offset` on; false if that is for read(2) to do: not all of it is known to be in memory, or the file has
    /// been cut, for which read(2) has the right error.
    pub fn read(&self, file: BorrowedFd<'_>, offset: u64, list: &[GuestSlice]) -> bool {
        let len: u64 = list.iter().map(|segment| segment.len() as u64).sum();
        let end = offset.saturating_add(len);
        if len == 0 || end > self.bytes || !self.is_present(offset, end) {
            return false;
        }
        let mut at = offset as usize;
        for segment in list {
            // SAFETY: the range ends before the mapping does, by the check above, and guest memory stays mapped; others may change
            // either meanwhile, which no Rust reference sees.
            let copied = unsafe {
                self.guard
                    .copy(self.start.as_ptr().add(at), segment.as_ptr(), segment.len())
            };
            if !copied {
                return false;
            }
            at += segment.len();
        }
        self.reaches(file, end)
    }

    /// Whether what has just been read up to `end` was all in the file. Where a file is cut within a page, the kernel takes the later
    /// pages out of all mappings, and then fills the rest of that one with zeros. So there is something to ask if the last byte is
    /// zero, and any later page can answer.
    fn reaches(&self, file: BorrowedFd<'_>, end: u64) -> bool {
        let page = (end - 1) / PAGE;
        match self.byte(end - 1) {
            None => return false,
            Some(0) => {}
            Some(_) => return true,
        }
        let top = self.top.load(Ordering::Relaxed);
        let known = self.present[(top / GROUP) as usize].load(Ordering::Relaxed);
        if top > page && known >> (top % GROUP) & 1 != 0 {
            return self.byte(top * PAGE).is_some();
        }
        rustix::fs::fstat(file).is_ok_and(|stat| stat.st_size.cast_unsigned() >= end)
    }

    /// A byte of the image; `None` if it is gone.
    fn byte(&self, at: u64) -> Option<u8> {
        let mut byte = 0u8;
        // SAFETY: `at` is below the image's length, as the callers have checked.
        let copied = unsafe {
            let from = self.start.as_ptr().add(at as usize);
            self.guard.copy(from, &raw mut byte, 1)
        };
        copied.then_some(byte)
    }

    /// What has been written is in memory.
    pub fn written(&self, offset: u64, len: u64) {
        self.each_group(offset, len, |group, pages| {
            let word = &self.present[group];
            if word.load(Ordering::Relaxed) & pages != pages {
                self.add(group, pages);
            }
        });
    }

    /// What has been discarded or zeroed may be a hole: the kernel is asked again.
    pub fn freed(&self, offset: u64, len: u64) {
        self.each_group(offset, len, |group, pages| {
            self.present[group].fetch_and(!pages, Ordering::Relaxed);
            self.read[group].store(0, Ordering::Relaxed);
        });
    }

    /// Calls `each` with every group in the range, as far as that is mapped, and its pages there.
    fn each_group(&self, offset: u64, len: u64, mut each: impl FnMut(usize, u64)) {
        let end = offset.saturating_add(len).min(self.bytes);
        if offset < end {
            groups(offset, end).for_each(|(group, pages)| each(group, pages));
        }
    }

    /// Whether all pages from `offset` to `end` are known to be there.
    fn is_present(&self, offset: u64, end: u64) -> bool {
        groups(offset, end).all(|(group, pages)| {
            let known = self.present[group].load(Ordering::Relaxed);
            known & pages == pages || self.ask(group, pages) & pages == pages
        })
    }

    /// The pages of a group that are there, as far as is known when `pages` of it have been read as well. From the kernel, once that
    /// is worth it.
    #[cold]
    fn ask(&self, group: usize, pages: u64) -> u64 {
        let read = self.read[group].load(Ordering::Relaxed);
        if read == ASKED {
            return self.present[group].load(Ordering::Relaxed);
        }
        // Two threads may take one for the other's: it is an estimate.
        let read = read.saturating_add(pages.count_ones() as u8);
        if read < WORTH {
            self.read[group].store(read, Ordering::Relaxed);
            return 0;
        }
        let first = group as u64 * GROUP;
        let count = GROUP.min(self.bytes.div_ceil(PAGE) - first);
        let found = self.resident(first, count).unwrap_or(0);
        self.read[group].store(ASKED, Ordering::Relaxed);
        self.add(group, found)
    }

    /// Remembers pages that are there; returns all of the group's.
    fn add(&self, group: usize, pages: u64) -> u64 {
        let all = self.present[group].fetch_or(pages, Ordering::Relaxed) | pages;
        if let Some(last) = pages.checked_ilog2() {
            let last = group as u64 * GROUP + u64::from(last);
            self.top.fetch_max(last, Ordering::Relaxed);
        }
        all
    }

    /// A bit for each of `count` pages, at most 64, that is in memory.
    fn resident(&self, first: u64, count: u64) -> Option<u64> {
        let mut pages = [0u8; GROUP as usize];
        // SAFETY: the range is the mapping's, which has one page more than the image; the array takes a byte for each page.
        let code = unsafe {
            let start = self.start.as_ptr().add((first * PAGE) as usize);
            libc::mincore(
                start.cast::<c_void>(),
                (count * PAGE) as usize,
                pages.as_mut_ptr(),
            )
        };
        let bits = pages
            .iter()
            .rev()
            .fold(0, |bits, page| bits << 1 | u64::from(page & 1));
        (code == 0).then_some(bits)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's own; nobody reads it any more. A refusal costs address space.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), length(self.bytes)) };
    }
}

/// Bytes that are mapped for an image of `bytes`: whole pages, and one more.
fn length(bytes: u64) -> usize {
    ((bytes.div_ceil(PAGE) + 1) * PAGE) as usize
}

/// `count` zeros, whose memory is taken when they are used.
///
/// # Safety
/// All-zero is a valid `T`.
unsafe fn zeroed<T>(count: usize) -> Box<[T]> {
    // SAFETY: by this function's contract.
    unsafe { Box::new_zeroed_slice(count).assume_init() }
}

/// Every group of pages from `offset` to `end`, which is more, with a bit for each page that the range touches.
fn groups(offset: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    let (first, last) = (offset / PAGE, (end - 1) / PAGE);
    (first / GROUP..=last / GROUP).map(move |group| {
        let from = first.saturating_sub(group * GROUP);
        let to = (last - group * GROUP).min(GROUP - 1);
        (
            group as usize,
            (u64::MAX >> (GROUP - 1 - to)) & (u64::MAX << from),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_ranges() {
        let pages = |offset, end| groups(offset, end).collect::<Vec<_>>();
        assert_eq!(pages(0, 1), [(0, 1)]);
        assert_eq!(pages(4095, 4097), [(0, 3)]);
        assert_eq!(pages(0, 64 * PAGE), [(0, u64::MAX)]);
        assert_eq!(pages(63 * PAGE, 64 * PAGE + 1), [(0, 1 << 63), (1, 1)]);
        let all = [(1, u64::MAX << 2), (2, u64::MAX), (3, 1)];
        assert_eq!(pages(66 * PAGE, 193 * PAGE), all);
    }
}

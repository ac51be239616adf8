//! RAM of the fake host, mapped from a file as the real host's is.

#![allow(unsafe_code)] // maps memory and lays out the ABI's table

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap};
use vmm_abi::host::{MemRegion, MemTable};

pub(super) struct Ram {
    table: &'static MemTable,
    tracking: &'static AtomicU32,
    dirty: Vec<(u64, &'static [AtomicU64])>,
}

// SAFETY: the table is immutable; what it points at is accessed atomically or volatile.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    #[allow(clippy::expect_used)] // a test can't go on without memory
    pub(super) fn new(ranges: &[(u64, u64)]) -> Self {
        let total: u64 = ranges.iter().map(|r| r.1).sum();
        let file = std::mem::ManuallyDrop::new(tempfile());
        rustix::fs::ftruncate(file.as_fd(), total).expect("resize the file behind guest memory");
        let (mut regions, mut dirty, mut fd_offset) = (Vec::new(), Vec::new(), 0);
        for &(gpa, len) in ranges {
            let bits: &'static [AtomicU64] = Box::leak(
                (0..len.div_ceil(4096 * 64))
                    .map(|_| AtomicU64::new(0))
                    .collect(),
            );
            let access = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a fresh mapping at an address of the kernel's choice.
            let host = unsafe {
                mmap(
                    std::ptr::null_mut(),
                    len as usize,
                    access,
                    MapFlags::SHARED,
                    file.as_fd(),
                    fd_offset,
                )
            };
            regions.push(MemRegion {
                gpa,
                len,
                host: host.expect("map guest memory").cast(),
                fd_offset,
                fd: file.as_raw_fd(),
                reserved: 0,
                dirty: bits.as_ptr().cast_mut().cast(),
            });
            dirty.push((gpa, bits));
            fd_offset += len;
        }
        let tracking: &'static AtomicU32 = Box::leak(Box::default());
        let regions: &'static [MemRegion] = Box::leak(regions.into_boxed_slice());
        let table = MemTable {
            regions: regions.as_ptr(),
            count: regions.len(),
            tracking: tracking.as_ptr(),
        };
        Self {
            table: Box::leak(Box::new(table)),
            tracking,
            dirty,
        }
    }

    pub(super) fn table(&self) -> &'static MemTable {
        self.table
    }

    pub(super) fn track(&self, on: bool) {
        self.tracking.store(on.into(), Ordering::Relaxed);
    }

    pub(super) fn take_dirty(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for (gpa, words) in &self.dirty {
            for (i, word) in words.iter().enumerate() {
                let bits = word.swap(0, Ordering::Relaxed);
                pages.extend(
                    (0..64)
                        .filter(|b| bits >> b & 1 == 1)
                        .map(|b| gpa + (i as u64 * 64 + b) * 4096),
                );
            }
        }
        pages
    }
}

/// An unlinked file, in memory where the system has a folder there, as a VM's is. Unlike a memfd it exists on every system.
#[allow(clippy::expect_used)] // a test can't go on without memory
fn tempfile() -> std::fs::File {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = format!(
        "vmm-test-ram-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let shared = std::path::Path::new("/dev/shm");
    let path = match shared.is_dir() {
        true => shared.join(name),
        false => std::env::temp_dir().join(name),
    };
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path);
    let file = file.expect("create a file for guest memory");
    let _ = std::fs::remove_file(path);
    file
}

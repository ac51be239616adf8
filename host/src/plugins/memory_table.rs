//! Guest RAM as plugins are told of it.

#![allow(unsafe_code)] // the table is shared between threads, with pointers in it

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_abi::host::{MemRegion, MemTable};

use crate::memory::GuestMemory;

/// The ABI's table of guest RAM. It and the memory stay for the life of the process: plugins' threads may use both.
pub struct MemoryRecord(&'static MemTable);

// SAFETY: the table is immutable; what its pointers refer to is accessed atomically or volatile.
unsafe impl Send for MemoryRecord {}
// SAFETY: as above.
unsafe impl Sync for MemoryRecord {}

impl MemoryRecord {
    /// Describes `memory`, and keeps it mapped for ever.
    pub fn new(memory: &Arc<GuestMemory>) -> Self {
        let memory: &'static GuestMemory = Box::leak(Box::new(memory.clone()));
        let regions = memory.regions().iter().map(|r| MemRegion {
            gpa: r.gpa,
            len: r.len,
            host: r.host().as_ptr(),
            fd_offset: r.offset,
            fd: memory.fd().map_or(-1, |fd| fd.as_raw_fd()),
            reserved: 0,
            dirty: r.dirty().as_ptr().cast_mut().cast(),
        });
        let regions: &'static [MemRegion] = Box::leak(regions.collect());
        let tracking = memory.tracking().as_ptr();
        Self(Box::leak(Box::new(MemTable {
            regions: regions.as_ptr(),
            count: regions.len(),
            tracking,
        })))
    }

    pub(super) fn table(&self) -> *const MemTable {
        self.0
    }
}

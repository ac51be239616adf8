//! What POSIX alone offers: no direct I/O, no holes, blocks of the size that the file says.

use std::os::fd::BorrowedFd;

use anyhow::bail;
use vmm_plugin_api::Result;

/// Flags for open that bypass the page cache.
pub fn direct_flags() -> Result<rustix::fs::OFlags> {
    bail!("`direct` is only possible on Linux; remove it")
}

/// Alignment of addresses and of offsets for direct I/O.
pub fn direct_alignment(_file: BorrowedFd<'_>) -> Option<(u32, u32)> {
    None
}

/// Logical and physical block size of a block device.
pub fn device_blocks(_file: BorrowedFd<'_>) -> Option<(u32, u32)> {
    None
}

/// Whether the file lives in memory, so that nothing waits for it.
pub fn in_memory(_file: BorrowedFd<'_>) -> bool {
    false
}

/// Whether holes can be punched.
pub fn can_punch(_file: BorrowedFd<'_>, _size: u64) -> bool {
    false
}

/// Frees the range. 0 or `-errno`.
pub fn punch(_file: BorrowedFd<'_>, _offset: u64, _len: u64) -> i32 {
    -libc::ENOTSUP
}

/// Makes the range read as zero and keeps its space. 0 or `-errno`.
pub fn zero(_file: BorrowedFd<'_>, _offset: u64, _len: u64) -> i32 {
    -libc::ENOTSUP
}

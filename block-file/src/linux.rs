//! What Linux adds to POSIX: direct I/O, holes, the block sizes of devices.

use std::fs::FileType;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, FallocateFlags, Mode, OFlags, SeekFrom, StatxFlags, fallocate, fstatfs, statx,
};

/// `linux/magic.h`.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// `linux/magic.h`.
const RAMFS_MAGIC: u64 = 0x8584_58f6;
/// `STATX_DIOALIGN` of statx(2), since Linux 6.1.
const DIOALIGN: StatxFlags = StatxFlags::from_bits_retain(0x2000);

/// Whether a file of this kind may hold a disk.
pub fn may_be_disk(kind: FileType) -> bool {
    kind.is_block_device()
}

/// Disks are block devices here.
pub fn is_raw(_file: BorrowedFd<'_>) -> bool {
    false
}

/// Opens a file, with `direct` so that transfers bypass the page cache.
///
/// # Errors
/// As open(2); `INVAL`: the filesystem has no direct I/O.
pub fn open(path: &Path, flags: OFlags, direct: bool) -> rustix::io::Result<OwnedFd> {
    let how = if direct {
        OFlags::DIRECT
    } else {
        OFlags::empty()
    };
    rustix::fs::open(path, flags | how, Mode::empty())
}

/// Alignment of addresses and of offsets for direct I/O, if the kernel tells.
pub fn direct_alignment(file: BorrowedFd<'_>) -> Option<(u32, u32)> {
    let stat = statx(file, "", AtFlags::EMPTY_PATH, DIOALIGN).ok()?;
    let told = stat.stx_mask & DIOALIGN.bits() != 0 && stat.stx_dio_mem_align.is_power_of_two();
    told.then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// Logical and physical block size of a block device.
pub fn device_blocks(file: BorrowedFd<'_>) -> Option<(u32, u32)> {
    let logical = rustix::fs::ioctl_blksszget(file).ok()?;
    Some((
        logical,
        rustix::fs::ioctl_blkpbszget(file).unwrap_or(logical),
    ))
}

/// Bytes in the file or device.
pub fn bytes(file: BorrowedFd<'_>) -> rustix::io::Result<u64> {
    rustix::fs::seek(file, SeekFrom::End(0))
}

/// Waits until what has been written is on stable storage.
pub fn flush(file: BorrowedFd<'_>) -> rustix::io::Result<()> {
    rustix::fs::fdatasync(file)
}

/// Writes go to the page cache, and to a device's own as its driver decides.
pub fn write_back(_file: BorrowedFd<'_>) -> bool {
    false
}

/// Never called: [`write_back`] changes nothing.
pub fn write_through(_file: BorrowedFd<'_>) {}

/// Whether the file lives in memory, so that nothing waits for it.
pub fn in_memory(file: BorrowedFd<'_>) -> bool {
    fstatfs(file).is_ok_and(|fs| matches!(fs.f_type as u64, TMPFS_MAGIC | RAMFS_MAGIC))
}

/// Whether holes can be punched: asked beyond the end of the file, where there is nothing to lose. A device answers when it
/// is asked in earnest.
pub fn can_punch(file: BorrowedFd<'_>, size: u64) -> bool {
    const BEYOND: u64 = 4096;
    punch(file, size.next_multiple_of(BEYOND), BEYOND) != -libc::EOPNOTSUPP
}

/// Mode of fallocate(2) that frees a range. The file keeps its size.
pub fn punch_mode() -> FallocateFlags {
    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
}

/// Mode of fallocate(2) that zeroes a range and keeps its space.
pub fn zero_mode() -> FallocateFlags {
    FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
}

/// Frees the range, which then reads as zero. 0 or `-errno`.
pub fn punch(file: BorrowedFd<'_>, offset: u64, len: u64) -> i32 {
    allocate(file, punch_mode(), offset, len)
}

/// Frees the range. 0 or `-errno`. The kernel zeroes what it frees.
pub fn discard(file: BorrowedFd<'_>, offset: u64, len: u64) -> i32 {
    punch(file, offset, len)
}

/// Makes the range read as zero and keeps its space. 0 or `-errno`.
pub fn zero(file: BorrowedFd<'_>, offset: u64, len: u64) -> i32 {
    allocate(file, zero_mode(), offset, len)
}

fn allocate(file: BorrowedFd<'_>, mode: FallocateFlags, offset: u64, len: u64) -> i32 {
    loop {
        match fallocate(file, mode, offset, len) {
            Ok(()) => return 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return -error.raw_os_error(),
        }
    }
}

//! What illumos adds to POSIX: raw disks, direct I/O by advice, space that files and devices give back.
//!
//! A disk is a character device here (`/dev/rdsk`, `/dev/zvol/rdsk`), which moves whole blocks between the caller's memory and the
//! device, without the page cache. Its block device (`/dev/dsk`) is a cached view of it.

#![allow(unsafe_code)] // ioctl, fcntl, directio and fstatvfs, with structures that no safe wrapper has

use std::ffi::{CStr, c_int};
use std::fs::FileType;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::dkio::{
    DKIOC_CANFREE, DKIOCFLUSHWRITECACHE, DKIOCFREE, DKIOCGETWCE, DKIOCGMEDIAINFO,
    DKIOCGMEDIAINFOEXT, DKIOCSETWCE, FreeList, MediaInfo, MediaInfoExt, freeable,
};

// illumos `sys/fcntl.h`, `flock_t` of 64-bit processes: what F_FREESP and F_OFD_SETLK take.
const _: () = assert!(size_of::<libc::flock>() == 64);
const _: () = assert!(offset_of!(libc::flock, l_whence) == 2);
const _: () = assert!(offset_of!(libc::flock, l_start) == 8);
const _: () = assert!(offset_of!(libc::flock, l_len) == 16);
const _: () = assert!(offset_of!(libc::flock, l_pid) == 28);

/// `sys/fcntl.h`, directio(3C).
const DIRECTIO_ON: c_int = 1;

unsafe extern "C" {
    /// directio(3C), in libc; the libc crate does not have it.
    safe fn directio(file: c_int, advice: c_int) -> c_int;
}

/// What a call that returns -1 on failure has come to.
fn outcome(result: c_int) -> rustix::io::Result<()> {
    if result != -1 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// Does a disk request that reads or writes a `T`.
///
/// # Safety
/// `request` takes a pointer to a `T` and touches nothing else.
unsafe fn disk_request<T>(
    file: BorrowedFd<'_>,
    request: i32,
    data: &mut T,
) -> rustix::io::Result<()> {
    // SAFETY: the descriptor is open, and `data` lives over the call; the caller vouches for its type.
    outcome(unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(data)) })
}

/// Whether a file of this kind may hold a disk: the raw devices have to prove it, see [`device_blocks`].
pub fn may_be_disk(kind: FileType) -> bool {
    kind.is_block_device() || kind.is_char_device()
}

/// Whether it is a raw device: transfers bypass the page cache and move whole blocks.
pub fn is_raw(file: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(file)
        .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device())
}

/// Opens a file, and with `direct` advises its filesystem to bypass the page cache.
///
/// # Errors
/// As open(2); `INVAL`: the filesystem takes no such advice (ZFS does not).
pub fn open(path: &Path, flags: OFlags, direct: bool) -> rustix::io::Result<OwnedFd> {
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    // O_DIRECT exists, but where it can't be had open(2) says nothing.
    if direct && !is_raw(std::os::fd::AsFd::as_fd(&file)) {
        outcome(directio(file.as_raw_fd(), DIRECTIO_ON)).map_err(|_| Errno::INVAL)?;
    }
    Ok(file)
}

/// Alignment of addresses and of offsets for direct I/O, if the kernel tells. Raw devices want whole blocks.
pub fn direct_alignment(file: BorrowedFd<'_>) -> Option<(u32, u32)> {
    let (logical, _) = device_blocks(file).filter(|_| is_raw(file))?;
    Some((logical, logical))
}

/// Logical and physical block size of a device; `None` for one that is no disk.
pub fn device_blocks(file: BorrowedFd<'_>) -> Option<(u32, u32)> {
    let mut info = MediaInfoExt::default();
    // SAFETY: the request writes a `dk_minfo_ext`.
    if unsafe { disk_request(file, DKIOCGMEDIAINFOEXT, &mut info) }.is_ok() {
        return info.blocks();
    }
    media(file)?.blocks()
}

fn media(file: BorrowedFd<'_>) -> Option<MediaInfo> {
    let mut info = MediaInfo::default();
    // SAFETY: the request writes a `dk_minfo`.
    unsafe { disk_request(file, DKIOCGMEDIAINFO, &mut info) }.ok()?;
    Some(info)
}

/// Bytes in the file or device. A slice is smaller than the medium that its driver tells of, so that is asked only where the node
/// itself has no size.
pub fn bytes(file: BorrowedFd<'_>) -> rustix::io::Result<u64> {
    let stat = rustix::fs::fstat(file)?;
    if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device() {
        return rustix::fs::seek(file, SeekFrom::End(0));
    }
    match u64::try_from(stat.st_size) {
        Ok(bytes) if bytes > 0 => Ok(bytes),
        _ => media(file)
            .and_then(|info| info.bytes())
            .ok_or(Errno::NOTTY),
    }
}

/// Waits until what has been written is on stable storage. fdatasync(3C) on a device stops at the page cache; the device's own
/// cache has its own request.
pub fn flush(file: BorrowedFd<'_>) -> rustix::io::Result<()> {
    rustix::fs::fdatasync(file)?;
    if !is_device(file) {
        return Ok(());
    }
    // SAFETY: from a process the request takes no argument, and wants it to be null.
    let result = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            DKIOCFLUSHWRITECACHE,
            std::ptr::null_mut::<libc::c_void>(),
        )
    };
    match outcome(result) {
        // No cache to flush.
        Err(Errno::NOTSUP | Errno::NOTTY) => Ok(()),
        result => result,
    }
}

fn is_device(file: BorrowedFd<'_>) -> bool {
    !rustix::fs::fstat(file)
        .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file())
}

/// Lets a raw device keep writes in its cache until a flush; without that each write waits for stable storage, and a volume of ZFS
/// starts out so. True if that was a change, which [`write_through`] takes back.
pub fn write_back(file: BorrowedFd<'_>) -> bool {
    let mut on: c_int = 0;
    // SAFETY: the request writes an `int`.
    let told = unsafe { disk_request(file, DKIOCGETWCE, &mut on) };
    is_raw(file) && told.is_ok() && on == 0 && set_cache(file, 1)
}

/// Makes each write to a raw device wait for stable storage again.
pub fn write_through(file: BorrowedFd<'_>) {
    set_cache(file, 0);
}

fn set_cache(file: BorrowedFd<'_>, mut on: c_int) -> bool {
    // SAFETY: the request reads an `int`.
    unsafe { disk_request(file, DKIOCSETWCE, &mut on) }.is_ok()
}

/// The name of the filesystem's type.
fn filesystem(file: BorrowedFd<'_>) -> Option<[u8; 16]> {
    // SAFETY: all-zero is a valid `statvfs`, of integers and arrays of them.
    let mut about: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the call fills the structure, which lives over it.
    outcome(unsafe { libc::fstatvfs(file.as_raw_fd(), &raw mut about) }).ok()?;
    Some(about.f_basetype.map(|c| c.cast_unsigned()))
}

fn lies_on(file: BorrowedFd<'_>, names: &[&CStr]) -> bool {
    let name = filesystem(file);
    let name = name
        .as_ref()
        .and_then(|name| CStr::from_bytes_until_nul(name).ok());
    name.is_some_and(|name| names.contains(&name))
}

/// Whether the file lives in memory, so that nothing waits for it.
pub fn in_memory(file: BorrowedFd<'_>) -> bool {
    lies_on(file, &[c"tmpfs"])
}

/// Whether ranges can be freed. A file is not asked: behind its end, F_FREESP would make it longer. The filesystems named here free
/// ranges inside of files, the others only cut off their ends.
pub fn can_punch(file: BorrowedFd<'_>, _size: u64) -> bool {
    if !is_device(file) {
        return lies_on(file, &[c"zfs", c"ufs"]);
    }
    let mut can: c_int = 0;
    // SAFETY: the request writes an `int`.
    unsafe { disk_request(file, DKIOC_CANFREE, &mut can) }.is_ok() && can != 0
}

/// Frees the range of a file, which then reads as zero. 0 or `-errno`.
pub fn punch(file: BorrowedFd<'_>, offset: u64, len: u64) -> i32 {
    // Devices do not promise zeroes.
    if is_device(file) {
        return -libc::ENOTSUP;
    }
    loop {
        let size = match bytes(file) {
            Ok(size) => size,
            Err(error) => return -error.raw_os_error(),
        };
        let Some((start, len)) = freeable(offset, len, size) else {
            return 0;
        };
        // SAFETY: all-zero is a valid `flock`, of integers.
        let mut range: libc::flock = unsafe { std::mem::zeroed() };
        range.l_whence = libc::SEEK_SET as libc::c_short;
        (range.l_start, range.l_len) = (start, len);
        // SAFETY: the descriptor is open and the command reads a `flock`, which lives over the call.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_FREESP, &raw mut range) };
        match outcome(result) {
            Ok(()) => return 0,
            Err(Errno::INTR) => {}
            Err(error) => return -error.raw_os_error(),
        }
    }
}

/// Frees the range of a file or device, whatever it then reads as. 0 or `-errno`.
pub fn discard(file: BorrowedFd<'_>, offset: u64, len: u64) -> i32 {
    if !is_device(file) {
        return punch(file, offset, len);
    }
    let mut list = FreeList::new(offset, len);
    loop {
        // SAFETY: the request reads a free list, with as many extents as it says.
        match unsafe { disk_request(file, DKIOCFREE, &mut list) } {
            Ok(()) => return 0,
            Err(Errno::INTR) => {}
            Err(error) => return -error.raw_os_error(),
        }
    }
}

/// Nothing here zeroes a range and keeps its space; the caller writes zeroes.
pub fn zero(_file: BorrowedFd<'_>, _offset: u64, _len: u64) -> i32 {
    -libc::ENOTSUP
}

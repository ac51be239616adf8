//! Reads and writes scatter lists that point into guest memory, all of them, without a copy.

#![allow(unsafe_code)] // hands pointers into guest memory to preadv and pwritev

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_plugin_api::GuestSlice;
use vmm_plugin_api::abi::block::Iov;

// A `GuestSlice` is a transparent `Iov`, and that is what POSIX calls an iovec: lists go to the kernel as they are.
const _: () = assert!(size_of::<GuestSlice>() == size_of::<libc::iovec>());
const _: () = assert!(size_of::<Iov>() == size_of::<libc::iovec>());
const _: () = assert!(offset_of!(Iov, host) == offset_of!(libc::iovec, iov_base));
const _: () = assert!(offset_of!(Iov, len) == offset_of!(libc::iovec, iov_len));

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// Largest piece that goes through a bounce buffer at once.
const BOUNCE: usize = 256 << 10;

/// One system call; at most IOV_MAX segments.
fn step(
    file: BorrowedFd<'_>,
    way: Direction,
    offset: u64,
    list: &[GuestSlice],
) -> io::Result<usize> {
    let offset = libc::off_t::try_from(offset).map_err(|_| rustix::io::Errno::INVAL)?;
    let (fd, iov, count) = (
        file.as_raw_fd(),
        list.as_ptr().cast::<libc::iovec>(),
        list.len() as libc::c_int,
    );
    // SAFETY: the list has the layout of iovecs, asserted above, and its memory stays mapped; the kernel copies bytes that
    // others may change meanwhile, which no Rust reference sees.
    let moved = unsafe {
        match way {
            Direction::Read => libc::preadv(fd, iov, count, offset),
            Direction::Write => libc::pwritev(fd, iov, count, offset),
        }
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// Transfers what is left of `list` after its first `skip` bytes, which stand at `offset` in the file. Goes on after short
/// transfers. 0 or `-errno`; `-EIO` when the file has ended.
pub fn transfer(
    file: BorrowedFd<'_>,
    way: Direction,
    mut offset: u64,
    list: &[GuestSlice],
    mut skip: usize,
) -> i32 {
    let mut rest = list;
    loop {
        while let Some(first) = rest.first()
            && skip >= first.len()
        {
            skip -= first.len();
            rest = &rest[1..];
        }
        let Some(first) = rest.first() else { return 0 };
        let partial = [first.part(skip, usize::MAX)];
        let next = if skip > 0 { &partial } else { rest };
        match step(file, way, offset, next) {
            Ok(0) => return -libc::EIO,
            Ok(moved) => {
                offset += moved as u64;
                skip += moved;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return -error.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// Fills `list` from `offset` on if all of it is in the page cache, without waiting for a disk.
#[cfg(target_os = "linux")]
pub fn read_cached(file: BorrowedFd<'_>, offset: u64, list: &[GuestSlice]) -> bool {
    let Ok(offset) = libc::off_t::try_from(offset) else {
        return false;
    };
    // SAFETY: as in `step`: the list has the layout of iovecs and its memory stays mapped.
    let moved = unsafe {
        libc::preadv2(
            file.as_raw_fd(),
            list.as_ptr().cast::<libc::iovec>(),
            list.len() as libc::c_int,
            offset,
            libc::RWF_NOWAIT,
        )
    };
    usize::try_from(moved)
        .is_ok_and(|moved| moved == list.iter().map(GuestSlice::len).sum::<usize>())
}

/// Elsewhere the kernel does not say what is in its cache.
#[cfg(not(target_os = "linux"))]
pub fn read_cached(_file: BorrowedFd<'_>, _offset: u64, _list: &[GuestSlice]) -> bool {
    false
}

/// As [`transfer`], through a buffer aligned to `alignment`: for direct I/O on memory that is not. Allocates; guests that
/// care for speed align their buffers.
pub fn bounced(
    file: BorrowedFd<'_>,
    way: Direction,
    mut offset: u64,
    list: &[GuestSlice],
    alignment: usize,
) -> i32 {
    let mut buffer = vec![0u8; BOUNCE + alignment];
    let start = buffer.as_ptr().align_offset(alignment);
    let Some(buffer) = buffer.get_mut(start..start + BOUNCE) else {
        return -libc::ENOMEM;
    };
    let mut left: usize = list.iter().map(GuestSlice::len).sum();
    let mut done = 0;
    while left > 0 {
        let piece = &mut buffer[..left.min(BOUNCE)];
        if way == Direction::Write {
            copy(list, done, piece, |segment, at, bytes| {
                segment.read(at, bytes)
            });
        }
        let mut moved = 0;
        while moved < piece.len() {
            let part = &mut piece[moved..];
            let at = offset + moved as u64;
            let result = match way {
                Direction::Read => rustix::io::pread(file, &mut *part, at),
                Direction::Write => rustix::io::pwrite(file, part, at),
            };
            match result {
                Ok(0) => return -libc::EIO,
                Ok(n) => moved += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return -error.raw_os_error(),
            }
        }
        if way == Direction::Read {
            copy(list, done, piece, |segment, at, bytes| {
                segment.write(at, bytes)
            });
        }
        offset += piece.len() as u64;
        done += piece.len();
        left -= piece.len();
    }
    0
}

/// Walks the part of `list` that starts at byte `at` and is as long as `bytes`.
fn copy(
    list: &[GuestSlice],
    mut at: usize,
    mut bytes: &mut [u8],
    mut each: impl FnMut(&GuestSlice, usize, &mut [u8]) -> usize,
) {
    for segment in list {
        if at >= segment.len() {
            at -= segment.len();
            continue;
        }
        let count = bytes.len().min(segment.len() - at);
        let (now, later) = std::mem::take(&mut bytes).split_at_mut(count);
        each(segment, at, now);
        (bytes, at) = (later, 0);
        if bytes.is_empty() {
            return;
        }
    }
}

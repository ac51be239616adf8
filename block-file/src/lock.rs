//! The lock that keeps two VMs from writing to one image: an open file description lock on the whole file, as QEMU's
//! are, so that the two see each other. It ends with the descriptor, so with the process at the latest.

#![allow(unsafe_code)] // fcntl with a `struct flock` has no safe wrapper for this kind of lock

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

#[cfg(target_os = "linux")]
const F_OFD_SETLK: libc::c_int = libc::F_OFD_SETLK;
/// illumos `sys/fcntl.h`; the libc crate does not have it.
#[cfg(target_os = "illumos")]
const F_OFD_SETLK: libc::c_int = 48;

/// Locks `file` for this descriptor alone, or for sharing with other readers. Does not wait.
///
/// # Errors
/// `WouldBlock` or `PermissionDenied`: somebody else has it. Others: this filesystem can't lock.
#[cfg(any(target_os = "linux", target_os = "illumos"))]
pub fn lock(file: BorrowedFd<'_>, exclusive: bool) -> io::Result<()> {
    // SAFETY: all-zero is a valid `flock`: the whole file from offset 0, pid 0 as OFD locks demand.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = if exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    } as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the descriptor is open and the command takes a `flock`, which lives over the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), F_OFD_SETLK, &raw const range) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Systems without such locks have flock(2), which ends with the descriptor as well.
#[cfg(not(any(target_os = "linux", target_os = "illumos")))]
pub fn lock(file: BorrowedFd<'_>, exclusive: bool) -> io::Result<()> {
    use rustix::fs::FlockOperation::{NonBlockingLockExclusive, NonBlockingLockShared};
    let kind = if exclusive {
        NonBlockingLockExclusive
    } else {
        NonBlockingLockShared
    };
    Ok(rustix::fs::flock(file, kind)?)
}

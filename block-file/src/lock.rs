//! The lock that keeps two VMs from writing to one image: an open file description lock on the whole file, as QEMU's
//! are, so that the two see each other. It ends with the descriptor, so with the process at the latest.

#![allow(unsafe_code)] // fcntl with a `struct flock` has no safe wrapper for this kind of lock

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use vmm_plugin_api::Result;

/// Locks `file` for this descriptor alone, or for sharing with other readers. Does not wait.
///
/// # Errors
/// `WouldBlock` or `PermissionDenied`: somebody else has it. Others: this filesystem can't lock.
fn lock(file: BorrowedFd<'_>, exclusive: bool) -> io::Result<()> {
    // SAFETY: all-zero is a valid `flock`: the whole file from offset 0, pid 0 as OFD locks demand.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = if exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    } as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the descriptor is open and the command takes a `flock`, which lives over the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// How long a lock may outlive its holder: the kernel closes the files of an io_uring some time after the process has ended, and who
/// starts a killed VM again must not be told that it still runs.
const HANDOVER: Duration = Duration::from_millis(500);

/// Locks, or finds that somebody else keeps the lock for longer than [`HANDOVER`].
fn lock_soon(file: &File, exclusive: bool) -> io::Result<()> {
    let end = Instant::now() + HANDOVER;
    loop {
        match lock(file.as_fd(), exclusive) {
            Err(error) if held(&error) && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// Whether somebody else has the lock.
fn held(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::PermissionDenied
    )
}

/// Locks an image for writing by one, or for reading by several.
///
/// # Errors
/// Somebody else has it, and what to do. A filesystem that can't lock only gets a warning.
pub fn take_lock(file: &File, path: &Path, read_only: bool) -> Result<()> {
    let name = path.display();
    match lock_soon(file, !read_only) {
        Ok(()) => Ok(()),
        Err(error) if held(&error) => {
            let advice = if read_only {
                format!(
                    "`{name}` is being written to by another VM or disk, so it can't be shared now; stop that one, or make it `read_only` too"
                )
            } else {
                format!(
                    "`{name}` is in use by another VM or disk, which would corrupt it; stop that one, give each its own copy, or set `read_only = true` in all of them"
                )
            };
            Err(anyhow!(error).context(advice))
        }
        Err(error) => {
            log::warn!(
                "`{name}` can't be locked on its filesystem ({error}): see to it that no other VM writes to it"
            );
            Ok(())
        }
    }
}

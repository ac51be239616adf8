//! What makes the slave of a pseudo terminal a terminal on illumos: STREAMS modules (streamio(4I), ptm(4D)). Whoever opens it later
//! finds them there for as long as somebody has it open.

#![allow(unsafe_code)] // ioctl with the requests of streams, which no safe wrapper has

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context, Result};

/// Answers to the terminal's requests (ptem(4M)), and the line discipline (ldterm(4M)), from the device upwards.
const MODULES: [&CStr; 2] = [c"ptem", c"ldterm"];

/// Makes `slave` a terminal, unless the machine's autopush(8) has done so when it was opened.
pub(crate) fn make_terminal(slave: BorrowedFd<'_>) -> Result<()> {
    for module in MODULES {
        if request(slave, libc::I_FIND, module)? != 0 {
            continue;
        }
        request(slave, libc::I_PUSH, module)
            .with_context(|| format!("no module {} for it", module.to_string_lossy()))?;
    }
    Ok(())
}

/// One of the requests that take the name of a module.
fn request(slave: BorrowedFd<'_>, request: libc::c_int, module: &CStr) -> std::io::Result<i32> {
    // SAFETY: the descriptor is open, and both requests read a string that ends with a zero byte.
    let answer = unsafe { libc::ioctl(slave.as_raw_fd(), request, module.as_ptr()) };
    if answer < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(answer)
}

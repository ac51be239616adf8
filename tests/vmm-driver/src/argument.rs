//! Arguments of requests, copied in and out as the kernel does.
#![allow(unsafe_code)] // reads and writes what a request's argument points to

use std::ffi::c_void;
use std::io;

use crate::errno;

/// # Safety
/// `from` is null or points to a `T` of plain data.
pub unsafe fn copy_in<T: Copy>(from: *const c_void) -> io::Result<T> {
    if from.is_null() {
        return Err(errno(libc::EFAULT));
    }
    // SAFETY: by this function's contract.
    Ok(unsafe { from.cast::<T>().read_unaligned() })
}

/// # Safety
/// `to` is null or points to room for a `T`.
pub unsafe fn copy_out<T: Copy>(to: *mut c_void, value: T) -> io::Result<()> {
    if to.is_null() {
        return Err(errno(libc::EFAULT));
    }
    // SAFETY: by this function's contract.
    unsafe { to.cast::<T>().write_unaligned(value) };
    Ok(())
}

/// # Safety
/// `from` is null or points to `len` values of plain data.
pub unsafe fn array_in<T: Copy>(from: *const T, len: usize) -> io::Result<Vec<T>> {
    if from.is_null() && len > 0 {
        return Err(errno(libc::EFAULT));
    }
    // SAFETY: by this function's contract.
    Ok((0..len)
        .map(|at| unsafe { from.add(at).read_unaligned() })
        .collect())
}

/// # Safety
/// `to` is null or points to room for all `values`.
pub unsafe fn array_out<T: Copy>(to: *mut T, values: &[T]) -> io::Result<()> {
    if to.is_null() && !values.is_empty() {
        return Err(errno(libc::EFAULT));
    }
    for (at, value) in values.iter().enumerate() {
        // SAFETY: by this function's contract.
        unsafe { to.add(at).write_unaligned(*value) };
    }
    Ok(())
}

/// The text of a name up to its zero: `None` without one.
pub fn name(bytes: &[u8; 128]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
}

//! The kernel's own driver.

#![allow(unsafe_code)] // ioctls

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::driver::{Driver, Instance};

const CONTROL: &str = "/dev/vmmctl";
const INSTANCES: &str = "/dev/vmm";

/// `/dev/vmmctl`.
#[derive(Debug)]
pub struct DevVmmCtl(File);

/// `/dev/vmm/NAME`.
#[derive(Debug)]
pub struct DevVmm(File);

impl Driver for DevVmmCtl {
    type Instance = DevVmm;

    fn open() -> io::Result<Self> {
        // The driver demands O_EXCL (vmm_ctl_open).
        open(CONTROL, libc::O_EXCL).map(Self)
    }

    unsafe fn ioctl(&self, request: i32, argument: *mut c_void) -> io::Result<i32> {
        // SAFETY: by this function's contract.
        unsafe { ioctl(&self.0, request, argument) }
    }

    fn instance(&self, name: &str) -> io::Result<DevVmm> {
        open(&format!("{INSTANCES}/{name}"), 0).map(DevVmm)
    }
}

impl Instance for DevVmm {
    unsafe fn ioctl(&self, request: i32, argument: *mut c_void) -> io::Result<i32> {
        // SAFETY: by this function's contract.
        unsafe { ioctl(&self.0, request, argument) }
    }

    fn file(&self, offset: u64, _: usize) -> io::Result<(BorrowedFd<'_>, u64)> {
        Ok((self.0.as_fd(), offset))
    }
}

fn open(path: &str, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
}

/// # Safety
/// As of [`Driver::ioctl`].
unsafe fn ioctl(file: &File, request: i32, argument: *mut c_void) -> io::Result<i32> {
    // SAFETY: by this function's contract; the descriptor is open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) };
    match result {
        // Not an errno: VM_LAPIC_MSI so refuses an address.
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

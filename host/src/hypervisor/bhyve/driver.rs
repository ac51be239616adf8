//! The one way to the vmm driver: its control node, `/dev/vmmctl`, and one node per VM, `/dev/vmm/NAME`.
//!
//! On illumos these are the kernel's; tests put an emulation of the driver in their place.

#![allow(unsafe_code)] // declares requests whose arguments are pointers

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;

/// A driver.
pub trait Driver: Send + Sync + Sized + 'static {
    /// What a VM's node opens as.
    type Instance: Instance;

    /// Opens the control node for writing.
    ///
    /// # Errors
    /// The system's: `NotFound` without the driver, `PermissionDenied` without the privilege.
    fn open() -> io::Result<Self>;

    /// One request to the control node, and what it returns: one of the `VMM_` requests of [`super::abi`].
    ///
    /// # Safety
    /// `argument` points to what the request takes by [`super::abi`], whose own pointers point to as much as it says they do, all valid
    /// and unshared until the call returns; of a request that takes a number, it is that number.
    ///
    /// # Errors
    /// The kernel's errno.
    unsafe fn ioctl(&self, request: i32, argument: *mut c_void) -> io::Result<i32>;

    /// Opens the node of VM `name`, which exists.
    ///
    /// # Errors
    /// The system's.
    fn instance(&self, name: &str) -> io::Result<Self::Instance>;
}

/// The node of one VM.
pub trait Instance: Send + Sync + 'static {
    /// One request, and what it returns: one of the `VM_` requests of [`super::abi`].
    ///
    /// # Safety
    /// As of [`Driver::ioctl`]. What `VM_RUN` lets the guest do is limited to the memory of its segments.
    ///
    /// # Errors
    /// The kernel's errno.
    unsafe fn ioctl(&self, request: i32, argument: *mut c_void) -> io::Result<i32>;

    /// What to map, shared, to see `len` bytes at `offset` of the node: a file and the offset in it. Offsets below
    /// [`super::abi::DEVMEM_START`] are guest physical addresses, and must be mapped there; those from there on are a segment's
    /// (`VM_DEVMEM_GETOFFSET`).
    ///
    /// # Errors
    /// Nothing lies there.
    fn file(&self, offset: u64, len: usize) -> io::Result<(BorrowedFd<'_>, u64)>;
}

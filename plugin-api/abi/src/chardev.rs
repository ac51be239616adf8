//! What a character backend offers: a byte stream each way, between a serial device and its console.

use core::ffi::c_void;

/// Interface name of [`CharTable`].
pub const CHAR: &str = "vmm.char/1";

/// `vmm.char/1`. One device uses a backend; any of its threads, one at a time for each direction.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct CharTable {
    /// Takes at most `len` bytes of input into `buf`. `-EAGAIN`: none now, `fd` tells when. Never blocks. What is not
    /// taken waits: a device that has no room loses nothing.
    pub read: unsafe extern "C" fn(this: *mut c_void, buf: *mut u8, len: usize) -> isize,
    /// Gives `len` bytes of output; returns how many were taken. Never blocks: a backend without a client keeps or drops
    /// bytes, as its options say, and counts what it drops.
    pub write: unsafe extern "C" fn(this: *mut c_void, buf: *const u8, len: usize) -> isize,
    /// A descriptor, readable while `read` would give something. Borrowed until release. -1: there is never input.
    pub fd: unsafe extern "C" fn(this: *mut c_void) -> i32,
}

//! `vmm.io/1` with a 32-bit offset where the real table has 64 bits.

use core::ffi::c_void;

/// The skewed table.
#[repr(C)]
#[derive(Clone, Copy, Debug, abi_stable::StableAbi)]
pub struct IoTable {
    /// The offset has another width.
    pub read: unsafe extern "C" fn(this: *mut c_void, region: u32, offset: u32, width: u32) -> u64,
    /// As it was.
    pub write:
        unsafe extern "C" fn(this: *mut c_void, region: u32, offset: u64, width: u32, value: u64),
}

//! Offers a table of another layout under the frozen name `vmm.io/1`: the host has to refuse it, by the layout record, before it
//! calls a function of it.

#![allow(unsafe_code)] // functions of a table

use std::ffi::c_void;

use vmm_abi::Iface;
use vmm_abi::device::IO;
use vmm_test_plugin_raw::{Variant, export, manifest, plain, recorded};

/// The variant.
pub struct Skewed;

/// `vmm.io/1` with an offset of 32 bits where the real table has 64.
#[repr(C)]
#[derive(Clone, Copy, Debug, abi_stable::StableAbi)]
pub struct IoTable {
    /// Its third parameter has another width.
    pub read: unsafe extern "C" fn(this: *mut c_void, region: u32, offset: u32, width: u32) -> u64,
    /// As it was.
    pub write:
        unsafe extern "C" fn(this: *mut c_void, region: u32, offset: u64, width: u32, value: u64),
}

static SKEWED: IoTable = IoTable { read, write };

/// Ends the process: the host has called a function whose parameters it can't know.
unsafe extern "C" fn read(_this: *mut c_void, _region: u32, _offset: u32, _width: u32) -> u64 {
    std::process::abort()
}

unsafe extern "C" fn write(
    _this: *mut c_void,
    _region: u32,
    _offset: u64,
    _width: u32,
    _value: u64,
) {
    std::process::abort()
}

impl Variant for Skewed {
    const MANIFEST: &'static str = manifest!(
        "test-skewed",
        "1.0",
        "Its register table has another layout"
    );
    const ABI_MINOR: u32 = 0;

    fn interface(name: &str) -> Iface {
        match name {
            IO => recorded(&SKEWED),
            _ => plain(name, true),
        }
    }

    fn read(_has_service: impl Fn(&str) -> bool) -> u64 {
        0
    }
}

export!(Skewed);

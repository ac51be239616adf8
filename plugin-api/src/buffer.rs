//! Memory of the device's own that a backend may read and write: what a scatter list can point at besides guest RAM.

#![allow(unsafe_code)] // allocates aligned memory

use std::alloc::{Layout, alloc_zeroed};

use vmm_abi::block::Iov;

use crate::GuestSlice;

impl GuestSlice {
    /// `len` zero bytes aligned to `align` (a power of two), for the life of the process: backends hold copies of a slice,
    /// so it is never freed. For the few buffers that a device makes when it is created. `None`: no memory, or the
    /// alignment or length is not possible.
    #[must_use]
    pub fn leak(len: usize, align: usize) -> Option<Self> {
        let layout = Layout::from_size_align(len, align).ok()?;
        if len == 0 {
            return None;
        }
        // SAFETY: the layout has a size.
        let host = unsafe { alloc_zeroed(layout) };
        (!host.is_null()).then_some(Self(Iov { host, len }))
    }
}

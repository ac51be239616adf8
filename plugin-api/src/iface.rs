//! Offering a table to the host, with the record by which it can prove the layout.

#![allow(unsafe_code)] // turns what the host answers into references

use std::ffi::c_void;

use vmm_abi::{Iface, Str};

#[cfg(feature = "layout")]
pub(crate) trait Table: abi_stable::StableAbi {}
#[cfg(feature = "layout")]
impl<T: abi_stable::StableAbi> Table for T {}

#[cfg(not(feature = "layout"))]
pub(crate) trait Table {}
#[cfg(not(feature = "layout"))]
impl<T> Table for T {}

/// `table` as the host is told of it.
pub(crate) fn offer<T: Table>(table: &'static T) -> Iface {
    let table: *const c_void = std::ptr::from_ref(table).cast();
    #[cfg(feature = "layout")]
    {
        let layout: *const c_void = std::ptr::from_ref(T::LAYOUT).cast();
        Iface {
            table,
            layout,
            layout_kind: vmm_abi::LAYOUT_ABI_STABLE_0_11,
        }
    }
    #[cfg(not(feature = "layout"))]
    Iface {
        table,
        layout: std::ptr::null(),
        layout_kind: 0,
    }
}

/// The host's table for `name`, if it has one.
pub(crate) fn service<T>(host: &vmm_abi::Host, name: &str) -> Option<&'static T> {
    // SAFETY: `host` is valid for the life of the process; a name stands for one table type for ever, and tables are static.
    unsafe {
        let iface = (host.service)(host.ctx, Str::new(name));
        iface.table.cast::<T>().as_ref()
    }
}

/// The object's table for `name`, if it offers it.
pub(crate) fn interface<T>(obj: &vmm_abi::Obj, name: &str) -> Option<&'static T> {
    // SAFETY: the host passes live objects whose base table is valid; otherwise as above.
    unsafe {
        let base = obj.base.as_ref()?;
        let iface = (base.interface)(obj.this, Str::new(name));
        iface.table.cast::<T>().as_ref()
    }
}

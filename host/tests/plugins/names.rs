//! `vmm.host.name/1`, as a plugin calls it.

#![allow(unsafe_code)] // calls a table of the ABI

use vmm_abi::Str;
use vmm_abi::host::{NAME, NameTable};

use super::objects::Stage;

#[test]
fn an_object_is_told_what_the_operator_calls_it() {
    let host = Stage::new().host();
    // SAFETY: a call by the table's contract.
    let iface = unsafe { (host.service)(host.ctx, Str::new(NAME)) };
    // SAFETY: the name stands for this table.
    let table = unsafe { iface.table.cast::<NameTable>().as_ref() }.unwrap();
    // SAFETY: a call by the table's contract.
    let name = unsafe { (table.name)(host.ctx) };
    // SAFETY: the table promises text for the life of the process.
    let bytes = unsafe { std::slice::from_raw_parts(name.ptr, name.len) };
    assert_eq!(bytes, b"dev.it");
}

//! The state of in-kernel devices and vCPUs as the driver exports it (`VM_DATA_READ`, `VM_DATA_WRITE`).

#![allow(unsafe_code)] // requests with buffers, and structures as the bytes that they are

use std::io;
use std::mem::size_of_val;

use super::abi::data::*;
use super::abi::*;
use super::node::Node;

/// All classes of fields have this version.
const FIELDS_VERSION: u16 = 1;

/// Writes fields, each an ident and a value: MSRs, or what a vCPU has pending.
pub(super) fn write_fields(
    node: &Node,
    vcpu: i32,
    class: u16,
    fields: &[VdiFieldEntry],
) -> io::Result<()> {
    // The driver may write results into what it read.
    let mut fields = fields.to_vec();
    let mut request = VmDataXfer {
        vcpuid: vcpu,
        class,
        version: FIELDS_VERSION,
        len: u32::try_from(size_of_val(fields.as_slice())).map_err(io::Error::other)?,
        data: fields.as_mut_ptr().cast(),
        ..Default::default()
    };
    // SAFETY: the buffer has `len` bytes and lives during the call.
    unsafe { node.raw(VM_DATA_WRITE, &mut request) }.map(drop)
}

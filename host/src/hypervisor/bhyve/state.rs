//! The state of in-kernel devices and vCPUs as the driver exports and imports it (`VM_DATA_READ`, `VM_DATA_WRITE`), class by class.

#![allow(unsafe_code)] // requests with buffers, and structures as the bytes that they are

use std::io;
use std::mem::size_of_val;

use super::abi::data::*;
use super::abi::*;
use super::node::Node;

/// `vm_data_xfer.vcpuid` of what is the VM's.
pub(super) const WHOLE_VM: i32 = -1;

/// All classes of fields have this version.
const FIELDS_VERSION: u16 = 1;

/// A structure that is the whole of a class.
///
/// # Safety
/// It is what the driver transfers for `CLASS` in `VERSION`, and any bytes are a value of it.
pub(super) unsafe trait Class: Copy + Default {
    const CLASS: u16;
    const VERSION: u16;
}

/// The table of classes: only here is one paired with its structure.
macro_rules! classes {
    ($($structure:ty = $class:ident, $version:literal;)*) => {$(
        // SAFETY: the structure of this class and version, and all its fields are integers.
        unsafe impl Class for $structure {
            const CLASS: u16 = $class;
            const VERSION: u16 = $version;
        }
    )*};
}

classes! {
    VdiLapic = VDC_LAPIC, 1;
    VdiIoapic = VDC_IOAPIC, 1;
    VdiAtpit = VDC_ATPIT, 1;
    VdiAtpic = VDC_ATPIC, 1;
    VdiHpet = VDC_HPET, 1;
    VdiPmTimer = VDC_PM_TIMER, 1;
    VdiRtc = VDC_RTC, 2;
    VdiTimeInfo = VDC_VMM_TIME, 1;
    VdiPmuAmd = VDC_PMU_AMD, 1;
}

/// Reads a class of vCPU `vcpu`, or of [`WHOLE_VM`].
pub(super) fn read<T: Class>(node: &Node, vcpu: i32) -> io::Result<T> {
    let mut value = T::default();
    let mut request = structure(vcpu, &mut value);
    // SAFETY: the buffer has `len` bytes and lives during the call, and `T` takes any bytes.
    unsafe { node.raw(VM_DATA_READ, &mut request) }?;
    Ok(value)
}

/// Writes one.
pub(super) fn write<T: Class>(node: &Node, vcpu: i32, value: &T) -> io::Result<()> {
    let mut value = *value;
    let mut request = structure(vcpu, &mut value);
    // SAFETY: as in `read`.
    unsafe { node.raw(VM_DATA_WRITE, &mut request) }.map(drop)
}

fn structure<T: Class>(vcpu: i32, value: &mut T) -> VmDataXfer {
    VmDataXfer {
        vcpuid: vcpu,
        class: T::CLASS,
        version: T::VERSION,
        len: size_of::<T>() as u32,
        data: std::ptr::from_mut(value).cast(),
        ..Default::default()
    }
}

/// Reads all fields of a class that consists of fields, each an ident and a value: MSRs, or what a vCPU has pending.
pub(super) fn read_fields(node: &Node, vcpu: i32, class: u16) -> io::Result<Vec<VdiFieldEntry>> {
    let mut request = fields(vcpu, class, &mut []);
    // SAFETY: the buffer is of no bytes.
    let asked = unsafe { node.raw(VM_DATA_READ, &mut request) };
    match asked {
        // How many bytes there are.
        Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {}
        other => {
            other?;
        }
    }
    let bytes = (request.result_len as usize).min(VM_DATA_XFER_LIMIT);
    let mut found = vec![VdiFieldEntry::default(); bytes / size_of::<VdiFieldEntry>()];
    let mut request = fields(vcpu, class, &mut found);
    // SAFETY: the buffer has `len` bytes and lives during the call, and its entries take any bytes.
    unsafe { node.raw(VM_DATA_READ, &mut request) }?;
    found.truncate(request.result_len as usize / size_of::<VdiFieldEntry>());
    Ok(found)
}

/// Writes fields. If the driver refuses one, it writes none.
pub(super) fn write_fields(
    node: &Node,
    vcpu: i32,
    class: u16,
    entries: &[VdiFieldEntry],
) -> io::Result<()> {
    let mut entries = entries.to_vec();
    let mut request = fields(vcpu, class, &mut entries);
    // SAFETY: the buffer has `len` bytes and lives during the call.
    unsafe { node.raw(VM_DATA_WRITE, &mut request) }.map(drop)
}

fn fields(vcpu: i32, class: u16, entries: &mut [VdiFieldEntry]) -> VmDataXfer {
    VmDataXfer {
        vcpuid: vcpu,
        class,
        version: FIELDS_VERSION,
        len: size_of_val(entries) as u32,
        data: entries.as_mut_ptr().cast(),
        ..Default::default()
    }
}

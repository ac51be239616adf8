//! Memory (types 16, 17 and 19): one array with one module that holds it all, and where it is mapped.

use super::structure::Structure;
use super::{MAPPED, MEMORY_ARRAY, MEMORY_MODULE};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// "No error information structure" (SMBIOS 3.2 sections 7.17.4 and 7.18.1).
const NO_ERRORS: u16 = 0xfffe;

/// `ranges`: first address and length.
pub(super) fn put(ranges: &[(u64, u64)], table: &mut Vec<u8>) {
    let total = ranges.iter().map(|(_, len)| len).sum();
    put_array(total, table);
    put_module(total, table);
    for (number, &(start, len)) in (0..).zip(ranges) {
        put_mapped(MAPPED + number, start, len, table);
    }
}

/// A capacity of 2 TiB or more goes into the extended field.
fn put_array(total: u64, table: &mut Vec<u8>) {
    let (capacity, extended) = match u32::try_from(total / KIB) {
        Ok(kib) if kib < 1 << 31 => (kib, 0),
        _ => (1 << 31, total),
    };
    Structure::new(16, MEMORY_ARRAY)
        // On the system board, system memory, error correction unknown.
        .bytes(&[3, 3, 2])
        .dword(capacity)
        .word(NO_ERRORS)
        .word(1)
        .qword(extended)
        .put(table);
}

/// A size that doesn't fit 15 bits goes into the extended field.
fn put_module(total: u64, table: &mut Vec<u8>) {
    let mib = total / MIB;
    let (size, extended) = if mib < 0x7fff {
        (mib as u16, 0)
    } else {
        (0x7fff, mib as u32)
    };
    Structure::new(17, MEMORY_MODULE)
        .word(MEMORY_ARRAY)
        .word(NO_ERRORS)
        // Widths are unknown.
        .word(0xffff)
        .word(0xffff)
        .word(size)
        // A DIMM, of no set.
        .bytes(&[9, 0])
        .text("DIMM 0")
        .text("")
        // RAM, of unknown detail and speed.
        .bytes(&[7])
        .word(1 << 2)
        .word(0)
        // Manufacturer, serial number, asset tag, part number; no attributes.
        .bytes(&[0; 5])
        .dword(extended)
        // Speed and voltages.
        .bytes(&[0; 8])
        // Unknown technology; operates as volatile memory.
        .bytes(&[2])
        .word(1 << 3)
        // Firmware version, and ids of module and controller.
        .bytes(&[0; 9])
        .qword(0)
        .qword(total)
        // Neither cache nor logical size.
        .bytes(&[0; 16])
        .put(table);
}

/// Addresses of 4 TiB or more go into the extended fields.
fn put_mapped(handle: u16, start: u64, len: u64, table: &mut Vec<u8>) {
    let last = start + len - 1;
    let small = |address: u64| u32::try_from(address / KIB).ok().filter(|k| *k < u32::MAX);
    let (first, end, extended) = match (small(start), small(last)) {
        (Some(first), Some(end)) => (first, end, (0, 0)),
        _ => (u32::MAX, u32::MAX, (start, last)),
    };
    Structure::new(19, handle)
        .dword(first)
        .dword(end)
        .word(MEMORY_ARRAY)
        .bytes(&[1])
        .qword(extended.0)
        .qword(extended.1)
        .put(table);
}

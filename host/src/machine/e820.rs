//! The memory map that firmware, or direct boot in its place, hands to the guest (ACPI 6.4 section 15).

use super::{ECAM_BASE, ECAM_LEN, IOAPIC_BASE, LAPIC_BASE};
use crate::memory::{GuestMemory, HIGH_START};

/// Extended BIOS data area: reserved, as every PC's last KiB of low memory is.
pub const EBDA: u64 = 0x9_fc00;
/// The legacy video and ROM hole starts here.
const HOLE: u64 = 0xa_0000;
/// ROM area, in which the ACPI tables are.
pub const TABLES: u64 = 0xe_0000;
/// The part of it that guests without a boot protocol search for anchors: ACPI's RSDP and SMBIOS's entry point.
pub const SCANNED: u64 = 0xf_0000;
/// Extended memory starts here.
pub(super) const MIB: u64 = 0x10_0000;

/// What a range is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// Usable RAM.
    Ram = 1,
    /// Anything the guest must leave alone.
    Reserved = 2,
}

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// First guest physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// What it is for.
    pub kind: E820Kind,
}

/// The map for firmware, as fw_cfg's `etc/e820` has it: RAM alone, since what else there is firmware places itself.
#[must_use]
pub fn firmware_map(memory: &GuestMemory) -> Vec<u8> {
    let entry = |region: &crate::memory::Region| {
        let kind = (E820Kind::Ram as u32).to_le_bytes();
        [
            &region.gpa.to_le_bytes()[..],
            &region.len.to_le_bytes(),
            &kind,
        ]
        .concat()
    };
    memory.regions().iter().flat_map(entry).collect()
}

/// The map, by ascending address, without overlap.
#[must_use]
pub fn map(memory: &GuestMemory) -> Vec<E820Entry> {
    let low = memory.low_end();
    let mut entries = Vec::with_capacity(8);
    let mut add = |start: u64, end: u64, kind| {
        if start < end {
            entries.push(E820Entry {
                start,
                len: end - start,
                kind,
            });
        }
    };
    add(0, EBDA.min(low), E820Kind::Ram);
    add(EBDA, HOLE, E820Kind::Reserved);
    add(TABLES, MIB, E820Kind::Reserved);
    add(MIB, low, E820Kind::Ram);
    add(ECAM_BASE, ECAM_BASE + ECAM_LEN, E820Kind::Reserved);
    add(IOAPIC_BASE, IOAPIC_BASE + 0x1000, E820Kind::Reserved);
    add(LAPIC_BASE, LAPIC_BASE + 0x1000, E820Kind::Reserved);
    add(HIGH_START, memory.high_end().unwrap_or(0), E820Kind::Ram);
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_sorted_and_covers_ram() {
        for mib in [64, 3072, 5000] {
            let memory = GuestMemory::new(mib << 20).unwrap();
            let map = map(&memory);
            assert!(
                map.windows(2)
                    .all(|pair| pair[0].start + pair[0].len <= pair[1].start),
                "{map:x?}"
            );
            let ram: u64 = map
                .iter()
                .filter(|entry| entry.kind == E820Kind::Ram)
                .map(|entry| entry.len)
                .sum();
            assert_eq!(ram, (mib << 20) - (MIB - EBDA), "{map:x?}");
            for entry in map.iter().filter(|entry| entry.kind == E820Kind::Ram) {
                assert!(memory.contains(entry.start, entry.len));
            }
        }
    }
}

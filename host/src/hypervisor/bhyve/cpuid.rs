//! Between the driver's CPUID tables and the guest's.
//!
//! The driver answers a guest from a table without an exit. It walks the table from the start, takes the first entry that fits, and
//! stops at the first of a larger leaf; it does not check the order, and a table that is not sorted loses leaves silently. Nothing of
//! where a CPU is gets corrected on the way: the table has to say it.

#![allow(unsafe_code)] // a request with an array

use anyhow::{Context, Result, ensure};

use super::abi::*;
use super::node::{self, Node};
use crate::hypervisor::cpuid::{CpuidEntry, CpuidProfile, Vendor};

/// Leaf 1, ECX: an x2APIC.
pub(super) const X2APIC: u32 = 1 << 21;

/// No CPU has more leaves than this in a class, whatever its first leaf says.
const LEAVES: u32 = 0x40;
/// Subleaves of caches, which end by themselves, and of XSAVE, one per feature.
const CACHES: u32 = 16;
const XSAVE_FEATURES: u32 = 64;
/// Leaves with subleaves beside those that say themselves how many there are, and the subleaves that are asked for.
const INDEXED: [u32; 11] = [
    0xb, 0xf, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1d, 0x1e, 0x1f, 0x20,
];
const SUBLEAVES: u32 = 4;

/// What a guest without a profile sees: what the driver would answer by itself, and an x2APIC, which it has for every guest that
/// is told of it.
pub(super) fn host(node: &Node) -> Result<CpuidProfile> {
    let ask = |leaf: u32, subleaf: u32| -> Result<[u32; 4]> {
        let mut request = VmLegacyCpuid {
            vcpuid: 0,
            eax: leaf,
            ecx: subleaf,
            ..Default::default()
        };
        node.request(&node::LEGACY_CPUID, &mut request)
            .context("bhyve does not tell its CPU features")?;
        Ok([request.eax, request.ebx, request.ecx, request.edx])
    };
    profile(ask)
}

fn profile(ask: impl Fn(u32, u32) -> Result<[u32; 4]>) -> Result<CpuidProfile> {
    let mut entries = Vec::new();
    for first in [0, 0x4000_0000, 0x8000_0000] {
        let last = ask(first, 0)?[0].clamp(first, first + LEAVES);
        for leaf in first..=last {
            for (subleaf, mut values) in subleaves(leaf, &ask)? {
                if leaf == 1 {
                    values[2] |= X2APIC;
                }
                entries.push(CpuidEntry {
                    leaf,
                    subleaf,
                    values,
                });
            }
        }
    }
    let profile = CpuidProfile::new(Vendor::Intel, entries);
    Ok(match profile.named_vendor() {
        Some(Vendor::Amd) => CpuidProfile::new(Vendor::Amd, profile.entries().to_vec()),
        // Others that there are follow Intel.
        _ => profile,
    })
}

/// The answers of a leaf: for every subleaf alike, or each for its own.
fn subleaves(
    leaf: u32,
    ask: impl Fn(u32, u32) -> Result<[u32; 4]>,
) -> Result<Vec<(Option<u32>, [u32; 4])>> {
    let first = ask(leaf, 0)?;
    let others = match leaf {
        // Type 0: no more caches.
        4 | 0x8000_001d => 1..CACHES,
        7 => 1..first[0].min(CACHES) + 1,
        0xd => 1..XSAVE_FEATURES,
        leaf if INDEXED.contains(&leaf) => 1..SUBLEAVES,
        _ => return Ok(vec![(None, first)]),
    };
    let mut found = vec![(Some(0), first)];
    for subleaf in others {
        let values = ask(leaf, subleaf)?;
        // What is not there reads as zeros with an entry and without one.
        if values != [0; 4] {
            found.push((Some(subleaf), values));
        }
    }
    Ok(found)
}

/// A CPU's table as the driver takes it: ascending by leaf, and within one by subleaf, the entry for every subleaf last.
fn driver_table(table: &CpuidProfile) -> Vec<VcpuCpuidEntry> {
    let entry = |entry: &CpuidEntry| {
        let [eax, ebx, ecx, edx] = entry.values;
        VcpuCpuidEntry {
            function: entry.leaf,
            index: entry.subleaf.unwrap_or(0),
            flags: entry.subleaf.map_or(0, |_| VCE_FLAG_MATCH_INDEX),
            eax,
            ebx,
            ecx,
            edx,
            pad: 0,
        }
    };
    // CpuidProfile keeps this order.
    table.entries().iter().map(entry).collect()
}

/// Gives vCPU `vcpu` its table.
pub(super) fn set(node: &Node, vcpu: i32, table: &CpuidProfile) -> Result<()> {
    let mut entries = driver_table(table);
    ensure!(
        entries.len() <= CPUID_ENTRIES_MAX,
        "The CPUID table has {} entries, and bhyve takes {CPUID_ENTRIES_MAX}",
        entries.len()
    );
    let mut request = VmVcpuCpuidConfig {
        vcpuid: vcpu,
        flags: match table.vendor() {
            Vendor::Intel => VCC_FLAG_INTEL_FALLBACK,
            Vendor::Amd => 0,
        },
        nent: entries.len() as u32,
        pad: 0,
        entries: entries.as_mut_ptr().cast(),
    };
    // SAFETY: `entries` has `nent` entries and lives during the call; the driver reads them.
    unsafe { node.raw(VM_SET_CPUID, &mut request) }.context("bhyve refused the CPUID table")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::topology::Topology;

    /// A CPU of Intel with two caches and three XSAVE features.
    fn intel(leaf: u32, subleaf: u32) -> Result<[u32; 4]> {
        Ok(match (leaf, subleaf) {
            (0, _) => [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
            (1, _) => [0x806f8, 0, 3, 0x1f8b_fbff],
            (4, 0) => [0x121, 1, 2, 3],
            (4, 1) => [0x143, 1, 2, 3],
            (7, 0) => [1, 7, 0, 0],
            (7, 1) => [8, 0, 0, 0],
            (0xd, 0) => [7, 0x340, 0x340, 0],
            (0xd, 2) => [0x100, 0x240, 0, 0],
            (0x4000_0000, _) => [0x4000_0000, 0x7679_6862, 0x7962_2065, 0x2065_7679],
            (0x8000_0000, _) => [0x8000_0001, 0, 0, 0],
            (0x8000_0001, _) => [0, 0, 1, 0],
            _ => [0; 4],
        })
    }

    #[test]
    fn the_drivers_answers_become_a_profile() {
        let profile = profile(intel).unwrap();
        assert_eq!(profile.vendor(), Vendor::Intel);
        assert_eq!(profile.get(1, 0).unwrap()[2], 3 | X2APIC);
        assert_eq!(profile.get(4, 1), Some([0x143, 1, 2, 3]));
        assert_eq!(profile.get(4, 2), None);
        assert_eq!(profile.get(7, 1), Some([8, 0, 0, 0]));
        assert_eq!(profile.get(0xd, 2), Some([0x100, 0x240, 0, 0]));
        assert!(profile.has_paravirtual());
        assert_eq!(profile.get(0x8000_0001, 0), Some([0, 0, 1, 0]));
    }

    #[test]
    fn a_class_without_end_is_cut_off() {
        let endless = |leaf, _| Ok([0xffff_ffff, leaf, 0, 0]);
        let profile = profile(endless).unwrap();
        assert!(profile.get(LEAVES, 0).is_some() && profile.get(LEAVES + 1, 0).is_none());
    }

    #[test]
    fn tables_ascend_as_the_drivers_walk_needs_it() {
        let profile = profile(intel).unwrap();
        let any = CpuidEntry {
            leaf: 7,
            subleaf: None,
            values: [9; 4],
        };
        let table = driver_table(&profile.with([any]).for_cpu(Topology::of_cores(2), 1));
        let order = |entry: &VcpuCpuidEntry| {
            let any = entry.flags & VCE_FLAG_MATCH_INDEX == 0;
            (entry.function, any, entry.index)
        };
        assert!(table.is_sorted_by_key(order));
        let seven: Vec<_> = table.iter().filter(|entry| entry.function == 7).collect();
        assert_eq!(seven.last().unwrap().flags, 0, "for every subleaf, last");
        let one = table.iter().find(|entry| entry.function == 1).unwrap();
        assert_eq!(one.ebx >> 24, 1, "the local APIC id");
    }
}

//! What the CPUID instruction tells each vCPU: what KVM supports on this machine, with the parts that name
//! one particular CPU and the VM's topology (one socket, `count` cores, one thread each) filled in.
//!
//! Leaf numbers and fields: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HTT: u32 = 1 << 28;
const CMP_LEGACY: u32 = 1 << 1;
/// Flag of an entry that stands for one subleaf alone.
pub const INDEXED: u32 = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
const EXTENDED_TOPOLOGY: [u32; 2] = [0xb, 0x1f];

/// The table of vCPU `id` (its local APIC id) out of `count`, from what KVM supports.
pub fn for_vcpu(
    supported: &[kvm_cpuid_entry2],
    id: u32,
    count: u32,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    let amd = supported
        .iter()
        .any(|entry| entry.function == 0x8000_0000 && entry.eax >= 0x8000_001d)
        && supported.iter().any(|entry| {
            entry.function == 0 && (entry.ebx == 0x6874_7541 || entry.ebx == 0x6f67_7948)
        });
    let mut table: Vec<_> = supported
        .iter()
        .filter(|entry| !EXTENDED_TOPOLOGY.contains(&entry.function))
        .copied()
        .collect();
    for entry in &mut table {
        specialise(entry, id, count, tsc_deadline, amd);
    }
    let max_basic = supported
        .iter()
        .find(|entry| entry.function == 0)
        .map_or(0, |entry| entry.eax);
    for leaf in EXTENDED_TOPOLOGY {
        if max_basic >= leaf {
            table.extend(extended_topology(leaf, id, count));
        }
    }
    table
}

fn specialise(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, tsc_deadline: bool, amd: bool) {
    match entry.function {
        1 => {
            let logical = count.next_power_of_two().min(0xff);
            entry.ebx = entry.ebx & 0x0000_ffff | logical << 16 | id << 24;
            entry.ecx |= HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            set(&mut entry.edx, HTT, count > 1);
        }
        4 => {
            let cores = count.next_power_of_two().min(64) - 1;
            entry.eax =
                entry.eax & 0x0000_3fff | cache_sharers(entry.eax, count) << 14 | cores << 26;
        }
        0x8000_0001 if amd => set(&mut entry.ecx, CMP_LEGACY, count > 1),
        // Cores less one, and how many bits of the APIC id tell them apart.
        0x8000_0008 if amd => {
            entry.ecx = entry.ecx & !0xf0ff | (count - 1).min(0xff) | id_bits(count) << 12;
        }
        0x8000_001d => entry.eax = entry.eax & 0x0000_3fff | cache_sharers(entry.eax, count) << 14,
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// CPUs less one that share a cache of leaf 4 or 0x8000_001d: each core has its own levels 1 and 2.
fn cache_sharers(eax: u32, count: u32) -> u32 {
    let level = eax >> 5 & 7;
    if level >= 3 {
        (count.next_power_of_two() - 1).min(0xfff)
    } else {
        0
    }
}

fn extended_topology(leaf: u32, id: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    // Level types: 1 = thread, 2 = core, 0 = no more levels.
    [(0, 0, 1, 1), (1, id_bits(count), count, 2), (2, 0, 0, 0)].map(
        |(index, shift, logical, kind)| kvm_cpuid_entry2 {
            function: leaf,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: logical,
            ecx: index | kind << 8,
            edx: id,
            ..Default::default()
        },
    )
}

fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx: 0x0080_0800,
            ..Default::default()
        }
    }

    #[test]
    fn each_cpu_gets_its_own_id_and_the_same_topology() {
        let supported = [
            leaf(0, 0, 0xd),
            leaf(1, 0, 0),
            leaf(4, 0, 0x21),
            leaf(4, 3, 0x63),
            leaf(0xb, 0, 9),
        ];
        let table = for_vcpu(&supported, 2, 3, true);
        let find = |function, index| {
            table
                .iter()
                .find(|entry| (entry.function, entry.index) == (function, index))
                .unwrap()
        };
        assert_eq!(find(1, 0).ebx, 0x0204_0800);
        assert_eq!(find(1, 0).ecx, HYPERVISOR | TSC_DEADLINE);
        assert_eq!(find(1, 0).edx, HTT);
        assert_eq!(find(4, 0).eax, 0x21 | 3 << 26);
        assert_eq!(find(4, 3).eax, 0x63 | 3 << 14 | 3 << 26);
        assert_eq!(
            (find(0xb, 0).ebx, find(0xb, 0).ecx, find(0xb, 0).edx),
            (1, 0x100, 2)
        );
        assert_eq!(
            (find(0xb, 1).eax, find(0xb, 1).ebx, find(0xb, 1).ecx),
            (2, 3, 0x201)
        );
        assert_eq!(
            table.iter().filter(|entry| entry.function == 0xb).count(),
            3
        );
        assert!(!table.iter().any(|entry| entry.function == 0x1f));
    }

    #[test]
    fn one_cpu_is_no_multiprocessor() {
        let table = for_vcpu(&[leaf(0, 0, 1), leaf(1, 0, 0)], 0, 1, false);
        assert_eq!(table[1].edx & HTT, 0);
        assert_eq!(table[1].ebx, 0x0001_0800);
    }
}

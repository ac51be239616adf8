//! Between KVM's CPUID tables and the guest's.
//!
//! KVM's own search (`KVM_SET_CPUID2`) is the guest's: it takes the first entry whose function, and index where that is
//! significant, are those of the request; where there is none it answers as the vendor that leaf 0 names would, with zeros
//! or with the highest basic leaf.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::hypervisor::CpuModel;
use crate::hypervisor::cpuid::{CpuidEntry, CpuidProfile, Vendor, table};

/// Leaf 1, ECX: a hypervisor is there, and its leaves with it.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX: the local APIC's timer has a TSC deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;

/// What a guest without a profile sees: everything `supported`, and what depends on the in-kernel local APIC.
pub fn host(supported: &[kvm_cpuid_entry2], tsc_deadline: bool) -> CpuidProfile {
    let entries = supported.iter().map(|entry| {
        let mut values = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        if entry.function == 1 {
            values[2] |= HYPERVISOR;
            if tsc_deadline {
                values[2] |= TSC_DEADLINE;
            }
        }
        let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        CpuidEntry {
            leaf: entry.function,
            subleaf: indexed.then_some(entry.index),
            values,
        }
    });
    let profile = CpuidProfile::new(Vendor::Intel, entries.collect());
    match profile.named_vendor() {
        Some(Vendor::Amd) => CpuidProfile::new(Vendor::Amd, profile.entries().to_vec()),
        // Others that there are follow Intel.
        _ => profile,
    }
}

/// The table of CPU `cpu` as KVM takes it.
pub fn for_vcpu(host: &CpuidProfile, model: &CpuModel, cpu: u32) -> Vec<kvm_cpuid_entry2> {
    let table = table(host, model, cpu);
    table.entries().iter().map(to_kvm).collect()
}

fn to_kvm(entry: &CpuidEntry) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = entry.values;
    kvm_cpuid_entry2 {
        function: entry.leaf,
        index: entry.subleaf.unwrap_or(0),
        flags: match entry.subleaf {
            Some(_) => KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            None => 0,
        },
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::hypervisor::topology::Topology;

    fn supported(function: u32, index: Option<u32>, values: [u32; 4]) -> kvm_cpuid_entry2 {
        to_kvm(&CpuidEntry {
            leaf: function,
            subleaf: index,
            values,
        })
    }

    fn some_host() -> Vec<kvm_cpuid_entry2> {
        vec![
            supported(0, None, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            supported(1, None, [0x806f8, 0x0740_0800, 3, 0x1f8b_fbff]),
            supported(4, Some(0), [0xfc00_4121, 0x02c0_003f, 63, 0]),
            supported(0xb, Some(0), [1, 2, 3, 4]),
            supported(
                0x4000_0000,
                None,
                [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
            ),
            supported(0x4000_0001, None, [0x0100_7efb, 0, 0, 0]),
            supported(0x8000_0000, None, [0x8000_0008, 0, 0, 0]),
        ]
    }

    fn model(profile: Option<CpuidProfile>) -> CpuModel {
        CpuModel {
            topology: Topology::new(2, 2, 1).unwrap(),
            profile: profile.map(Arc::new),
            x2apic: true,
        }
    }

    fn find(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        let fits = |entry: &&kvm_cpuid_entry2| {
            let significant = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            entry.function == function && (!significant || entry.index == index)
        };
        table.iter().find(fits).copied()
    }

    #[test]
    fn without_a_profile_the_guest_sees_the_host() {
        let table = for_vcpu(&host(&some_host(), true), &model(None), 3);
        let one = find(&table, 1, 0).unwrap();
        assert_eq!(
            (one.ebx, one.ecx),
            (0x0302_0800, 3 | HYPERVISOR | TSC_DEADLINE)
        );
        assert_eq!(find(&table, 0xb, 1).unwrap().edx, 3);
        assert_eq!(find(&table, 0x4000_0001, 0).unwrap().eax, 0x0100_7efb);
        let without = host(&some_host(), false);
        assert_eq!(without.get(1, 0).unwrap()[2], 3 | HYPERVISOR);
    }

    #[test]
    fn the_hosts_profile_gives_the_same_tables_as_none() {
        let host = host(&some_host(), true);
        for cpu in 0..4 {
            let pasted = for_vcpu(&host, &model(Some(host.portable())), cpu);
            assert_eq!(pasted, for_vcpu(&host, &model(None), cpu));
        }
    }

    #[test]
    fn a_profile_is_all_there_is_beside_kvms_own_leaves() {
        let entry = |leaf, values| CpuidEntry {
            leaf,
            subleaf: None,
            values,
        };
        let host = host(&some_host(), true);
        let amd = entry(0, [1, 0x6874_7541, 0x444d_4163, 0x6974_6e65]);
        let profile = CpuidProfile::new(Vendor::Amd, vec![amd, entry(1, [7, 8, 9, 0])]);
        let table = for_vcpu(&host, &model(Some(profile.clone())), 0);
        let leaves: Vec<u32> = table.iter().map(|entry| entry.function).collect();
        assert_eq!(leaves, [0, 1, 0x4000_0000, 0x4000_0001]);
        assert_eq!(table[1].ecx, 9, "not even the hypervisor's bit is added");
        let own = profile.with([entry(0x4000_0000, [0x4000_0000, 1, 2, 3])]);
        let table = for_vcpu(&host, &model(Some(own)), 0);
        assert_eq!(find(&table, 0x4000_0000, 0).unwrap().ebx, 1);
        assert_eq!(find(&table, 0x4000_0001, 0), None);
    }

    #[test]
    fn an_x2apic_is_offered_where_the_model_says_so() {
        let host = host(&[supported(1, None, [0, 0, 1 << 21 | 1, 0])], false);
        let offered = |x2apic, profile: Option<CpuidProfile>| {
            let model = CpuModel {
                x2apic,
                ..model(profile)
            };
            for_vcpu(&host, &model, 0)[0].ecx & (1 << 21 | 1)
        };
        assert_eq!(offered(true, None), 1 << 21 | 1);
        assert_eq!(offered(false, None), 1);
        assert_eq!(
            offered(false, Some(host.clone())),
            1 << 21 | 1,
            "the profile's word counts"
        );
    }

    #[test]
    fn amd_hosts_follow_amds_rules() {
        let entries = [supported(
            0,
            None,
            [1, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
        )];
        assert_eq!(host(&entries, false).vendor(), Vendor::Amd);
        assert_eq!(host(&some_host(), false).vendor(), Vendor::Intel);
    }
}

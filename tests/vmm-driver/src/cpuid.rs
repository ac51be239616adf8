//! CPUID: the driver's own answers, and the tables that hosts give vCPUs.
#![allow(unsafe_code)] // requests with arrays

use std::io;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use vmm_host::hypervisor::bhyve::abi::*;

use crate::argument::{array_in, array_out};
use crate::errno;
use crate::machine::Machine;

/// Leaf 1, ECX: the driver's own answers have neither.
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
/// "bhyve bhyve " in EBX, ECX, EDX.
const NAME: [u32; 3] = [0x7679_6862, 0x6862_2065, 0x2065_7679];

impl Machine {
    /// What the driver answers without a table.
    pub fn legacy_cpuid(&self, request: &mut VmLegacyCpuid) {
        let (leaf, subleaf) = (request.eax, request.ecx);
        let fits = |entry: &&kvm_cpuid_entry2| {
            let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            entry.function == leaf && (!indexed || entry.index == subleaf)
        };
        let known = self.supported.iter().find(fits).copied();
        let mut entry = known.unwrap_or_default();
        match leaf {
            1 => entry.ecx &= !(X2APIC | TSC_DEADLINE),
            0x4000_0000 => {
                entry.eax = 0x4000_0000;
                [entry.ebx, entry.ecx, entry.edx] = NAME;
            }
            0x4000_0001..=0x4fff_ffff => entry = kvm_cpuid_entry2::default(),
            _ => {}
        }
        [request.eax, request.ebx, request.ecx, request.edx] =
            [entry.eax, entry.ebx, entry.ecx, entry.edx];
    }

    /// # Safety
    /// `request.entries` points to as many entries as it says.
    pub unsafe fn set_cpuid(&self, request: &VmVcpuCpuidConfig) -> io::Result<()> {
        let count = request.nent as usize;
        if count > CPUID_ENTRIES_MAX {
            return Err(self.misuse(libc::EFBIG, &format!("a CPUID table of {count} entries")));
        }
        let refuse = |what: &str| Err(self.misuse(libc::EINVAL, &format!("CPUID table: {what}")));
        if request.flags & !VCC_FLAG_INTEL_FALLBACK != 0 {
            return refuse("flags that no host needs");
        }
        // SAFETY: by this function's contract.
        let table: Vec<VcpuCpuidEntry> = unsafe { array_in(request.entries.cast(), count) }?;
        if table
            .iter()
            .any(|entry| entry.flags & !VCE_FLAG_MATCH_INDEX != 0)
        {
            return refuse("unknown flags of an entry");
        }
        // The driver takes it as it is, and loses leaves.
        let order = |entry: &VcpuCpuidEntry| {
            let any = entry.flags & VCE_FLAG_MATCH_INDEX == 0;
            (entry.function, any, entry.index)
        };
        if !table.is_sorted_by_key(order) {
            return refuse("not sorted");
        }
        let entries: Vec<_> = table.iter().map(to_kvm).collect();
        let Ok(entries) = CpuId::from_entries(&entries) else {
            return Err(errno(libc::ENOMEM));
        };
        self.with(request.vcpuid, |cpu| {
            cpu.fd.set_cpuid2(&entries)?;
            cpu.table = Some((request.flags, table));
            Ok(())
        })
    }

    /// # Safety
    /// `request.entries` points to room for as many entries as it says.
    pub unsafe fn get_cpuid(&self, request: &mut VmVcpuCpuidConfig) -> io::Result<()> {
        let (flags, table) = self.with(request.vcpuid, |cpu| {
            let legacy = || (VCC_FLAG_LEGACY_HANDLING, Vec::new());
            Ok(cpu.table.clone().unwrap_or_else(legacy))
        })?;
        let room = request.nent as usize;
        request.nent = table.len() as u32;
        if room < table.len() {
            return Err(errno(libc::E2BIG));
        }
        request.flags = flags;
        // SAFETY: by this function's contract.
        unsafe { array_out(request.entries.cast(), &table) }
    }
}

fn to_kvm(entry: &VcpuCpuidEntry) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: entry.function,
        index: entry.index,
        flags: match entry.flags & VCE_FLAG_MATCH_INDEX {
            0 => 0,
            _ => KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        },
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
        ..Default::default()
    }
}

//! The interface of illumos' vmm driver: requests, constants and structures (usr/src/uts/intel/sys/vmm_dev.h, vmm.h and
//! vmm_data.h of illumos-gate, interface version 18).
//!
//! Names are the kernel's own. The compiler checks each structure's size and the offset of each of its fields.
#![allow(missing_docs, unsafe_code)]

pub mod data;
pub mod structs;

pub use structs::*;

/// Defines structures of the kernel: each field with its offset, each structure with its size.
macro_rules! layout {
    ($($(#[$meta:meta])* $name:ident: $size:literal { $($field:ident: $type:ty = $offset:literal,)* })*) => {$(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct $name {
            $(pub $field: $type,)*
        }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(std::mem::offset_of!($name, $field) == $offset);)*
        };

        impl Default for $name {
            fn default() -> Self {
                // SAFETY: all fields are integers, arrays of integers, pointers, or structures and unions of those, of which zeros are
                // values.
                unsafe { std::mem::zeroed() }
            }
        }
    )*};
}
pub(crate) use layout;

/// The oldest interface with the suspend semantics that this host knows (`VM_VCPU_BARRIER`, `when` of a suspension).
pub const VERSION_MIN: i32 = 16;
/// The newest interface that this host was written for.
pub const VERSION_KNOWN: i32 = 18;

/// Bytes of names, the terminating zero included.
pub const VM_MAX_NAMELEN: usize = 128;

// Requests. Some take a number in the pointer's place: VM_PMTMR_LOCATE (port), VM_SET_AUTODESTRUCT (0 or 1), VM_VCPU_BARRIER (vCPU).

// On `/dev/vmmctl`.
pub const VMM_CREATE_VM: i32 = 0x56_4d01;
pub const VMM_DESTROY_VM: i32 = 0x56_4d02;
pub const VMM_VM_SUPPORTED: i32 = 0x56_4d03;
pub const VMM_INTERFACE_VERSION: i32 = 0x56_4d04;
pub const VMM_CHECK_IOMMU: i32 = 0x56_4d05;
pub const VMM_RESV_QUERY: i32 = 0x56_4d10;
pub const VMM_RESV_SET_TARGET: i32 = 0x56_4d11;
// Freezes the vCPU that its argument names.
pub const VM_RUN: i32 = 0x76_7001;
pub const VM_SET_REGISTER: i32 = 0x76_7002;
pub const VM_GET_REGISTER: i32 = 0x76_7003;
pub const VM_SET_SEGMENT_DESCRIPTOR: i32 = 0x76_7004;
pub const VM_GET_SEGMENT_DESCRIPTOR: i32 = 0x76_7005;
pub const VM_SET_REGISTER_SET: i32 = 0x76_7006;
pub const VM_GET_REGISTER_SET: i32 = 0x76_7007;
pub const VM_INJECT_EXCEPTION: i32 = 0x76_7008;
pub const VM_SET_CAPABILITY: i32 = 0x76_7009;
pub const VM_GET_CAPABILITY: i32 = 0x76_700a;
pub const VM_SET_X2APIC_STATE: i32 = 0x76_700d;
pub const VM_GLA2GPA: i32 = 0x76_700e;
pub const VM_GLA2GPA_NOFAULT: i32 = 0x76_700f;
pub const VM_ACTIVATE_CPU: i32 = 0x76_7010;
pub const VM_SET_INTINFO: i32 = 0x76_7011;
pub const VM_GET_INTINFO: i32 = 0x76_7012;
pub const VM_RESTART_INSTRUCTION: i32 = 0x76_7013;
pub const VM_SET_KERNEMU_DEV: i32 = 0x76_7014;
pub const VM_GET_KERNEMU_DEV: i32 = 0x76_7015;
pub const VM_RESET_CPU: i32 = 0x76_7016;
pub const VM_GET_RUN_STATE: i32 = 0x76_7017;
pub const VM_SET_RUN_STATE: i32 = 0x76_7018;
pub const VM_GET_FPU: i32 = 0x76_7019;
pub const VM_SET_FPU: i32 = 0x76_701a;
pub const VM_GET_CPUID: i32 = 0x76_701b;
pub const VM_SET_CPUID: i32 = 0x76_701c;
pub const VM_LEGACY_CPUID: i32 = 0x76_701d;
// Freezes all vCPUs.
pub const VM_REINIT: i32 = 0x76_6c01;
pub const VM_ALLOC_MEMSEG: i32 = 0x76_6c05;
pub const VM_MMAP_MEMSEG: i32 = 0x76_6c06;
pub const VM_PMTMR_LOCATE: i32 = 0x76_6c07;
pub const VM_MUNMAP_MEMSEG: i32 = 0x76_6c08;
pub const VM_PAUSE: i32 = 0x76_6c0a;
pub const VM_RESUME: i32 = 0x76_6c0b;
// On an instance.
pub const VM_GET_MEMSEG: i32 = 0x76_6d02;
pub const VM_MMAP_GETNEXT: i32 = 0x76_6d03;
pub const VM_LAPIC_IRQ: i32 = 0x76_6d04;
pub const VM_LAPIC_LOCAL_IRQ: i32 = 0x76_6d05;
pub const VM_LAPIC_MSI: i32 = 0x76_6d06;
pub const VM_IOAPIC_ASSERT_IRQ: i32 = 0x76_6d07;
pub const VM_IOAPIC_DEASSERT_IRQ: i32 = 0x76_6d08;
pub const VM_IOAPIC_PULSE_IRQ: i32 = 0x76_6d09;
pub const VM_ISA_ASSERT_IRQ: i32 = 0x76_6d0a;
pub const VM_ISA_DEASSERT_IRQ: i32 = 0x76_6d0b;
pub const VM_ISA_PULSE_IRQ: i32 = 0x76_6d0c;
pub const VM_ISA_SET_IRQ_TRIGGER: i32 = 0x76_6d0d;
pub const VM_RTC_WRITE: i32 = 0x76_6d0e;
pub const VM_RTC_READ: i32 = 0x76_6d0f;
pub const VM_RTC_SETTIME: i32 = 0x76_6d10;
pub const VM_RTC_GETTIME: i32 = 0x76_6d11;
pub const VM_SUSPEND: i32 = 0x76_6d12;
pub const VM_IOAPIC_PINCOUNT: i32 = 0x76_6d13;
pub const VM_GET_HPET_CAPABILITIES: i32 = 0x76_6d15;
pub const VM_STATS_IOC: i32 = 0x76_6d16;
pub const VM_STAT_DESC: i32 = 0x76_6d17;
pub const VM_INJECT_NMI: i32 = 0x76_6d18;
pub const VM_GET_X2APIC_STATE: i32 = 0x76_6d19;
pub const VM_SET_TOPOLOGY: i32 = 0x76_6d1a;
pub const VM_GET_TOPOLOGY: i32 = 0x76_6d1b;
pub const VM_GET_CPUS: i32 = 0x76_6d1c;
pub const VM_SUSPEND_CPU: i32 = 0x76_6d1d;
pub const VM_RESUME_CPU: i32 = 0x76_6d1e;
pub const VM_TRACK_DIRTY_PAGES: i32 = 0x76_6d20;
pub const VM_DESC_FPU_AREA: i32 = 0x76_6d21;
pub const VM_DATA_READ: i32 = 0x76_6d22;
pub const VM_DATA_WRITE: i32 = 0x76_6d23;
pub const VM_SET_AUTODESTRUCT: i32 = 0x76_6d24;
pub const VM_DESTROY_SELF: i32 = 0x76_6d25;
pub const VM_DESTROY_PENDING: i32 = 0x76_6d26;
pub const VM_VCPU_BARRIER: i32 = 0x76_6d27;
pub const VM_NPT_OPERATION: i32 = 0x76_6d28;
pub const VM_DEVMEM_GETOFFSET: i32 = 0x76_6dff;

// `vm_create_req.flags`.
pub const VCF_RESERVOIR_MEM: u64 = 1;
pub const VCF_TRACK_DIRTY: u64 = 2;

// Protections of mappings.
pub const PROT_READ: i32 = 1;
pub const PROT_WRITE: i32 = 2;
pub const PROT_EXEC: i32 = 4;

/// Guest physical addresses end here at the latest, and offsets of segments begin.
pub const DEVMEM_START: u64 = 0x4000_0000_0000;
/// Segments of one VM, and mappings.
pub const SEGMENTS_MAX: usize = 5;
pub const MAPPINGS_MAX: usize = 8;
/// Pins of the I/O APIC.
pub const IOAPIC_PINS: u32 = 32;

// `vm_entry.cmd`.
pub const VEC_DEFAULT: u32 = 0;
pub const VEC_DISCARD_INSTR: u32 = 1;
pub const VEC_FULFILL_MMIO: u32 = 2;
pub const VEC_FULFILL_INOUT: u32 = 3;
pub const VEC_FLAG_EXIT_CONSISTENT: u32 = 1 << 31;

// `vm_exit.exitcode`.
pub const EXITCODE_INOUT: i32 = 0;
pub const EXITCODE_VMX: i32 = 1;
pub const EXITCODE_BOGUS: i32 = 2;
pub const EXITCODE_RDMSR: i32 = 3;
pub const EXITCODE_WRMSR: i32 = 4;
pub const EXITCODE_HLT: i32 = 5;
pub const EXITCODE_MTRAP: i32 = 6;
pub const EXITCODE_PAUSE: i32 = 7;
pub const EXITCODE_PAGING: i32 = 8;
pub const EXITCODE_INST_EMUL: i32 = 9;
pub const EXITCODE_RUN_STATE: i32 = 10;
pub const EXITCODE_MMIO_EMUL: i32 = 11;
pub const EXITCODE_DEPRECATED: i32 = 12;
pub const EXITCODE_IOAPIC_EOI: i32 = 13;
pub const EXITCODE_SUSPENDED: i32 = 14;
pub const EXITCODE_MMIO: i32 = 15;
pub const EXITCODE_TASK_SWITCH: i32 = 16;
pub const EXITCODE_MONITOR: i32 = 17;
pub const EXITCODE_MWAIT: i32 = 18;
pub const EXITCODE_SVM: i32 = 19;
pub const EXITCODE_DEPRECATED2: i32 = 20;
pub const EXITCODE_DEBUG: i32 = 21;
pub const EXITCODE_VMINSN: i32 = 22;
pub const EXITCODE_BPT: i32 = 23;
pub const EXITCODE_HT: i32 = 24;

/// `vm_inout.flags`: a read.
pub const INOUT_IN: u8 = 1;

// `vm_suspend.how`.
pub const VM_SUSPEND_NONE: i32 = 0;
pub const VM_SUSPEND_RESET: i32 = 1;
pub const VM_SUSPEND_POWEROFF: i32 = 2;
pub const VM_SUSPEND_HALT: i32 = 3;
pub const VM_SUSPEND_TRIPLEFAULT: i32 = 4;

// `vm_vcpu_reset.kind`.
pub const VRK_RESET: u32 = 0;
pub const VRK_INIT: u32 = 1;

// `vm_run_state.state`.
pub const VRS_HALT: u32 = 0;
pub const VRS_INIT: u32 = 1;
pub const VRS_RUN: u32 = 2;
pub const VRS_PEND_INIT: u32 = 0x4000;
pub const VRS_PEND_SIPI: u32 = 0x8000;

// `vm_capability.captype`.
pub const VM_CAP_HALT_EXIT: i32 = 0;

// `vm_x2apic.state`.
pub const X2APIC_DISABLED: i32 = 0;
pub const X2APIC_ENABLED: i32 = 1;

// `vm_vcpu_cpuid_config.flags`, and its entries'.
pub const VCC_FLAG_LEGACY_HANDLING: u32 = 1;
pub const VCC_FLAG_INTEL_FALLBACK: u32 = 2;
pub const VCE_FLAG_MATCH_INDEX: u32 = 1;
/// Entries that a table can have.
pub const CPUID_ENTRIES_MAX: usize = 256;

/// `vm_reinit.flags`: before version 16, also while not all vCPUs are suspended.
pub const VM_REINIT_F_FORCE_SUSPEND: u64 = 1;

// `vm_cpuset.which`.
pub const VM_ACTIVE_CPUS: i32 = 0;
pub const VM_DEBUG_CPUS: i32 = 2;

// `vm_npt_operation.operation`.
pub const VNO_OP_RESET_DIRTY: u32 = 1;
pub const VNO_OP_SET_DIRTY: u32 = 2;
pub const VNO_OP_GET_DIRTY: u32 = 3;
pub const VNO_OP_GET_TRACK_DIRTY: u32 = 0x20;
pub const VNO_OP_EN_TRACK_DIRTY: u32 = 0x21;
pub const VNO_OP_DIS_TRACK_DIRTY: u32 = 0x22;
pub const VNO_FLAG_BITMAP_IN: u32 = 1 << 30;
pub const VNO_FLAG_BITMAP_OUT: u32 = 1 << 31;

// `vm_register.regnum`. Of descriptor tables and hidden parts of segments, `vm_seg_desc.regnum`.
pub const VM_REG_GUEST_RAX: i32 = 0;
pub const VM_REG_GUEST_RBX: i32 = 1;
pub const VM_REG_GUEST_RCX: i32 = 2;
pub const VM_REG_GUEST_RDX: i32 = 3;
pub const VM_REG_GUEST_RSI: i32 = 4;
pub const VM_REG_GUEST_RDI: i32 = 5;
pub const VM_REG_GUEST_RBP: i32 = 6;
pub const VM_REG_GUEST_R8: i32 = 7;
pub const VM_REG_GUEST_R9: i32 = 8;
pub const VM_REG_GUEST_R10: i32 = 9;
pub const VM_REG_GUEST_R11: i32 = 10;
pub const VM_REG_GUEST_R12: i32 = 11;
pub const VM_REG_GUEST_R13: i32 = 12;
pub const VM_REG_GUEST_R14: i32 = 13;
pub const VM_REG_GUEST_R15: i32 = 14;
pub const VM_REG_GUEST_CR0: i32 = 15;
pub const VM_REG_GUEST_CR3: i32 = 16;
pub const VM_REG_GUEST_CR4: i32 = 17;
pub const VM_REG_GUEST_DR7: i32 = 18;
pub const VM_REG_GUEST_RSP: i32 = 19;
pub const VM_REG_GUEST_RIP: i32 = 20;
pub const VM_REG_GUEST_RFLAGS: i32 = 21;
pub const VM_REG_GUEST_ES: i32 = 22;
pub const VM_REG_GUEST_CS: i32 = 23;
pub const VM_REG_GUEST_SS: i32 = 24;
pub const VM_REG_GUEST_DS: i32 = 25;
pub const VM_REG_GUEST_FS: i32 = 26;
pub const VM_REG_GUEST_GS: i32 = 27;
pub const VM_REG_GUEST_LDTR: i32 = 28;
pub const VM_REG_GUEST_TR: i32 = 29;
pub const VM_REG_GUEST_IDTR: i32 = 30;
pub const VM_REG_GUEST_GDTR: i32 = 31;
pub const VM_REG_GUEST_EFER: i32 = 32;
pub const VM_REG_GUEST_CR2: i32 = 33;
pub const VM_REG_GUEST_PDPTE0: i32 = 34;
pub const VM_REG_GUEST_PDPTE1: i32 = 35;
pub const VM_REG_GUEST_PDPTE2: i32 = 36;
pub const VM_REG_GUEST_PDPTE3: i32 = 37;
pub const VM_REG_GUEST_INTR_SHADOW: i32 = 38;
pub const VM_REG_GUEST_DR0: i32 = 39;
pub const VM_REG_GUEST_DR1: i32 = 40;
pub const VM_REG_GUEST_DR2: i32 = 41;
pub const VM_REG_GUEST_DR3: i32 = 42;
pub const VM_REG_GUEST_DR6: i32 = 43;
pub const VM_REG_GUEST_ENTRY_INST_LENGTH: i32 = 44;
pub const VM_REG_GUEST_XCR0: i32 = 45;

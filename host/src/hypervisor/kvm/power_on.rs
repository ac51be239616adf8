//! The state in which KVM's chips and CPUs come out of a power-on reset, for a restart inside the same VM.
#![allow(unsafe_code)] // reads unions that an ioctl filled, and sets the extended CPU state

use std::ops::RangeInclusive;

use anyhow::{Context, Result};
use kvm_bindings::*;
use kvm_ioctls::{VcpuFd, VmFd};

/// Masked redirection entry of the 82093AA I/O APIC (its datasheet, section 3.2.4).
const REDIRECTION_MASKED: u64 = 1 << 16;
const IOAPIC_BASE: u64 = 0xfec0_0000;

/// Puts the 8259 pair, the I/O APIC and the PIT into power-on state.
pub fn reset_chips(vm: &VmFd) -> Result<()> {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)
            .context("KVM does not tell the 8259's state")?;
        // SAFETY: for these two chips the ioctl fills and takes this field.
        unsafe {
            // Which lines may be level-triggered is wired, not state.
            let elcr_mask = chip.chip.pic.elcr_mask;
            chip.chip.pic = kvm_pic_state {
                elcr_mask,
                ..Default::default()
            };
        }
        vm.set_irqchip(&chip)
            .context("KVM refused the 8259's power-on state")?;
    }
    let mut ioapic = kvm_ioapic_state {
        base_address: IOAPIC_BASE,
        ..Default::default()
    };
    for entry in &mut ioapic.redirtbl {
        entry.bits = REDIRECTION_MASKED;
    }
    let chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        chip: kvm_irqchip__bindgen_ty_1 { ioapic },
        ..Default::default()
    };
    vm.set_irqchip(&chip)
        .context("KVM refused the I/O APIC's power-on state")?;
    let mut pit = kvm_pit_state2::default();
    for (number, channel) in pit.channels.iter_mut().enumerate() {
        // As KVM's own reset has it: no mode programmed, and the speaker's gate closed.
        channel.mode = 0xff;
        channel.gate = u8::from(number != 2);
    }
    vm.set_pit2(&pit)
        .context("KVM refused the PIT's power-on state")
}

/// Sets the 8259s' edge/level control registers: bit n of `irqs` makes input n a level.
pub fn set_trigger_modes(vm: &VmFd, irqs: u16) -> Result<()> {
    let [master, slave] = irqs.to_le_bytes();
    for (chip_id, level) in [
        (KVM_IRQCHIP_PIC_MASTER, master),
        (KVM_IRQCHIP_PIC_SLAVE, slave),
    ] {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)
            .context("KVM does not tell the 8259's state")?;
        // SAFETY: for these two chips the ioctl fills and takes this field.
        unsafe {
            chip.chip.pic.elcr = level & chip.chip.pic.elcr_mask;
        }
        vm.set_irqchip(&chip)
            .context("KVM refused the 8259's trigger modes")?;
    }
    Ok(())
}

/// What KVM gave a new vCPU, kept to be given back.
#[derive(Debug)]
pub struct PowerOn {
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    bootstrap: bool,
}

/// Model-specific registers that outlive nothing but a reset (Intel SDM volume 3, table 10-1), and KVM's own, which
/// would otherwise go on writing into guest memory.
const MSRS: &[(u32, u64)] = &[
    (0x10, 0),                      // IA32_TIME_STAMP_COUNTER
    (0x48, 0),                      // IA32_SPEC_CTRL
    (0x174, 0),                     // IA32_SYSENTER_CS
    (0x175, 0),                     // IA32_SYSENTER_ESP
    (0x176, 0),                     // IA32_SYSENTER_EIP
    (0x1a0, 1),                     // IA32_MISC_ENABLE: fast strings
    (0x1d9, 0),                     // IA32_DEBUGCTL
    (0x277, 0x0007_0406_0007_0406), // IA32_PAT
    (0x2ff, 0),                     // IA32_MTRR_DEF_TYPE
    (0x6e0, 0),                     // IA32_TSC_DEADLINE
    (0xda0, 0),                     // IA32_XSS
    (0xc000_0081, 0),               // STAR
    (0xc000_0082, 0),               // LSTAR
    (0xc000_0083, 0),               // CSTAR
    (0xc000_0084, 0),               // SFMASK
    (0xc000_0102, 0),               // KERNEL_GS_BASE
    (0xc000_0103, 0),               // TSC_AUX
    (0x4b56_4d00, 0),               // MSR_KVM_WALL_CLOCK_NEW
    (0x4b56_4d01, 0),               // MSR_KVM_SYSTEM_TIME_NEW
    (0x11, 0),                      // MSR_KVM_WALL_CLOCK
    (0x12, 0),                      // MSR_KVM_SYSTEM_TIME
    (0x4b56_4d02, 0),               // MSR_KVM_ASYNC_PF_EN
    (0x4b56_4d03, 0),               // MSR_KVM_STEAL_TIME
    (0x4b56_4d04, 0),               // MSR_KVM_PV_EOI_EN
    (0x4b56_4d05, 1),               // MSR_KVM_POLL_CONTROL
];

/// IA32_MTRR_PHYSBASE0 to IA32_MTRR_PHYSMASK7, and the fixed ranges of 64, 16 and 4 KiB (Intel SDM volume 4, table 2-2).
const VARIABLE_MTRRS: RangeInclusive<u32> = 0x200..=0x20f;
const FIXED_MTRRS: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];

impl PowerOn {
    /// Remembers a vCPU that has not run yet.
    pub fn of(vcpu: &VcpuFd, bootstrap: bool) -> Result<Self> {
        Ok(Self {
            sregs: vcpu.get_sregs()?,
            lapic: vcpu.get_lapic()?,
            bootstrap,
        })
    }

    /// Makes `vcpu` as it was then.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<()> {
        let mp_state = if self.bootstrap {
            KVM_MP_STATE_RUNNABLE
        } else {
            KVM_MP_STATE_UNINITIALIZED
        };
        vcpu.set_mp_state(kvm_mp_state { mp_state })
            .context("KVM refused the vCPU's run state")?;
        vcpu.set_sregs(&self.sregs)
            .context("KVM refused the power-on control registers")?;
        // Bit 1 of RFLAGS is always set; the reset vector is 16 bytes below the end of the code segment.
        let regs = kvm_regs {
            rip: 0xfff0,
            rflags: 2,
            rdx: 0x600,
            ..Default::default()
        };
        vcpu.set_regs(&regs)
            .context("KVM refused the power-on registers")?;
        reset_fpu(vcpu)?;
        let debug = kvm_debugregs {
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            ..Default::default()
        };
        vcpu.set_debug_regs(&debug)
            .context("KVM refused the power-on debug registers")?;
        // Memory types go with IA32_MTRR_DEF_TYPE; one call each, because a CPU may have fewer of them.
        let memory_types = VARIABLE_MTRRS.chain(FIXED_MTRRS).map(|index| (index, 0));
        for (index, data) in MSRS.iter().copied().chain(memory_types) {
            set_msr_if_known(vcpu, index, data)?;
        }
        vcpu.set_lapic(&self.lapic)
            .context("KVM refused the local APIC's power-on state")?;
        let flags = KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | KVM_VCPUEVENT_VALID_SHADOW;
        vcpu.set_vcpu_events(&kvm_vcpu_events {
            flags,
            ..Default::default()
        })
        .context("KVM refused to drop pending events")
    }
}

fn reset_fpu(vcpu: &VcpuFd) -> Result<()> {
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = 1;
    // A machine without XSAVE has no XCR0 to reset.
    let has_xsave = vcpu.set_xcrs(&xcrs).is_ok();
    if !has_xsave {
        let fpu = kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..Default::default()
        };
        return vcpu
            .set_fpu(&fpu)
            .context("KVM refused the power-on FPU state");
    }
    // XSAVE area (Intel SDM volume 1, section 13.4): FCW at byte 0, MXCSR at 24, XSTATE_BV at 512. Components that it
    // leaves out take their initial state.
    let mut xsave = kvm_xsave::default();
    xsave.region[0] = 0x37f;
    xsave.region[6] = 0x1f80;
    xsave.region[128] = 3;
    // SAFETY: KVM reads more than a kvm_xsave only from guests with dynamic features (AMX), which have to be asked for
    // by arch_prctl, and this host does not.
    unsafe { vcpu.set_xsave(&xsave) }.context("KVM refused the power-on FPU state")
}

fn set_msr_if_known(vcpu: &VcpuFd, index: u32, data: u64) -> Result<()> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    if let Ok(msrs) = Msrs::from_entries(&[entry]) {
        // 0 of 1 set: this CPU or KVM doesn't have it.
        vcpu.set_msrs(&msrs)
            .with_context(|| format!("KVM refused to set MSR {index:#x}"))?;
    }
    Ok(())
}

//! Run states, and what power-on and INIT make of a vCPU (`VM_RESET_CPU`).
#![allow(unsafe_code)] // sets the FPU's state

use std::io;
use std::sync::atomic::Ordering;

use kvm_bindings::*;
use vmm_host::hypervisor::bhyve::abi::*;

use crate::machine::Machine;
use crate::suspend;
use crate::vcpu::Cpu;

/// Registers that power-on resets, each with its value (Intel SDM volume 3, table 10-1), but for the TSC, which goes on.
const MSRS: [(u32, u64); 12] = [
    (0x174, 0),
    (0x175, 0),
    (0x176, 0),
    (0x277, 0x0007_0406_0007_0406),
    (0x2ff, 0),
    (0x6e0, 0),
    (0xc000_0081, 0),
    (0xc000_0082, 0),
    (0xc000_0083, 0),
    (0xc000_0084, 0),
    (0xc000_0102, 0),
    (0xc000_0103, 0),
];

impl Machine {
    pub fn activate(&self, id: i32) -> io::Result<()> {
        if crate::lock(&self.suspension).is_some() {
            return Err(self.misuse(
                libc::EBUSY,
                "a vCPU becomes active while the VM is suspended",
            ));
        }
        match self.vcpu(id)?.active.swap(true, Ordering::SeqCst) {
            true => Err(self.misuse(libc::EBUSY, &format!("vCPU {id} is active already"))),
            false => Ok(()),
        }
    }

    pub fn reset_vcpu(&self, request: &VmVcpuReset) -> io::Result<()> {
        let full = match request.kind {
            VRK_RESET => true,
            VRK_INIT => false,
            other => return Err(self.misuse(libc::EINVAL, &format!("reset of kind {other}"))),
        };
        let vcpu = self.vcpu(request.vcpuid)?;
        let (mut cpu, _turn) = vcpu.freeze();
        vcpu.settle(&mut cpu)?;
        cpu.access = None;
        reset(&mut cpu, full)
    }

    pub fn get_run_state(&self, request: &mut VmRunState) -> io::Result<()> {
        let (state, sipi) = self.with(request.vcpuid, |cpu| {
            Ok((cpu.fd.get_mp_state()?.mp_state, cpu.fd.get_vcpu_events()?))
        })?;
        request.state = match state {
            KVM_MP_STATE_UNINITIALIZED => VRS_HALT,
            KVM_MP_STATE_INIT_RECEIVED => VRS_INIT,
            KVM_MP_STATE_SIPI_RECEIVED => VRS_INIT | VRS_PEND_SIPI,
            _ => VRS_RUN,
        };
        request.sipi_vector = sipi.sipi_vector as u8;
        Ok(())
    }

    pub fn set_run_state(&self, request: &VmRunState) -> io::Result<()> {
        // The kernel's check names VRS_PEND_SIPI twice, and VRS_PEND_INIT not at all.
        let mp_state = match request.state {
            VRS_HALT => KVM_MP_STATE_UNINITIALIZED,
            VRS_INIT => KVM_MP_STATE_INIT_RECEIVED,
            VRS_RUN => KVM_MP_STATE_RUNNABLE,
            state if state == VRS_INIT | VRS_PEND_SIPI => KVM_MP_STATE_SIPI_RECEIVED,
            state if state == VRS_RUN | VRS_PEND_SIPI => KVM_MP_STATE_RUNNABLE,
            other => return Err(self.misuse(libc::EINVAL, &format!("run state {other:#x}"))),
        };
        self.with(request.vcpuid, |cpu| {
            let mut events = cpu.fd.get_vcpu_events()?;
            events.flags = KVM_VCPUEVENT_VALID_SIPI_VECTOR;
            events.sipi_vector = request.sipi_vector.into();
            cpu.fd.set_vcpu_events(&events)?;
            Ok(cpu.fd.set_mp_state(kvm_mp_state { mp_state })?)
        })
    }

    /// As `VM_REINIT` leaves all vCPUs.
    pub fn deactivate_all(&self) -> io::Result<()> {
        for vcpu in self.vcpus() {
            let (mut cpu, _turn) = vcpu.freeze();
            vcpu.settle(&mut cpu)?;
            cpu.access = None;
            cpu.x2apic = false;
            reset(&mut cpu, true)?;
            suspend::park(&cpu.fd)?;
            vcpu.active.store(false, Ordering::SeqCst);
        }
        Ok(())
    }
}

fn reset(cpu: &mut Cpu, full: bool) -> io::Result<()> {
    let fd = &cpu.fd;
    let mut sregs = cpu.power_on;
    if !full {
        sregs.apic_base = fd.get_sregs()?.apic_base;
    }
    cpu.staged = None;
    fd.set_sregs(&sregs)?;
    fd.set_regs(&kvm_regs {
        rip: 0xfff0,
        rflags: 2,
        rdx: 0x600,
        ..Default::default()
    })?;
    fd.set_debug_regs(&kvm_debugregs {
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        ..Default::default()
    })?;
    fd.set_lapic(&cpu.lapic)?;
    fd.set_vcpu_events(&kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    })?;
    if !full {
        return Ok(());
    }
    for (index, data) in MSRS {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        if let Ok(msrs) = Msrs::from_entries(&[entry]) {
            // Not each KVM has each.
            fd.set_msrs(&msrs)?;
        }
    }
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = 1;
    if fd.set_xcrs(&xcrs).is_err() {
        // A machine without XSAVE.
        return Ok(fd.set_fpu(&kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..Default::default()
        })?);
    }
    // FCW at byte 0, MXCSR at 24, XSTATE_BV at 512 (Intel SDM volume 1, section 13.4).
    let mut xsave = kvm_xsave::default();
    (xsave.region[0], xsave.region[6], xsave.region[128]) = (0x37f, 0x1f80, 3);
    // SAFETY: KVM reads more than a kvm_xsave only where a process asked for dynamic features.
    Ok(unsafe { fd.set_xsave(&xsave) }?)
}

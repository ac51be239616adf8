//! `VM_RUN`: into the guest by `KVM_RUN`, and out of it as the vmm driver comes out.
//!
//! `vm_exit.rip` is told where an instruction is to be looked at: of accesses the driver tells it too, and here it is 0.

use std::io;
use std::sync::atomic::Ordering;

use vmm_host::hypervisor::bhyve::abi::*;

use crate::access::Access;
use crate::exits::{self, Left};
use crate::machine::Machine;
use crate::rom_write::{self, Written};
use crate::vcpu::{Cpu, Vcpu};
use crate::{errno, lock};

impl Machine {
    pub fn run(&self, entry: &VmEntry) -> io::Result<VmExit> {
        let vcpu = self.vcpu(entry.cpuid)?;
        if !vcpu.active.load(Ordering::SeqCst) {
            let what = format!("vCPU {} runs before it is active", entry.cpuid);
            return Err(self.misuse(libc::EINVAL, &what));
        }
        let mut cpu = vcpu.hold();
        self.complete(&mut cpu, entry)?;
        let consistent = entry.cmd & VEC_FLAG_EXIT_CONSISTENT != 0;
        loop {
            if self.destroyed.load(Ordering::SeqCst) {
                return Err(errno(libc::ENXIO));
            }
            if self.paused.load(Ordering::SeqCst) {
                return Err(self.misuse(libc::EBUSY, "a vCPU runs while the VM is paused"));
            }
            if let Some(suspended) = *lock(&self.suspension) {
                return Ok(exit(EXITCODE_SUSPENDED, ExitPayload { suspended }));
            }
            if vcpu.held.load(Ordering::SeqCst) {
                return Ok(plain(EXITCODE_DEBUG));
            }
            let Cpu { access, fd, .. } = &mut *cpu;
            if let Some(access) = access {
                return Ok(access.exit(fd.get_kvm_run()));
            }
            if consistent && !cpu.unsettled {
                return Ok(plain(EXITCODE_BOGUS));
            }
            cpu.flush()?;
            if let Some(exit) = self.enter(vcpu, &mut cpu, consistent)? {
                return Ok(exit);
            }
        }
    }

    /// Takes what completes an access. Without it, the access is told again.
    fn complete(&self, cpu: &mut Cpu, entry: &VmEntry) -> io::Result<()> {
        let refuse = |what: &str| Err(self.misuse(libc::EINVAL, &format!("VM_RUN: {what}")));
        let command = entry.cmd & !VEC_FLAG_EXIT_CONSISTENT;
        match (command, cpu.access.take()) {
            (VEC_DEFAULT, access) => cpu.access = access,
            (VEC_FULFILL_INOUT | VEC_FULFILL_MMIO, Some(access)) => {
                let Some(left) = access.fulfil(cpu.fd.get_kvm_run(), entry) else {
                    cpu.access = Some(access);
                    return refuse("completes another access than the one of the exit");
                };
                cpu.access = left;
            }
            (VEC_FULFILL_INOUT | VEC_FULFILL_MMIO, None) => {
                return refuse("completes an access that there is not");
            }
            (command, access) => {
                cpu.access = access;
                return refuse(&format!("command {command}, which no host needs"));
            }
        }
        Ok(())
    }

    /// One `KVM_RUN`. `None`: nothing that the driver would come out for.
    fn enter(&self, vcpu: &Vcpu, cpu: &mut Cpu, consistent: bool) -> io::Result<Option<VmExit>> {
        if consistent {
            vcpu.kick.only_complete();
        }
        let entered = vcpu.enter(cpu);
        if consistent {
            vcpu.kick.take();
        }
        match entered.as_ref().map_err(io::Error::raw_os_error) {
            Ok(()) => vcpu.halted.store(false, Ordering::SeqCst),
            Err(Some(libc::EINTR)) => {
                vcpu.kick.take();
                self.look_at_halt(vcpu, cpu);
                return Ok(Some(plain(EXITCODE_BOGUS)));
            }
            // A CPU that waited for its SIPI has just got it.
            Err(Some(libc::EAGAIN)) => return Ok(None),
            Err(_) => return entered.map(|()| None),
        }
        match exits::left(cpu.fd.get_kvm_run()) {
            Left::Access(access) => self.access(vcpu, cpu, access),
            Left::Msr(code, msr) => {
                // The driver is past the instruction, and the host sets the registers of a read.
                vcpu.settle(cpu)?;
                Ok(Some(exit(code, ExitPayload { msr })))
            }
            Left::Shutdown => {
                self.suspend(VM_SUSPEND_TRIPLEFAULT, cpu.id);
                Ok(None)
            }
            Left::Nothing => Ok(Some(plain(EXITCODE_BOGUS))),
            Left::Failure(code, payload) => {
                let rip = cpu.fd.get_regs()?.rip;
                let exit = exit(code, payload);
                Ok(Some(VmExit { rip, ..exit }))
            }
        }
    }

    fn access(&self, vcpu: &Vcpu, cpu: &mut Cpu, access: Access) -> io::Result<Option<VmExit>> {
        cpu.unsettled = true;
        if let Some(gpa) = access.written().filter(|gpa| self.is_rom(*gpa)) {
            let run = cpu.fd.get_kvm_run();
            let written = Written {
                width: access.width(),
                value: access.value(run),
            };
            vcpu.settle(cpu)?;
            let Some(rip) = rom_write::rewind(self, cpu, &written)? else {
                let what = format!("a guest writes to the ROM at {gpa:#x} by what is no MOV");
                return Err(self.misuse(libc::ENOTSUP, &what));
            };
            let fault_type = PROT_WRITE;
            let paging = VmExitPaging { gpa, fault_type };
            let exit = exit(EXITCODE_PAGING, ExitPayload { paging });
            return Ok(Some(VmExit { rip, ..exit }));
        }
        let read = |index| self.clock_register_read(index);
        if self.clocks.serve(&access, cpu.fd.get_kvm_run(), read) {
            return Ok(None);
        }
        cpu.access = Some(access);
        Ok(None)
    }
}

fn plain(exitcode: i32) -> VmExit {
    VmExit {
        exitcode,
        ..Default::default()
    }
}

fn exit(exitcode: i32, u: ExitPayload) -> VmExit {
    VmExit {
        exitcode,
        u,
        ..Default::default()
    }
}

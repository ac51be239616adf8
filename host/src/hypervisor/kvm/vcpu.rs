//! One KVM vCPU: its run loop and its registers.
#![allow(unsafe_code)] // passes the run page that KVM filled to its reader

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use kvm_bindings::{
    CpuId, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, Msrs,
    kvm_cpuid_entry2, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::VcpuFd;

use super::exits;
use super::kick::KvmKick;
use super::power_on::PowerOn;
use crate::hypervisor::msr::UnknownMsrs;
use crate::hypervisor::{DescriptorTable, Exit, ExitHandler, Kick, Registers, Segment, Vcpu};
use crate::memory::GuestMemory;

const RFLAGS_IF: u64 = 1 << 9;

/// A virtual CPU of a KVM VM.
#[derive(Debug)]
pub struct KvmVcpu {
    fd: VcpuFd,
    kick: Arc<KvmKick>,
    power_on: Box<PowerOn>,
    msrs: Arc<UnknownMsrs>,
    // The guest runs in this memory: it must stay mapped as long as the vCPU can run.
    _memory: Arc<GuestMemory>,
}

impl KvmVcpu {
    /// `boots`: the bootstrap CPU.
    pub(super) fn new(
        fd: VcpuFd,
        boots: bool,
        cpuid: &[kvm_cpuid_entry2],
        (memory, msrs): (Arc<GuestMemory>, Arc<UnknownMsrs>),
    ) -> Result<Self> {
        let cpuid =
            CpuId::from_entries(cpuid).map_err(|error| anyhow!("CPUID table: {error:?}"))?;
        fd.set_cpuid2(&cpuid)
            .context("KVM refused the CPUID table: it takes 48 or 57 as the width of virtual addresses (leaf 80000008), and only \
                 XSAVE features that this CPU has (leaf d)")?;
        let kick = Arc::new(KvmKick::new(&fd)?);
        let power_on =
            Box::new(PowerOn::of(&fd, boots).context("KVM does not tell the power-on state")?);
        Ok(Self {
            fd,
            kick,
            power_on,
            msrs,
            _memory: memory,
        })
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kick.abandon();
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, handler: &mut dyn ExitHandler) -> Result<Exit> {
        self.kick.adopt();
        loop {
            match self.fd.run() {
                Ok(_) => {}
                Err(error) => match error.errno() {
                    libc::EINTR => {
                        self.kick.take();
                        return Ok(Exit::Kicked);
                    }
                    // A CPU that waited for its SIPI has just got it.
                    libc::EAGAIN => continue,
                    _ => return Ok(Exit::Crash(run_error(error))),
                },
            }
            self.kick.count();
            let run = self.fd.get_kvm_run();
            // SAFETY: this is the vCPU's run area, mapped whole, and KVM_RUN has just returned 0.
            if let Some(exit) = unsafe { exits::dispatch(run, handler, &self.msrs) } {
                return Ok(exit);
            }
        }
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as Arc<dyn Kick>
    }

    fn reset(&mut self) -> Result<()> {
        self.power_on.restore(&self.fd)
    }

    fn registers(&self) -> Result<Registers> {
        let r = self
            .fd
            .get_regs()
            .context("KVM does not tell the general registers")?;
        let s = self
            .fd
            .get_sregs()
            .context("KVM does not tell the control registers")?;
        Ok(Registers {
            rax: r.rax,
            rbx: r.rbx,
            rcx: r.rcx,
            rdx: r.rdx,
            rsi: r.rsi,
            rdi: r.rdi,
            rsp: r.rsp,
            rbp: r.rbp,
            r8: r.r8,
            r9: r.r9,
            r10: r.r10,
            r11: r.r11,
            r12: r.r12,
            r13: r.r13,
            r14: r.r14,
            r15: r.r15,
            rip: r.rip,
            rflags: r.rflags,
            cs: from_kvm(&s.cs),
            ds: from_kvm(&s.ds),
            es: from_kvm(&s.es),
            fs: from_kvm(&s.fs),
            gs: from_kvm(&s.gs),
            ss: from_kvm(&s.ss),
            tr: from_kvm(&s.tr),
            ldt: from_kvm(&s.ldt),
            gdt: DescriptorTable {
                base: s.gdt.base,
                limit: s.gdt.limit,
            },
            idt: DescriptorTable {
                base: s.idt.base,
                limit: s.idt.limit,
            },
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            efer: s.efer,
        })
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<()> {
        let r = registers;
        let mut s = self
            .fd
            .get_sregs()
            .context("KVM does not tell the control registers")?;
        s.cs = to_kvm(&r.cs);
        s.ds = to_kvm(&r.ds);
        s.es = to_kvm(&r.es);
        s.fs = to_kvm(&r.fs);
        s.gs = to_kvm(&r.gs);
        s.ss = to_kvm(&r.ss);
        s.tr = to_kvm(&r.tr);
        s.ldt = to_kvm(&r.ldt);
        s.gdt = table_to_kvm(r.gdt);
        s.idt = table_to_kvm(r.idt);
        (s.cr0, s.cr2, s.cr3, s.cr4, s.efer) = (r.cr0, r.cr2, r.cr3, r.cr4, r.efer);
        self.fd
            .set_sregs(&s)
            .context("KVM refused the control registers")?;
        let general = kvm_regs {
            rax: r.rax,
            rbx: r.rbx,
            rcx: r.rcx,
            rdx: r.rdx,
            rsi: r.rsi,
            rdi: r.rdi,
            rsp: r.rsp,
            rbp: r.rbp,
            r8: r.r8,
            r9: r.r9,
            r10: r.r10,
            r11: r.r11,
            r12: r.r12,
            r13: r.r13,
            r14: r.r14,
            r15: r.r15,
            rip: r.rip,
            rflags: r.rflags,
        };
        self.fd
            .set_regs(&general)
            .context("KVM refused the general registers")
    }

    fn set_msrs(&mut self, values: &[(u32, u64)]) -> Result<()> {
        let entries: Vec<_> = values
            .iter()
            .map(|&(index, data)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|error| anyhow!("MSR table: {error:?}"))?;
        let set = self.fd.set_msrs(&msrs).context("KVM refused to set MSRs")?;
        if let Some((index, data)) = values.get(set) {
            bail!("KVM refused to set MSR {index:#x} to {data:#x}");
        }
        Ok(())
    }

    fn halted_for_good(&self) -> bool {
        match self.fd.get_mp_state().map(|state| state.mp_state) {
            Ok(KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED) => true,
            Ok(KVM_MP_STATE_HALTED) => self
                .fd
                .get_regs()
                .is_ok_and(|regs| regs.rflags & RFLAGS_IF == 0),
            _ => false,
        }
    }
}

fn run_error(error: kvm_ioctls::Error) -> String {
    match error.errno() {
        libc::EFAULT => {
            "KVM can't reach guest memory (EFAULT): the host is out of memory or huge pages".into()
        }
        libc::ENOMEM => "KVM is out of memory (ENOMEM)".into(),
        _ => format!("KVM_RUN failed: {error}"),
    }
}

fn table_to_kvm(table: DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: table.base,
        limit: table.limit,
        ..Default::default()
    }
}

fn from_kvm(segment: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u32::from(value) << at;
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        access: bit(segment.type_, 0)
            | bit(segment.s, 4)
            | bit(segment.dpl, 5)
            | bit(segment.present, 7)
            | bit(segment.avl, 12)
            | bit(segment.l, 13)
            | bit(segment.db, 14)
            | bit(segment.g, 15)
            | bit(segment.unusable, 16),
    }
}

fn to_kvm(segment: &Segment) -> kvm_segment {
    let bits = |at: u32, mask: u32| (segment.access >> at & mask) as u8;
    kvm_segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        type_: bits(0, 15),
        s: bits(4, 1),
        dpl: bits(5, 3),
        present: bits(7, 1),
        avl: bits(12, 1),
        l: bits(13, 1),
        db: bits(14, 1),
        g: bits(15, 1),
        unusable: bits(16, 1),
        ..Default::default()
    }
}

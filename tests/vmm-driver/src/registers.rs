//! Registers by the driver's numbers.

use std::io;

use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_xcrs};
use vmm_host::hypervisor::bhyve::abi::*;

use crate::machine::Machine;
use crate::vcpu::Cpu;

impl Cpu {
    pub fn sregs(&self) -> io::Result<kvm_sregs> {
        match self.staged {
            Some(staged) => Ok(staged),
            None => Ok(self.fd.get_sregs()?),
        }
    }

    /// Gives KVM what was staged.
    pub fn flush(&mut self) -> io::Result<()> {
        if let Some(sregs) = self.staged.take() {
            self.fd.set_sregs(&sregs)?;
        }
        Ok(())
    }
}

/// All registers that are a number, read once and written back if they changed.
struct File {
    general: kvm_regs,
    system: kvm_sregs,
    debug: kvm_debugregs,
    /// A machine without XSAVE has none.
    extended: Option<kvm_xcrs>,
}

impl File {
    fn of(cpu: &Cpu) -> io::Result<Self> {
        Ok(Self {
            general: cpu.fd.get_regs()?,
            system: cpu.sregs()?,
            debug: cpu.fd.get_debug_regs()?,
            extended: cpu.fd.get_xcrs().ok().filter(|xcrs| xcrs.nr_xcrs > 0),
        })
    }

    fn put(self, cpu: &mut Cpu) -> io::Result<()> {
        let before = Self::of(cpu)?;
        if self.general != before.general {
            cpu.fd.set_regs(&self.general)?;
        }
        if self.debug != before.debug {
            cpu.fd.set_debug_regs(&self.debug)?;
        }
        let xcr0 = |xcrs: &kvm_xcrs| xcrs.xcrs[0].value;
        if let Some(extended) = self.extended
            && before.extended.as_ref().map(xcr0) != Some(xcr0(&extended))
        {
            cpu.fd.set_xcrs(&extended)?;
        }
        cpu.staged = Some(self.system);
        Ok(())
    }

    fn number(&mut self, number: i32) -> Option<&mut u64> {
        let (r, s, d) = (&mut self.general, &mut self.system, &mut self.debug);
        Some(match number {
            VM_REG_GUEST_RAX => &mut r.rax,
            VM_REG_GUEST_RBX => &mut r.rbx,
            VM_REG_GUEST_RCX => &mut r.rcx,
            VM_REG_GUEST_RDX => &mut r.rdx,
            VM_REG_GUEST_RSI => &mut r.rsi,
            VM_REG_GUEST_RDI => &mut r.rdi,
            VM_REG_GUEST_RBP => &mut r.rbp,
            VM_REG_GUEST_RSP => &mut r.rsp,
            VM_REG_GUEST_R8 => &mut r.r8,
            VM_REG_GUEST_R9 => &mut r.r9,
            VM_REG_GUEST_R10 => &mut r.r10,
            VM_REG_GUEST_R11 => &mut r.r11,
            VM_REG_GUEST_R12 => &mut r.r12,
            VM_REG_GUEST_R13 => &mut r.r13,
            VM_REG_GUEST_R14 => &mut r.r14,
            VM_REG_GUEST_R15 => &mut r.r15,
            VM_REG_GUEST_RIP => &mut r.rip,
            VM_REG_GUEST_RFLAGS => &mut r.rflags,
            VM_REG_GUEST_CR0 => &mut s.cr0,
            VM_REG_GUEST_CR2 => &mut s.cr2,
            VM_REG_GUEST_CR3 => &mut s.cr3,
            VM_REG_GUEST_CR4 => &mut s.cr4,
            VM_REG_GUEST_EFER => &mut s.efer,
            VM_REG_GUEST_DR0 => &mut d.db[0],
            VM_REG_GUEST_DR1 => &mut d.db[1],
            VM_REG_GUEST_DR2 => &mut d.db[2],
            VM_REG_GUEST_DR3 => &mut d.db[3],
            VM_REG_GUEST_DR6 => &mut d.dr6,
            VM_REG_GUEST_DR7 => &mut d.dr7,
            VM_REG_GUEST_XCR0 => &mut self.extended.as_mut()?.xcrs[0].value,
            _ => return None,
        })
    }

    fn get(&mut self, number: i32) -> Option<u64> {
        if let Some(segment) = segment(&mut self.system, number) {
            return Some(segment.selector.into());
        }
        self.number(number).copied()
    }

    fn set(&mut self, number: i32, value: u64) -> Option<()> {
        if let Some(segment) = segment(&mut self.system, number) {
            segment.selector = u16::try_from(value).ok()?;
            return Some(());
        }
        *self.number(number)? = value;
        Some(())
    }
}

fn segment(s: &mut kvm_sregs, number: i32) -> Option<&mut kvm_segment> {
    Some(match number {
        VM_REG_GUEST_ES => &mut s.es,
        VM_REG_GUEST_CS => &mut s.cs,
        VM_REG_GUEST_SS => &mut s.ss,
        VM_REG_GUEST_DS => &mut s.ds,
        VM_REG_GUEST_FS => &mut s.fs,
        VM_REG_GUEST_GS => &mut s.gs,
        VM_REG_GUEST_LDTR => &mut s.ldt,
        VM_REG_GUEST_TR => &mut s.tr,
        _ => return None,
    })
}

fn table(s: &mut kvm_sregs, number: i32) -> Option<&mut kvm_dtable> {
    Some(match number {
        VM_REG_GUEST_GDTR => &mut s.gdt,
        VM_REG_GUEST_IDTR => &mut s.idt,
        _ => return None,
    })
}

impl Machine {
    fn no_register(&self, number: i32) -> io::Error {
        self.misuse(libc::EINVAL, &format!("there is no register {number} here"))
    }

    pub fn get_registers(&self, vcpu: i32, numbers: &[i32]) -> io::Result<Vec<u64>> {
        self.with(vcpu, |cpu| {
            let mut file = File::of(cpu)?;
            let mut numbers = numbers.iter();
            let get = |number: &i32| file.get(*number).ok_or_else(|| self.no_register(*number));
            numbers.by_ref().map(get).collect()
        })
    }

    pub fn set_registers(&self, vcpu: i32, numbers: &[i32], values: &[u64]) -> io::Result<()> {
        self.with(vcpu, |cpu| {
            let mut file = File::of(cpu)?;
            for (number, value) in numbers.iter().zip(values) {
                file.set(*number, *value)
                    .ok_or_else(|| self.no_register(*number))?;
            }
            file.put(cpu)
        })
    }

    pub fn get_segment(&self, request: &mut VmSegDesc) -> io::Result<()> {
        request.desc = self.with(request.cpuid, |cpu| {
            let mut sregs = cpu.sregs()?;
            if let Some(table) = table(&mut sregs, request.regnum) {
                return Ok(SegDesc {
                    base: table.base,
                    limit: table.limit.into(),
                    access: 0,
                });
            }
            let segment = segment(&mut sregs, request.regnum);
            let segment = segment.ok_or_else(|| self.no_register(request.regnum))?;
            Ok(SegDesc {
                base: segment.base,
                limit: segment.limit,
                access: access(segment),
            })
        })?;
        Ok(())
    }

    pub fn set_segment(&self, request: &VmSegDesc) -> io::Result<()> {
        let desc = request.desc;
        self.with(request.cpuid, |cpu| {
            let mut sregs = cpu.sregs()?;
            if let Some(table) = table(&mut sregs, request.regnum) {
                table.base = desc.base;
                table.limit = desc.limit as u16;
            } else {
                let segment = segment(&mut sregs, request.regnum);
                let segment = segment.ok_or_else(|| self.no_register(request.regnum))?;
                *segment = with_access(desc, segment.selector);
            }
            cpu.staged = Some(sregs);
            Ok(())
        })
    }

    /// By the vCPU's own tables, which the host has to name.
    pub fn translate(&self, request: &mut VmGla2gpa) -> io::Result<()> {
        let asked = *request;
        let (fault, gpa) = self.with(asked.vcpuid, |cpu| {
            cpu.flush()?;
            if asked.paging.paging_mode == 0 {
                return Ok((0, asked.gla));
            }
            if cpu.fd.get_sregs()?.cr3 != asked.paging.cr3 {
                return Err(self.misuse(libc::EINVAL, "a translation by other tables"));
            }
            let translated = cpu.fd.translate_gva(asked.gla)?;
            Ok(match translated.valid {
                0 => (1, 0),
                _ => (0, translated.physical_address),
            })
        })?;
        (request.fault, request.gpa) = (fault, gpa);
        Ok(())
    }
}

/// The bits of vmm.h's `SEG_DESC_`.
fn access(segment: &kvm_segment) -> u32 {
    let bits = [
        (segment.type_, 0),
        (segment.s, 4),
        (segment.dpl, 5),
        (segment.present, 7),
        (segment.avl, 12),
        (segment.l, 13),
        (segment.db, 14),
        (segment.g, 15),
        (segment.unusable, 16),
    ];
    bits.iter()
        .fold(0, |all, (value, at)| all | u32::from(*value) << at)
}

fn with_access(desc: SegDesc, selector: u16) -> kvm_segment {
    let bits = |at: u32, mask: u32| (desc.access >> at & mask) as u8;
    kvm_segment {
        selector,
        base: desc.base,
        limit: desc.limit,
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

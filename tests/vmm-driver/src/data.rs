//! State by classes: `VM_DATA_READ` and `VM_DATA_WRITE`, and the FPU's areas.
#![allow(unsafe_code)] // buffers of requests

use std::io;

use kvm_bindings::*;
use vmm_host::hypervisor::bhyve::abi::data::*;
use vmm_host::hypervisor::bhyve::abi::*;

use crate::argument::{array_in, array_out, copy_in, copy_out};
use crate::errno;
use crate::machine::Machine;
use crate::vcpu::Cpu;

/// The largest buffer.
const LIMIT: u32 = VM_DATA_XFER_LIMIT as u32;

/// MSRs of a vCPU's state: EFER, KERNEL_GS_BASE, STAR, LSTAR, CSTAR, SF_MASK, SYSENTER_CS, ESP and EIP, PAT, MTRR_DEF_TYPE.
const MSRS: [u32; 11] = [
    0xc000_0080,
    0xc000_0102,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0x174,
    0x175,
    0x176,
    0x277,
    0x2ff,
];
/// What is written of the TSC is a vCPU's distance from the VM's, of which KVM has none here.
const TSC: u32 = 0x10;

impl Machine {
    /// # Safety
    /// `request.data` points to `len` bytes.
    pub unsafe fn data_read(&self, request: &mut VmDataXfer) -> io::Result<()> {
        self.check_transfer(request)?;
        if request.flags & !VDX_FLAG_READ_COPYIN != 0 {
            return Err(self.misuse(libc::EINVAL, "flags of VM_DATA_READ"));
        }
        let vcpu = request.vcpuid;
        // SAFETY: by this function's contract, and the structure of the class is what `put` writes, at most `len` bytes of it.
        unsafe {
            match request.class {
                VDC_VERSION => Err(self.misuse(libc::EINVAL, "VDC_VERSION, which no host needs")),
                VDC_MSR => put(request, &self.with(vcpu, read_msrs)?),
                VDC_VMM_ARCH => put(request, &self.with(vcpu, read_pending)?),
                VDC_LAPIC => put(request, &[self.with(vcpu, read_lapic)?]),
                VDC_IOAPIC => put(request, &[self.read_ioapic()?]),
                VDC_ATPIC => put(request, &[self.read_atpic()?]),
                VDC_ATPIT => put(request, &[self.read_atpit()?]),
                VDC_HPET => put(request, &[VdiHpet::default()]),
                VDC_PM_TIMER => put(request, &[self.clocks.read_pm_timer()]),
                VDC_RTC => put(request, &[self.clocks.read_rtc()]),
                VDC_VMM_TIME => put(request, &[self.time()?]),
                // Hosts probe for this one.
                VDC_PMU_AMD => Err(errno(libc::EINVAL)),
                other => Err(self.misuse(libc::EINVAL, &format!("data class {other}"))),
            }
        }
    }

    /// # Safety
    /// `request.data` points to `len` bytes.
    pub unsafe fn data_write(&self, request: &VmDataXfer) -> io::Result<()> {
        self.check_transfer(request)?;
        let vcpu = request.vcpuid;
        // SAFETY: by this function's contract, and `take` reads the structure of the class, if `len` is its size.
        unsafe {
            match request.class {
                VDC_MSR => {
                    let fields = take_fields(request)?;
                    self.with(vcpu, |cpu| write_msrs(cpu, &fields))
                }
                VDC_VMM_ARCH => {
                    let fields = take_fields(request)?;
                    self.with(vcpu, |cpu| write_pending(cpu, &fields))
                }
                VDC_LAPIC => {
                    let lapic = take(request)?;
                    self.with(vcpu, |cpu| write_lapic(cpu, &lapic))
                }
                VDC_IOAPIC => self.write_ioapic(&take(request)?),
                VDC_ATPIC => self.write_atpic(&take(request)?),
                VDC_ATPIT => self.write_atpit(&take(request)?),
                VDC_HPET => take::<VdiHpet>(request).map(drop),
                VDC_PM_TIMER => take::<VdiPmTimer>(request).map(drop),
                VDC_RTC => {
                    self.clocks.write_rtc(&take(request)?);
                    Ok(())
                }
                VDC_VMM_TIME => self.set_time(&take(request)?),
                other => Err(self.misuse(libc::EINVAL, &format!("data class {other}"))),
            }
        }
    }

    fn check_transfer(&self, request: &VmDataXfer) -> io::Result<()> {
        let class = request.class;
        if request.len > LIMIT {
            return Err(self.misuse(libc::EFBIG, "a transfer above the limit"));
        }
        let version = if class == VDC_RTC { 2 } else { 1 };
        if request.version != version {
            let what = format!("version {} of data class {class}", request.version);
            return Err(self.misuse(libc::EINVAL, &what));
        }
        let of_vcpu = matches!(class, VDC_MSR | VDC_LAPIC | VDC_VMM_ARCH | VDC_PMU_AMD);
        if of_vcpu == (request.vcpuid == -1) {
            let what = format!("data class {class} of vCPU {}", request.vcpuid);
            return Err(self.misuse(libc::EINVAL, &what));
        }
        Ok(())
    }

    /// # Safety
    /// `request.entries` points to room for as many entries as it says.
    pub unsafe fn fpu_areas(&self, request: &mut VmFpuDesc) -> io::Result<()> {
        let leaf = |index: u32| {
            let mut entries = self.supported.iter();
            entries.find(|entry| (entry.function, entry.index) == (0xd, index))
        };
        let area = |feature, size, off| VmFpuDescEntry { feature, size, off };
        // The legacy part: x87 and SSE.
        let mut areas = vec![area(1, 160, 0), area(2, 256, 160)];
        let features = leaf(0).map_or(0, |entry| entry.eax);
        for bit in (2..32).filter(|bit| features >> bit & 1 != 0) {
            areas.extend(leaf(bit).map(|entry| area(1 << bit, entry.eax, entry.ebx)));
        }
        let room = request.num_entries as usize;
        request.num_entries = areas.len() as u32;
        request.req_size = size_of::<kvm_xsave>();
        if room < areas.len() {
            return Err(errno(libc::ENOSPC));
        }
        // SAFETY: by this function's contract.
        unsafe { array_out(request.entries, &areas) }
    }

    /// # Safety
    /// `request.buf` points to room for `len` bytes.
    pub unsafe fn get_fpu(&self, request: &VmFpuState) -> io::Result<()> {
        self.check_fpu(request)?;
        let xsave = self.with(request.vcpuid, |cpu| Ok(cpu.fd.get_xsave()?))?;
        // SAFETY: by this function's contract.
        unsafe { copy_out(request.buf, xsave.region) }
    }

    /// # Safety
    /// `request.buf` points to `len` bytes.
    pub unsafe fn set_fpu(&self, request: &VmFpuState) -> io::Result<()> {
        self.check_fpu(request)?;
        // SAFETY: by this function's contract.
        let region = unsafe { copy_in(request.buf) }?;
        let xsave = kvm_xsave {
            region,
            ..Default::default()
        };
        self.with(request.vcpuid, |cpu| {
            // SAFETY: KVM reads more than a kvm_xsave only where a process asked for dynamic features.
            Ok(unsafe { cpu.fd.set_xsave(&xsave) }?)
        })
    }

    fn check_fpu(&self, request: &VmFpuState) -> io::Result<()> {
        match request.len == size_of::<kvm_xsave>() {
            true => Ok(()),
            false => Err(self.misuse(
                libc::EINVAL,
                &format!("an FPU area of {} bytes", request.len),
            )),
        }
    }
}

/// # Safety
/// `request.data` points to room for `len` bytes.
unsafe fn put<T: Copy>(request: &mut VmDataXfer, items: &[T]) -> io::Result<()> {
    request.result_len = size_of_val(items) as u32;
    if request.len < request.result_len {
        return Err(errno(libc::ENOSPC));
    }
    // SAFETY: by this function's contract.
    unsafe { array_out(request.data.cast(), items) }
}

/// # Safety
/// `request.data` points to `len` bytes.
unsafe fn take<T: Copy>(request: &VmDataXfer) -> io::Result<T> {
    if request.len as usize != size_of::<T>() {
        return Err(errno(libc::EINVAL));
    }
    // SAFETY: by this function's contract.
    unsafe { copy_in(request.data) }
}

/// # Safety
/// As of [`take`].
unsafe fn take_fields(request: &VmDataXfer) -> io::Result<Vec<VdiFieldEntry>> {
    let count = request.len as usize / size_of::<VdiFieldEntry>();
    // SAFETY: by this function's contract.
    unsafe { array_in(request.data.cast(), count) }
}

fn field(ident: u32, value: u64) -> VdiFieldEntry {
    VdiFieldEntry {
        ident,
        value,
        ..Default::default()
    }
}

fn one_msr(index: u32, data: u64) -> io::Result<Msrs> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).map_err(|_| errno(libc::ENOMEM))
}

fn read_msrs(cpu: &mut Cpu) -> io::Result<Vec<VdiFieldEntry>> {
    let mut fields = vec![field(TSC, 0)];
    for index in MSRS {
        let mut msrs = one_msr(index, 0)?;
        if cpu.fd.get_msrs(&mut msrs)? == 1 {
            fields.push(field(index, msrs.as_slice()[0].data));
        }
    }
    Ok(fields)
}

fn write_msrs(cpu: &mut Cpu, fields: &[VdiFieldEntry]) -> io::Result<()> {
    for entry in fields.iter().filter(|entry| entry.ident != TSC) {
        if cpu.fd.set_msrs(&one_msr(entry.ident, entry.value)?)? != 1 {
            return Err(errno(libc::EINVAL));
        }
    }
    Ok(())
}

fn read_pending(cpu: &mut Cpu) -> io::Result<Vec<VdiFieldEntry>> {
    let events = cpu.fd.get_vcpu_events()?;
    Ok(vec![
        field(VAI_PEND_NMI, events.nmi.pending.into()),
        field(VAI_PEND_EXTINT, 0),
        field(VAI_PEND_EXCP, 0),
        field(VAI_PEND_INTINFO, 0),
    ])
}

fn write_pending(cpu: &mut Cpu, fields: &[VdiFieldEntry]) -> io::Result<()> {
    let mut events = cpu.fd.get_vcpu_events()?;
    events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING;
    for entry in fields {
        match entry.ident {
            VAI_PEND_NMI => events.nmi.pending = (entry.value != 0).into(),
            _ if entry.value == 0 => {}
            // KVM has no place for what this emulation never tells.
            _ => return Err(errno(libc::EINVAL)),
        }
    }
    Ok(cpu.fd.set_vcpu_events(&events)?)
}

/// Places of the local APIC's registers in its page (Intel SDM volume 3, table 11-1).
fn register(state: &mut kvm_lapic_state, at: usize) -> &mut [std::ffi::c_char] {
    &mut state.regs[at..at + 4]
}

fn get(state: &mut kvm_lapic_state, at: usize) -> u32 {
    let bytes = register(state, at);
    let mut value = [0; 4];
    for (to, from) in value.iter_mut().zip(bytes) {
        *to = *from as u8;
    }
    u32::from_le_bytes(value)
}

fn set(state: &mut kvm_lapic_state, at: usize, value: u32) {
    for (to, from) in register(state, at).iter_mut().zip(value.to_le_bytes()) {
        *to = from as std::ffi::c_char;
    }
}

fn read_lapic(cpu: &mut Cpu) -> io::Result<VdiLapic> {
    let mut state = cpu.fd.get_lapic()?;
    let s = &mut state;
    let mut page = VdiLapicPage {
        icr: u64::from(get(s, 0x310)) << 32 | u64::from(get(s, 0x300)),
        ..Default::default()
    };
    for (field, at) in registers(&mut page) {
        *field = get(s, at);
    }
    Ok(VdiLapic {
        page,
        apicbase: cpu.sregs()?.apic_base,
        ..Default::default()
    })
}

fn write_lapic(cpu: &mut Cpu, lapic: &VdiLapic) -> io::Result<()> {
    let mut sregs = cpu.sregs()?;
    sregs.apic_base = lapic.apicbase;
    cpu.staged = Some(sregs);
    cpu.flush()?;
    let mut state = cpu.fd.get_lapic()?;
    let mut page = lapic.page;
    set(&mut state, 0x300, page.icr as u32);
    set(&mut state, 0x310, (page.icr >> 32) as u32);
    for (field, at) in registers(&mut page) {
        set(&mut state, at, *field);
    }
    Ok(cpu.fd.set_lapic(&state)?)
}

/// The registers of 32 bits.
fn registers(page: &mut VdiLapicPage) -> Vec<(&mut u32, usize)> {
    let mut all = vec![
        (&mut page.id, 0x20),
        (&mut page.version, 0x30),
        (&mut page.tpr, 0x80),
        (&mut page.apr, 0x90),
        (&mut page.ldr, 0xd0),
        (&mut page.dfr, 0xe0),
        (&mut page.svr, 0xf0),
        (&mut page.esr, 0x280),
        (&mut page.lvt_timer, 0x320),
        (&mut page.lvt_thermal, 0x330),
        (&mut page.lvt_pcint, 0x340),
        (&mut page.lvt_lint0, 0x350),
        (&mut page.lvt_lint1, 0x360),
        (&mut page.lvt_error, 0x370),
        (&mut page.icr_timer, 0x380),
        (&mut page.dcr_timer, 0x3e0),
    ];
    for (bits, first) in [
        (&mut page.isr, 0x100),
        (&mut page.tmr, 0x180),
        (&mut page.irr, 0x200),
    ] {
        let places = (first..).step_by(0x10);
        all.extend(bits.iter_mut().zip(places));
    }
    all
}

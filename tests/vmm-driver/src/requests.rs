//! The requests of a VM's node: which takes what.
#![allow(unsafe_code)] // arguments are pointers

use std::ffi::c_void;
use std::io;
use std::sync::atomic::Ordering;

use vmm_host::hypervisor::bhyve::abi::*;

use crate::argument::{array_in, array_out, copy_in, copy_out};
use crate::control;
use crate::lines::Change;
use crate::machine::{Machine, VCPUS};

/// # Safety
/// As of `Instance::ioctl`.
#[allow(clippy::too_many_lines)] // one table
pub unsafe fn serve(vm: &Machine, request: i32, argument: *mut c_void) -> io::Result<i32> {
    /// Copies the argument in, does what uses it, and copies it out.
    macro_rules! both {
        ($act:expr) => {{
            let mut value = copy_in(argument)?;
            $act(&mut value)?;
            copy_out(argument, value)?;
        }};
    }
    let number = argument.addr();
    // SAFETY: by this function's contract, each argument is what the request takes.
    unsafe {
        match request {
            VMM_INTERFACE_VERSION => return Ok(control::settings().version),
            VM_RUN => {
                let entry: VmEntry = copy_in(argument)?;
                let exit = vm.run(&entry)?;
                copy_out(entry.exit_data.cast(), exit)?;
            }
            VM_ALLOC_MEMSEG => vm.alloc_memseg(&copy_in(argument)?)?,
            VM_MMAP_MEMSEG => vm.mmap_memseg(&copy_in(argument)?)?,
            VM_MUNMAP_MEMSEG => vm.munmap_memseg(&copy_in(argument)?)?,
            VM_GET_MEMSEG => both!(|segment| vm.get_memseg(segment)),
            VM_MMAP_GETNEXT => both!(|map| vm.mmap_getnext(map)),
            VM_DEVMEM_GETOFFSET => both!(|request: &mut VmDevmemOffset| {
                request.offset = vm.devmem_offset(request.segid)?;
                io::Result::Ok(())
            }),
            VM_SET_REGISTER_SET => {
                let set: VmRegisterSet = copy_in(argument)?;
                let numbers = array_in(set.regnums, set.count as usize)?;
                let values = array_in(set.regvals.cast_const(), set.count as usize)?;
                vm.set_registers(set.cpuid, &numbers, &values)?;
            }
            VM_GET_REGISTER_SET => {
                let set: VmRegisterSet = copy_in(argument)?;
                let numbers = array_in(set.regnums, set.count as usize)?;
                array_out(set.regvals, &vm.get_registers(set.cpuid, &numbers)?)?;
            }
            VM_SET_SEGMENT_DESCRIPTOR => vm.set_segment(&copy_in(argument)?)?,
            VM_GET_SEGMENT_DESCRIPTOR => both!(|segment| vm.get_segment(segment)),
            VM_GLA2GPA_NOFAULT => both!(|translation| vm.translate(translation)),
            VM_SET_CPUID => vm.set_cpuid(&copy_in(argument)?)?,
            VM_GET_CPUID => both!(|config| vm.get_cpuid(config)),
            VM_LEGACY_CPUID => both!(|leaf: &mut VmLegacyCpuid| {
                vm.legacy_cpuid(leaf);
                io::Result::Ok(())
            }),
            VM_SET_CAPABILITY => capability(vm, &copy_in(argument)?)?,
            VM_SET_X2APIC_STATE => {
                let request: VmX2apic = copy_in(argument)?;
                vm.with(request.cpuid, |cpu| {
                    cpu.x2apic = request.state == X2APIC_ENABLED;
                    Ok(())
                })?;
            }
            VM_ACTIVATE_CPU => vm.activate(copy_in(argument)?)?,
            VM_RESET_CPU => vm.reset_vcpu(&copy_in(argument)?)?,
            VM_GET_RUN_STATE => both!(|state| vm.get_run_state(state)),
            VM_SET_RUN_STATE => vm.set_run_state(&copy_in(argument)?)?,
            VM_VCPU_BARRIER => vm.barrier(number)?,
            VM_SUSPEND_CPU => vm.hold_vcpu(copy_in(argument)?, true)?,
            VM_RESUME_CPU => vm.hold_vcpu(copy_in(argument)?, false)?,
            VM_GET_TOPOLOGY => copy_out(
                argument,
                VmCpuTopology {
                    sockets: 1,
                    cores: 1,
                    threads: 1,
                    maxcpus: VCPUS as u16,
                },
            )?,
            VM_GET_CPUS => {
                let set: VmCpuset = copy_in(argument)?;
                if set.which != VM_ACTIVE_CPUS || set.cpusetsize < 8 {
                    return Err(vm.misuse(libc::EINVAL, "a set of vCPUs"));
                }
                copy_out(set.cpus, vm.active())?;
            }
            VM_LAPIC_MSI => vm.message(&copy_in(argument)?)?,
            VM_INJECT_NMI => vm.nmi(&copy_in(argument)?)?,
            VM_IOAPIC_ASSERT_IRQ => vm.ioapic(&copy_in(argument)?, Change::Assert)?,
            VM_IOAPIC_DEASSERT_IRQ => vm.ioapic(&copy_in(argument)?, Change::Deassert)?,
            VM_IOAPIC_PULSE_IRQ => vm.ioapic(&copy_in(argument)?, Change::Pulse)?,
            VM_ISA_ASSERT_IRQ => vm.isa(&copy_in(argument)?, Change::Assert)?,
            VM_ISA_DEASSERT_IRQ => vm.isa(&copy_in(argument)?, Change::Deassert)?,
            VM_ISA_PULSE_IRQ => vm.isa(&copy_in(argument)?, Change::Pulse)?,
            VM_ISA_SET_IRQ_TRIGGER => vm.isa_trigger(&copy_in(argument)?)?,
            VM_IOAPIC_PINCOUNT => copy_out(argument, IOAPIC_PINS)?,
            VM_RTC_WRITE => vm.write_cmos(&copy_in(argument)?)?,
            VM_RTC_READ => both!(|byte| vm.read_cmos(byte)),
            VM_RTC_SETTIME => vm.set_clock(copy_in(argument)?)?,
            VM_RTC_GETTIME => copy_out(argument, vm.clock())?,
            VM_PMTMR_LOCATE => vm.place_pm_timer(number)?,
            VM_PAUSE => vm.pause()?,
            VM_RESUME => vm.resume()?,
            VM_REINIT => {
                let request: VmReinit = copy_in(argument)?;
                if request.flags & !VM_REINIT_F_FORCE_SUSPEND != 0 {
                    return Err(vm.misuse(libc::EINVAL, "flags of REINIT"));
                }
                vm.reinit()?;
            }
            VM_DATA_READ => {
                let mut transfer: VmDataXfer = copy_in(argument)?;
                let result = vm.data_read(&mut transfer);
                // Also on ENOSPC, which it explains.
                copy_out(argument, transfer)?;
                result?;
            }
            VM_DATA_WRITE => vm.data_write(&copy_in(argument)?)?,
            VM_NPT_OPERATION => return vm.npt(&copy_in(argument)?),
            VM_STATS_IOC => both!(|figures| vm.statistics(figures)),
            VM_STAT_DESC => both!(|figure| vm.statistic_name(figure)),
            VM_DESC_FPU_AREA => both!(|areas| vm.fpu_areas(areas)),
            VM_GET_FPU => vm.get_fpu(&copy_in(argument)?)?,
            VM_SET_FPU => vm.set_fpu(&copy_in(argument)?)?,
            VM_SUSPEND => vm.suspend_request(&copy_in(argument)?)?,
            VM_SET_AUTODESTRUCT => vm.autodestruct.store(number != 0, Ordering::SeqCst),
            VM_DESTROY_SELF => {
                vm.given_up.store(true, Ordering::SeqCst);
                vm.destroyed.store(true, Ordering::SeqCst);
                vm.kick_all();
            }
            other => {
                return Err(vm.misuse(libc::ENOTTY, &format!("unknown request {other:#x}")));
            }
        }
    }
    Ok(0)
}

fn capability(vm: &Machine, request: &VmCapability) -> io::Result<()> {
    vm.vcpu(request.cpuid)?;
    match request.captype {
        // HLT never comes out; the driver only takes note.
        VM_CAP_HALT_EXIT => Ok(()),
        other => Err(vm.misuse(libc::EINVAL, &format!("capability {other}"))),
    }
}

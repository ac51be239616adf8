//! What each exit of a guest means, and what completes it (`vm_exit` of vmm.h).

#![allow(unsafe_code)] // reads the union that the kernel filled

use std::io;

use super::abi::*;
use super::registers;
use super::rom_write;
use super::vcpu::{Shared, Unfinished};
use crate::hypervisor::{Exit, ExitHandler, Space};

/// What follows an exit.
pub(super) enum After {
    /// The guest goes on, with what completes its access.
    Enter(Unfinished),
    /// The vCPU left for nothing that the guest did.
    Nothing,
    /// [`Vcpu::run`](crate::hypervisor::Vcpu::run) returns.
    End(Exit),
}

/// Serves `exit` of vCPU `vcpu`.
///
/// # Errors
/// A request that serving it took.
pub(super) fn serve(
    shared: &Shared,
    vcpu: i32,
    exit: &VmExit,
    handler: &mut dyn ExitHandler,
) -> io::Result<After> {
    // SAFETY (of each read of `exit.u` below): the kernel filled the member that the exit code names, and all members are integers,
    // for which any bytes are values.
    let u = &exit.u;
    Ok(match exit.exitcode {
        EXITCODE_INOUT => {
            // SAFETY: as above.
            let inout = unsafe { u.inout };
            After::Enter(Unfinished::Port(port_access(shared, inout, handler)))
        }
        EXITCODE_MMIO => {
            // SAFETY: as above.
            let mmio = unsafe { u.mmio };
            After::Enter(Unfinished::Memory(memory_access(shared, mmio, handler)))
        }
        EXITCODE_RDMSR => {
            // SAFETY: as above.
            let msr = unsafe { u.msr };
            let value = shared.msrs.read(msr.code);
            let halves = [value & 0xffff_ffff, value >> 32];
            let numbers = [VM_REG_GUEST_RAX, VM_REG_GUEST_RDX];
            registers::set(&shared.node, vcpu, &numbers, halves)?;
            After::Enter(Unfinished::Nothing)
        }
        EXITCODE_WRMSR => {
            // SAFETY: as above.
            let msr = unsafe { u.msr };
            shared.msrs.write(msr.code, msr.wval);
            After::Enter(Unfinished::Nothing)
        }
        // DEPRECATED2 was a request to idle, before version 16; DEBUG, a debugger's hold on the vCPU.
        EXITCODE_BOGUS | EXITCODE_DEPRECATED2 | EXITCODE_DEBUG => After::Nothing,
        // The kernel serves these itself unless their capabilities are turned on, which they are not.
        EXITCODE_HLT | EXITCODE_PAUSE => After::Enter(Unfinished::Nothing),
        EXITCODE_SUSPENDED => {
            // SAFETY: as above.
            After::End(suspended(unsafe { u.suspended }.how))
        }
        EXITCODE_PAGING => {
            // SAFETY: as above.
            let VmExitPaging { gpa, fault_type } = unsafe { u.paging };
            if fault_type & PROT_WRITE == 0 || shared.roms.at(gpa).is_none() {
                return Ok(After::End(Exit::Crash(crash(exit))));
            }
            match rom_write::serve(shared, vcpu, gpa, handler)? {
                Ok(()) => After::Enter(Unfinished::Nothing),
                Err(bytes) => After::End(Exit::Crash(format!(
                    "{}: of its instructions that write there this host knows MOV, and this is {bytes:02x?}",
                    crash(exit)
                ))),
            }
        }
        _ => After::End(Exit::Crash(crash(exit))),
    })
}

/// Each vCPU comes out with the same reason, and would at each entry until the VM is reset.
fn suspended(how: i32) -> Exit {
    match how {
        VM_SUSPEND_RESET | VM_SUSPEND_TRIPLEFAULT => Exit::TripleFault,
        VM_SUSPEND_HALT | VM_SUSPEND_POWEROFF => Exit::Halted,
        other => Exit::Crash(format!(
            "bhyve has suspended the VM for a reason that this host does not know: {other}"
        )),
    }
}

fn port_access(shared: &Shared, mut inout: VmInout, handler: &mut dyn ExitHandler) -> VmInout {
    let (port, width) = (inout.port, inout.bytes);
    let mask = u32::MAX >> (32 - 8 * u32::from(width.clamp(1, 4)));
    if inout.flags & INOUT_IN != 0 {
        inout.eax = handler.pio_read(port, width) & mask;
        return inout;
    }
    let value = inout.eax & mask;
    if !shared
        .doorbells
        .ring(Space::Pio, port.into(), width, value.into())
    {
        handler.pio_write(port, width, value);
    }
    inout
}

fn memory_access(shared: &Shared, mut mmio: VmMmio, handler: &mut dyn ExitHandler) -> VmMmio {
    let (address, width) = (mmio.gpa, mmio.bytes);
    let mask = u64::MAX >> (64 - 8 * u32::from(width.clamp(1, 8)));
    if mmio.read != 0 {
        mmio.data = handler.mmio_read(address, width) & mask;
        return mmio;
    }
    let value = mmio.data & mask;
    if !shared.doorbells.ring(Space::Mmio, address, width, value) {
        handler.mmio_write(address, width, value);
    }
    mmio
}

/// What went wrong, in words.
fn crash(exit: &VmExit) -> String {
    let rip = exit.rip;
    match exit.exitcode {
        EXITCODE_PAGING => {
            // SAFETY: the exit code says that this member is valid.
            let VmExitPaging { gpa, fault_type } = unsafe { exit.u.paging };
            let what = match fault_type {
                kind if kind & PROT_WRITE != 0 => "writes to memory that can only be read",
                kind if kind & PROT_EXEC != 0 => "executes what is no memory",
                _ => "reads what bhyve can't serve",
            };
            format!(
                "The guest {what}, at {gpa:#x}, with rip {rip:#x} (VM_EXITCODE_PAGING, fault {fault_type})"
            )
        }
        EXITCODE_INST_EMUL => {
            // SAFETY: as above.
            let VmExitInstEmul { inst, num_valid } = unsafe { exit.u.inst_emul };
            let bytes = &inst[..usize::from(num_valid).min(inst.len())];
            format!(
                "bhyve can't emulate the guest's instruction at rip {rip:#x}: {bytes:02x?} (VM_EXITCODE_INST_EMUL)"
            )
        }
        EXITCODE_VMX => {
            // SAFETY: as above.
            let vmx = unsafe { exit.u.vmx };
            format!(
                "The CPU left the guest for a reason that bhyve does not serve, at rip {rip:#x}: status {}, reason {:#x}, \
                 qualification {:#x}, instruction {} with error {} (VM_EXITCODE_VMX)",
                vmx.status, vmx.exit_reason, vmx.qualification, vmx.inst_type, vmx.inst_error
            )
        }
        EXITCODE_SVM => {
            // SAFETY: as above.
            let svm = unsafe { exit.u.svm };
            format!(
                "The CPU left the guest for a reason that bhyve does not serve, at rip {rip:#x}: code {:#x}, info {:#x} and {:#x} \
                 (VM_EXITCODE_SVM)",
                svm.exitcode, svm.exitinfo1, svm.exitinfo2
            )
        }
        EXITCODE_TASK_SWITCH => {
            // SAFETY: as above.
            let task = unsafe { exit.u.task_switch };
            format!(
                "The guest switches to task {:#x} by hardware, at rip {rip:#x}, which this host does not emulate \
                 (VM_EXITCODE_TASK_SWITCH)",
                task.tsssel
            )
        }
        other => format!(
            "bhyve left the guest with exit code {other}, which this host never asks for, at rip {rip:#x}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(exitcode: i32, u: ExitPayload) -> VmExit {
        VmExit {
            exitcode,
            rip: 0xfff0,
            u,
            ..Default::default()
        }
    }

    #[test]
    fn suspensions_are_told_by_their_reason() {
        for how in [VM_SUSPEND_RESET, VM_SUSPEND_TRIPLEFAULT] {
            assert!(matches!(suspended(how), Exit::TripleFault));
        }
        for how in [VM_SUSPEND_HALT, VM_SUSPEND_POWEROFF] {
            assert!(matches!(suspended(how), Exit::Halted));
        }
        let Exit::Crash(text) = suspended(9) else {
            panic!("a reason that there is not")
        };
        assert!(text.contains(": 9"), "{text}");
    }

    #[test]
    fn a_crash_names_what_and_where() {
        let mut inst = [0; 15];
        inst[..2].copy_from_slice(&[0x0f, 0x0b]);
        let paging = |fault_type| ExitPayload {
            paging: VmExitPaging {
                gpa: 0xd000_0000,
                fault_type,
            },
        };
        let inst_emul = VmExitInstEmul { inst, num_valid: 2 };
        for (exit, words) in [
            (
                exit(EXITCODE_PAGING, paging(PROT_WRITE)),
                "can only be read, at 0xd0000000, with rip 0xfff0",
            ),
            (
                exit(EXITCODE_PAGING, paging(PROT_EXEC)),
                "executes what is no memory, at 0xd0000000",
            ),
            (
                exit(EXITCODE_INST_EMUL, ExitPayload { inst_emul }),
                "at rip 0xfff0: [0f, 0b]",
            ),
            (
                exit(
                    EXITCODE_VMX,
                    ExitPayload {
                        vmx: VmExitVmx {
                            exit_reason: 0x21,
                            ..Default::default()
                        },
                    },
                ),
                "reason 0x21",
            ),
            (
                exit(
                    EXITCODE_SVM,
                    ExitPayload {
                        svm: VmExitSvm {
                            exitcode: 0x7f,
                            ..Default::default()
                        },
                    },
                ),
                "code 0x7f",
            ),
            (
                exit(
                    EXITCODE_TASK_SWITCH,
                    ExitPayload {
                        task_switch: VmTaskSwitch {
                            tsssel: 0x28,
                            ..Default::default()
                        },
                    },
                ),
                "task 0x28",
            ),
            (exit(99, paging(0)), "exit code 99"),
        ] {
            let text = crash(&exit);
            assert!(text.contains(words), "{text}");
        }
    }
}

//! Why KVM has left the guest.
#![allow(unsafe_code)] // reads the unions that the kernel filled

use kvm_bindings::*;
use vmm_host::hypervisor::bhyve::abi::*;

use crate::access::Access;

pub enum Left {
    Access(Access),
    /// The driver's exit code and what it tells.
    Msr(i32, VmExitMsr),
    Shutdown,
    Nothing,
    Failure(i32, ExitPayload),
}

/// After a `KVM_RUN` that returned 0.
pub fn left(run: &mut kvm_run) -> Left {
    match run.exit_reason {
        // SAFETY: the exit reason says so.
        KVM_EXIT_IO => Left::Access(unsafe { Access::of_port(run) }),
        // SAFETY: as above.
        KVM_EXIT_MMIO => Left::Access(unsafe { Access::of_memory(run) }),
        reason @ (KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR) => {
            // SAFETY: the exit reason says that this member is valid.
            let msr = unsafe { &mut run.__bindgen_anon_1.msr };
            let exit = VmExitMsr {
                code: msr.index,
                wval: msr.data,
            };
            msr.error = 0;
            match reason {
                KVM_EXIT_X86_RDMSR => {
                    msr.data = 0;
                    Left::Msr(EXITCODE_RDMSR, exit)
                }
                _ => Left::Msr(EXITCODE_WRMSR, exit),
            }
        }
        KVM_EXIT_SHUTDOWN => Left::Shutdown,
        KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN => Left::Nothing,
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: as above.
            let error = unsafe { run.__bindgen_anon_1.internal };
            match error.suberror {
                KVM_INTERNAL_ERROR_EMULATION => Left::Failure(
                    EXITCODE_INST_EMUL,
                    ExitPayload {
                        inst_emul: instruction(&error.data[..(error.ndata as usize).min(16)]),
                    },
                ),
                other => Left::Failure(EXITCODE_VMX, vmx(other)),
            }
        }
        other => Left::Failure(EXITCODE_VMX, vmx(other)),
    }
}

/// Bytes of the instruction, if KVM tells them: flags, of which bit 0 says so, then their number and they themselves.
fn instruction(data: &[u64]) -> VmExitInstEmul {
    let mut told = VmExitInstEmul::default();
    if let [flags, first, second, ..] = data
        && flags & 1 != 0
    {
        let [first, second] = [first, second].map(|word| word.to_le_bytes());
        let bytes = first[1..].iter().chain(&second);
        for (to, from) in told.inst.iter_mut().zip(bytes) {
            *to = *from;
        }
        told.num_valid = first[0].min(15);
    }
    told
}

fn vmx(exit_reason: u32) -> ExitPayload {
    let vmx = VmExitVmx {
        exit_reason,
        ..Default::default()
    };
    ExitPayload { vmx }
}

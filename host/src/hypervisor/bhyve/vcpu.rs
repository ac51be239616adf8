//! One vCPU: its run loop, its power-on state, and what all vCPUs of a VM share.

#![allow(unsafe_code)] // VM_RUN

use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use super::abi::data::*;
use super::abi::*;
use super::doorbells::Doorbells;
use super::exits::{self, After};
use super::kick::BhyveKick;
use super::memory::Roms;
use super::node::{self, Node};
use super::{registers, state};
use crate::hypervisor::msr::UnknownMsrs;
use crate::hypervisor::{Exit, ExitHandler, Kick, Registers, Vcpu};
use crate::memory::GuestMemory;

/// The local APIC id of the CPU that starts first, which is its number too.
const BOOTSTRAP: i32 = 0;

/// What the vCPUs of one VM share.
pub(super) struct Shared {
    pub(super) node: Node,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) roms: Roms,
    pub(super) doorbells: Doorbells,
    pub(super) msrs: UnknownMsrs,
    /// The vCPUs that there are.
    pub(super) created: Mutex<Vec<Created>>,
}

/// A vCPU that the driver has.
#[derive(Clone, Copy)]
pub(super) struct Created {
    pub(super) id: i32,
    pub(super) x2apic: bool,
}

impl Shared {
    /// All vCPUs are at power-on after `VM_REINIT`, which has made them inactive and taken their x2APICs.
    pub(super) fn power_on_all(&self) -> Result<()> {
        let created = self.created.lock().unwrap_or_else(PoisonError::into_inner);
        for vcpu in created.iter() {
            activate(&self.node, *vcpu)?;
        }
        Ok(())
    }
}

/// Makes a vCPU one that can run, at power-on.
pub(super) fn activate(node: &Node, vcpu: Created) -> Result<()> {
    let id = vcpu.id;
    node.request(&node::ACTIVATE_CPU, &mut { id })
        .with_context(|| format!("bhyve refused the vCPU with local APIC id {id}"))?;
    power_on(node, id)?;
    set_x2apic(node, vcpu)
}

/// Whether the guest can switch its local APIC to x2APIC mode.
fn set_x2apic(node: &Node, vcpu: Created) -> Result<()> {
    let mut request = VmX2apic {
        cpuid: vcpu.id,
        state: match vcpu.x2apic {
            true => X2APIC_ENABLED,
            false => X2APIC_DISABLED,
        },
    };
    node.request(&node::SET_X2APIC, &mut request)
        .context("bhyve refused the x2APIC")?;
    Ok(())
}

/// The driver knows the power-on state. CPU 0 then runs, and the others wait for the guest's INIT and SIPI in the kernel.
///
/// The state is set without pending events: the driver refuses VRS_PEND_INIT, which its check leaves out by mistake.
fn power_on(node: &Node, id: i32) -> Result<()> {
    let mut reset = VmVcpuReset {
        vcpuid: id,
        kind: VRK_RESET,
    };
    node.request(&node::RESET_CPU, &mut reset)
        .with_context(|| format!("bhyve refused to reset vCPU {id}"))?;
    let mut state = VmRunState {
        vcpuid: id,
        state: match id {
            BOOTSTRAP => VRS_RUN,
            _ => VRS_HALT,
        },
        ..Default::default()
    };
    node.request(&node::SET_RUN_STATE, &mut state)
        .with_context(|| format!("bhyve refused the run state of vCPU {id}"))?;
    Ok(())
}

/// A register access that the kernel waits for: the next entry has to complete it, with the very port or address, width and direction
/// of the exit. Entered without, the kernel would deliver the exit again.
#[derive(Clone, Copy)]
pub(super) enum Unfinished {
    Nothing,
    Port(VmInout),
    Memory(VmMmio),
}

/// A virtual CPU of a bhyve VM.
pub struct BhyveVcpu {
    shared: Arc<Shared>,
    id: i32,
    kick: Arc<BhyveKick>,
    unfinished: Unfinished,
}

impl BhyveVcpu {
    /// The active vCPU with this local APIC id.
    pub(super) fn new(shared: Arc<Shared>, id: i32) -> Self {
        let kick = Arc::new(BhyveKick::new(Arc::downgrade(&shared), id as usize));
        Self {
            shared,
            id,
            kick,
            unfinished: Unfinished::Nothing,
        }
    }

    /// Enters the guest once. `consistent`: comes out where no instruction is half done, without running further ones.
    fn enter(&self, consistent: bool, exit: &mut VmExit) -> io::Result<()> {
        let mut entry = entry(self.id, self.unfinished, consistent);
        entry.exit_data = exit;
        // SAFETY: VM_RUN reads a vm_entry and writes the vm_exit that it points to, both of which live during the call. What the
        // guest touches is memory of its own segments, which this process accesses as memory that changes at any time.
        unsafe { self.shared.node.raw(VM_RUN, &mut entry) }.map(drop)
    }
}

fn entry(vcpu: i32, unfinished: Unfinished, consistent: bool) -> VmEntry {
    let mut entry = VmEntry {
        cpuid: vcpu,
        ..Default::default()
    };
    match unfinished {
        Unfinished::Nothing => entry.cmd = VEC_DEFAULT,
        Unfinished::Port(inout) => {
            entry.cmd = VEC_FULFILL_INOUT;
            entry.u.inout = inout;
        }
        Unfinished::Memory(mmio) => {
            entry.cmd = VEC_FULFILL_MMIO;
            entry.u.mmio = mmio;
        }
    }
    if consistent {
        entry.cmd |= VEC_FLAG_EXIT_CONSISTENT;
    }
    entry
}

impl Vcpu for BhyveVcpu {
    fn run(&mut self, handler: &mut dyn ExitHandler) -> Result<Exit> {
        loop {
            let leave = self.kick.enter();
            let mut exit = VmExit::default();
            let entered = self.enter(leave, &mut exit);
            self.kick.left();
            match entered {
                // The kernel has taken what completes an access, whatever comes next.
                Ok(()) => self.unfinished = Unfinished::Nothing,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if node::is_destroyed(&error) => return Ok(Exit::Destroyed),
                Err(error) => return Ok(Exit::Crash(run_error(&error))),
            }
            match exits::serve(&self.shared, self.id, &exit, handler) {
                Ok(After::Enter(unfinished)) => {
                    self.kick.count();
                    self.unfinished = unfinished;
                }
                // A signal, a push that came late, or the place to leave.
                Ok(After::Nothing) if leave => {
                    self.kick.take();
                    return Ok(Exit::Kicked);
                }
                Ok(After::Nothing) => {}
                Ok(After::End(exit)) => {
                    self.kick.count();
                    return Ok(exit);
                }
                Err(error) if node::is_destroyed(&error) => return Ok(Exit::Destroyed),
                Err(error) => {
                    return Err(error).context("bhyve refused what an exit of the guest asks for");
                }
            }
        }
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as Arc<dyn Kick>
    }

    fn reset(&mut self) -> Result<()> {
        self.unfinished = Unfinished::Nothing;
        power_on(&self.shared.node, self.id)?;
        let created = &self.shared.created;
        let created = created.lock().unwrap_or_else(PoisonError::into_inner);
        match created.iter().find(|created| created.id == self.id) {
            Some(created) => set_x2apic(&self.shared.node, *created),
            None => Ok(()),
        }
    }

    fn registers(&self) -> Result<Registers> {
        registers::read(&self.shared.node, self.id).context("bhyve does not tell the registers")
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<()> {
        registers::write(&self.shared.node, self.id, registers)
            .context("bhyve refused the registers")
    }

    fn set_msrs(&mut self, values: &[(u32, u64)]) -> Result<()> {
        // One at a time: of several, the driver sets none if it refuses one.
        for &(ident, value) in values {
            let field = VdiFieldEntry {
                ident,
                value,
                ..Default::default()
            };
            state::write_fields(&self.shared.node, self.id, VDC_MSR, &[field])
                .with_context(|| format!("bhyve refused to set MSR {ident:#x} to {value:#x}"))?;
        }
        Ok(())
    }

    /// The kernel sees it: SUSPENDED with HALT.
    fn halted_for_good(&self) -> bool {
        false
    }
}

fn run_error(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EFAULT) => {
            "bhyve can't reach guest memory (EFAULT): the host is out of memory".into()
        }
        Some(libc::ENOMEM) => "bhyve is out of memory (ENOMEM)".into(),
        Some(libc::EBUSY) => {
            "bhyve has paused the VM (EBUSY), which another process must have asked for".into()
        }
        _ => format!("VM_RUN failed: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_complete_what_is_unfinished_also_on_the_way_out() {
        let inout = VmInout {
            port: 0x64,
            bytes: 1,
            flags: INOUT_IN,
            eax: 0x1c,
            ..Default::default()
        };
        let made = entry(3, Unfinished::Port(inout), true);
        assert_eq!(made.cpuid, 3);
        assert_eq!(made.cmd, VEC_FULFILL_INOUT | VEC_FLAG_EXIT_CONSISTENT);
        // SAFETY: written as this member.
        let back = unsafe { made.u.inout };
        assert_eq!(
            (back.port, back.bytes, back.flags, back.eax),
            (0x64, 1, 1, 0x1c)
        );
        assert_eq!(entry(0, Unfinished::Nothing, false).cmd, VEC_DEFAULT);
        let mmio = Unfinished::Memory(VmMmio::default());
        assert_eq!(entry(0, mmio, false).cmd, VEC_FULFILL_MMIO);
    }
}

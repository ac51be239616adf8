//! All of a VM's state but its memory, taken out of the driver and put into that of another VM.

#![allow(unsafe_code)] // requests with buffers

use std::io;
use std::sync::PoisonError;

use anyhow::{Context, Result, ensure};

use super::abi::data::*;
use super::abi::*;
use super::node::{self, Node};
use super::state::{self, Class, WHOLE_VM};
use super::{BhyveVm, registers, time};

/// What IA32_EFER and IA32_DEBUGCTL are written as: a register, and not at all, since not each CPU that has it takes it.
const MSRS_LEFT_OUT: [u32; 2] = [0xc000_0080, 0x1d9];
/// XSAVE components that the driver can tell of.
const FPU_ENTRIES: usize = 64;

/// The state of a VM that stands still. Its structures are the driver's own, see [`abi::data`](super::abi::data).
#[derive(Clone)]
pub struct VmState {
    /// TSC and boot.
    pub time: VdiTimeInfo,
    /// In-kernel devices.
    pub devices: DeviceState,
    /// vCPUs, in the order in which they were made.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt lines that are high, as bits.
    pub lines: u32,
}

/// The state of the in-kernel devices.
#[derive(Clone, Copy)]
#[allow(missing_docs)] // the fields are named for the devices
pub struct DeviceState {
    pub atpic: VdiAtpic,
    pub atpit: VdiAtpit,
    pub hpet: VdiHpet,
    pub ioapic: VdiIoapic,
    pub pm_timer: VdiPmTimer,
    pub rtc: VdiRtc,
}

/// The state of a vCPU.
#[derive(Clone)]
pub struct VcpuState {
    /// Its local APIC id.
    pub id: i32,
    /// Whether it runs, or waits for what.
    pub run_state: VmRunState,
    /// Registers by their numbers, in the order to set them.
    pub registers: Vec<(i32, u64)>,
    /// Hidden parts of segment registers, and descriptor tables.
    pub segments: Vec<(i32, SegDesc)>,
    /// MSRs by their numbers.
    pub msrs: Vec<VdiFieldEntry>,
    /// An XSAVE area in standard format.
    pub fpu: Vec<u8>,
    /// The local APIC.
    pub lapic: VdiLapic,
    /// Interrupts and exceptions that are on their way.
    pub pending: Vec<VdiFieldEntry>,
    /// Performance counters, on AMD and from version 18 on.
    pub pmu: Option<VdiPmuAmd>,
}

impl<D> BhyveVm<D> {
    /// The VM's state. Call it while no vCPU runs, and each has come out of [`Vcpu::run`](crate::hypervisor::Vcpu::run) after a kick,
    /// when no instruction is half done.
    ///
    /// # Errors
    /// The driver refused.
    pub fn export(&self) -> Result<VmState> {
        let node = &self.shared.node;
        paused(node, || {
            let created = self.shared.created.lock();
            let created = created.unwrap_or_else(PoisonError::into_inner);
            let vcpus = created.iter().map(|vcpu| export_vcpu(node, vcpu.id));
            Ok(VmState {
                time: time::read(node)?,
                devices: export_devices(node).context("bhyve does not tell its devices' state")?,
                vcpus: vcpus.collect::<Result<_>>()?,
                lines: self.lines.levels(),
            })
        })
    }

    /// Gives the VM, which has the same vCPUs and memory, the state of another. Call it while no vCPU runs.
    ///
    /// # Errors
    /// The vCPUs are others, or the driver refused: the VM can't be used then.
    pub fn import(&self, state: &VmState) -> Result<()> {
        let node = &self.shared.node;
        let created = self.shared.created.lock();
        let created = created.unwrap_or_else(PoisonError::into_inner);
        let (own, others): (Vec<_>, Vec<_>) = (
            created.iter().map(|vcpu| vcpu.id).collect(),
            state.vcpus.iter().map(|vcpu| vcpu.id).collect(),
        );
        ensure!(
            own == others,
            "The state is that of vCPUs with the ids {others:?}, and this VM has {own:?}"
        );
        paused(node, || {
            // Devices' times count from the boot.
            time::write(node, &state.time)?;
            import_devices(node, &state.devices).context("bhyve refused its devices' state")?;
            // The driver's counts of levels have come with its devices.
            self.lines.adopt(state.lines);
            state.vcpus.iter().try_for_each(|vcpu| {
                import_vcpu(node, vcpu)
                    .with_context(|| format!("bhyve refused the state of vCPU {}", vcpu.id))
            })
        })
    }
}

/// Does `what` while the VM's timers stand still.
fn paused<T>(node: &Node, what: impl FnOnce() -> Result<T>) -> Result<T> {
    super::already(node.number(node::PAUSE, 0)).context("bhyve refused to pause the VM")?;
    let result = what();
    let resumed = super::already(node.number(node::RESUME, 0));
    let value = result?;
    resumed.context("bhyve refused to resume the VM")?;
    Ok(value)
}

fn export_devices(node: &Node) -> io::Result<DeviceState> {
    fn of<T: Class>(node: &Node) -> io::Result<T> {
        state::read(node, WHOLE_VM)
    }
    Ok(DeviceState {
        atpic: of(node)?,
        atpit: of(node)?,
        hpet: of(node)?,
        ioapic: of(node)?,
        pm_timer: of(node)?,
        rtc: of(node)?,
    })
}

fn import_devices(node: &Node, devices: &DeviceState) -> io::Result<()> {
    state::write(node, WHOLE_VM, &devices.atpic)?;
    state::write(node, WHOLE_VM, &devices.atpit)?;
    state::write(node, WHOLE_VM, &devices.hpet)?;
    state::write(node, WHOLE_VM, &devices.ioapic)?;
    state::write(node, WHOLE_VM, &devices.pm_timer)?;
    state::write(node, WHOLE_VM, &devices.rtc)
}

fn export_vcpu(node: &Node, id: i32) -> Result<VcpuState> {
    read_vcpu(node, id).with_context(|| format!("bhyve does not tell the state of vCPU {id}"))
}

fn read_vcpu(node: &Node, id: i32) -> io::Result<VcpuState> {
    let mut run_state = VmRunState {
        vcpuid: id,
        ..Default::default()
    };
    node.request(&node::GET_RUN_STATE, &mut run_state)?;
    let mut msrs = state::read_fields(node, id, VDC_MSR)?;
    msrs.retain(|field| !MSRS_LEFT_OUT.contains(&field.ident));
    Ok(VcpuState {
        id,
        run_state,
        registers: registers::read_all(node, id)?,
        segments: registers::read_segments(node, id)?,
        msrs,
        fpu: read_fpu(node, id)?,
        lapic: state::read(node, id)?,
        pending: state::read_fields(node, id, VDC_VMM_ARCH)?,
        pmu: match state::read(node, id) {
            // No such class.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => None,
            other => Some(other?),
        },
    })
}

fn import_vcpu(node: &Node, vcpu: &VcpuState) -> io::Result<()> {
    let id = vcpu.id;
    registers::write_segments(node, id, &vcpu.segments)?;
    registers::write_all(node, id, &vcpu.registers)?;
    state::write_fields(node, id, VDC_MSR, &vcpu.msrs)?;
    write_fpu(node, id, &vcpu.fpu)?;
    state::write(node, id, &vcpu.lapic)?;
    state::write_fields(node, id, VDC_VMM_ARCH, &vcpu.pending)?;
    if let Some(pmu) = &vcpu.pmu {
        state::write(node, id, pmu)?;
    }
    if vcpu.run_state.state & VRS_PEND_INIT != 0 {
        let mut init = VmVcpuReset {
            vcpuid: id,
            kind: VRK_INIT,
        };
        node.request(&node::RESET_CPU, &mut init)?;
    }
    node.request(&node::SET_RUN_STATE, &mut run_state(vcpu.run_state))
        .map(drop)
}

/// A pending INIT as one that was served: the driver refuses VRS_PEND_INIT, which its check leaves out by mistake.
fn run_state(mut saved: VmRunState) -> VmRunState {
    if saved.state & VRS_PEND_INIT != 0 {
        saved.state = VRS_INIT | saved.state & VRS_PEND_SIPI;
    }
    saved
}

fn fpu_size(node: &Node) -> io::Result<usize> {
    let mut entries = [VmFpuDescEntry::default(); FPU_ENTRIES];
    let mut request = VmFpuDesc {
        entries: entries.as_mut_ptr(),
        req_size: 0,
        num_entries: FPU_ENTRIES as u32,
    };
    // SAFETY: `entries` has `num_entries` entries and lives during the call.
    unsafe { node.raw(VM_DESC_FPU_AREA, &mut request) }?;
    Ok(request.req_size.min(VM_DATA_XFER_LIMIT))
}

fn read_fpu(node: &Node, vcpu: i32) -> io::Result<Vec<u8>> {
    let mut area = vec![0; fpu_size(node)?];
    let mut request = VmFpuState {
        vcpuid: vcpu,
        buf: area.as_mut_ptr().cast(),
        len: area.len(),
    };
    // SAFETY: the buffer has `len` bytes and lives during the call.
    unsafe { node.raw(VM_GET_FPU, &mut request) }?;
    Ok(area)
}

fn write_fpu(node: &Node, vcpu: i32, area: &[u8]) -> io::Result<()> {
    let mut area = area.to_vec();
    let mut request = VmFpuState {
        vcpuid: vcpu,
        buf: area.as_mut_ptr().cast(),
        len: area.len(),
    };
    // SAFETY: as in `read_fpu`.
    unsafe { node.raw(VM_SET_FPU, &mut request) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pending_init_is_written_as_one_that_has_come() {
        let written = |state| {
            let saved = VmRunState {
                state,
                ..Default::default()
            };
            run_state(saved).state
        };
        assert_eq!(written(VRS_RUN), VRS_RUN);
        assert_eq!(written(VRS_RUN | VRS_PEND_SIPI), VRS_RUN | VRS_PEND_SIPI);
        assert_eq!(written(VRS_RUN | VRS_PEND_INIT), VRS_INIT);
        assert_eq!(
            written(VRS_HALT | VRS_PEND_INIT | VRS_PEND_SIPI),
            VRS_INIT | VRS_PEND_SIPI
        );
    }
}

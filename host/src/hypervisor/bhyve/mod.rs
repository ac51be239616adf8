//! illumos bhyve: a VM of the vmm driver, with its interrupt controllers, timers and clock in the kernel.
//!
//! All of it is compiled everywhere, for any [`driver::Driver`]; only `dev_vmm` knows the kernel's.

pub mod abi;
mod clocks;
mod cpuid;
mod create;
#[cfg(target_os = "illumos")]
pub mod dev_vmm;
mod dirty;
mod doorbells;
pub mod driver;
mod exits;
mod kick;
mod lines;
mod memory;
mod messages;
mod node;
mod registers;
pub mod reservoir;
mod rom_write;
pub mod saved;
mod state;
pub mod statistics;
mod time;
mod vcpu;

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

use self::abi::*;
use self::driver::Driver;
use self::memory::Roms;
use self::node::Node;
use self::vcpu::{Created, Shared};
use super::backing::Backing;
use super::cpuid::{CpuidProfile, table, warn_of_hidden_threads};
use super::rom::Rom;
use super::topology::APIC_ID_MAX;
use super::{CpuModel, Doorbell, Kind, Msi, MsiRoute, Vm};
use crate::memory::GuestMemory;

pub use self::vcpu::BhyveVcpu;

/// Local APIC ids have 8 bits, of which 0xff means all CPUs.
const VCPUS_MAX: u32 = APIC_ID_MAX + 1;

/// A VM of bhyve, made by driver `D`.
pub struct BhyveVm<D> {
    // Its thread uses the VM: it ends first.
    messages: messages::Messages,
    shared: Arc<Shared>,
    lines: lines::Lines,
    cpuid: CpuidProfile,
    max_vcpus: u32,
    /// Whether the CMOS clock has been set, which resets don't touch.
    clock_set: AtomicBool,
    driver: PhantomData<D>,
}

impl<D> fmt::Debug for BhyveVm<D> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("BhyveVm")
            .field("memory", &self.shared.memory)
            .field("max_vcpus", &self.max_vcpus)
            .finish_non_exhaustive()
    }
}

impl<D: Driver> Vm for BhyveVm<D> {
    const KIND: Kind = Kind::Bhyve;
    type Vcpu = BhyveVcpu;
    /// Whether it takes the place of a VM of the same name.
    type Begun = bool;

    /// The driver wants the VM's name first, and is quick.
    fn begin(force: bool) -> bool {
        force
    }

    fn create(
        force: bool,
        name: &str,
        bytes: u64,
        backing: &Backing,
        early: impl FnOnce(&Arc<GuestMemory>),
    ) -> Result<Self> {
        make::<D>(force, name, bytes, backing, early)
            .with_context(|| format!("Cannot create VM {name}"))
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.shared.memory
    }

    fn create_rom(&self, gpa: u64, len: u64) -> Result<Arc<Rom>> {
        self.shared.roms.create(&self.shared.node, gpa, len)
    }

    fn show_rom(&self, rom: &Rom, shown: bool) -> Result<()> {
        self.shared.roms.show(&self.shared.node, rom, shown)
    }

    fn cpuid(&self, model: &CpuModel) -> CpuidProfile {
        table(&self.cpuid, model, 0)
    }

    /// Only a VM can tell: one without memory is made for it, and goes at once.
    fn host_cpuid() -> Result<CpuidProfile> {
        let name = format!("vmm-host-cpuid-{}", std::process::id());
        let node = create::make(&create::open::<D>()?, &name, 0, false)?;
        cpuid::host(&node)
    }

    fn max_vcpus(&self) -> u32 {
        self.max_vcpus
    }

    fn create_vcpu(&self, cpu: u32, model: &CpuModel) -> Result<BhyveVcpu> {
        if cpu == 0 {
            warn_of_hidden_threads(&self.cpuid, model);
        }
        // A vCPU's number is its local APIC id, so numbers are left out where ids are.
        let id = model.topology.apic_id(cpu);
        ensure!(
            id < self.max_vcpus,
            "vCPU {cpu} of {} would have local APIC id {id}, and {} is the last of bhyve here: choose cores and threads that are \
             powers of two, or fewer CPUs",
            model.topology,
            self.max_vcpus - 1
        );
        let table = table(&self.cpuid, model, cpu);
        let features = table.get(1, 0).map_or(0, |[_, _, ecx, _]| ecx);
        let created = Created {
            id: id as i32,
            x2apic: features & cpuid::X2APIC != 0,
        };
        self.make_vcpu(created, &table)
            .with_context(|| format!("Cannot set up vCPU {cpu}"))
    }

    fn set_irq_line(&self, gsi: u32, high: bool) -> Result<()> {
        self.lines.set(&self.shared.node, gsi, high)
    }

    fn send_msi(&self, msi: Msi) -> Result<()> {
        messages::send(&self.shared.node, msi).with_context(|| format!("bhyve refused {msi:x?}"))
    }

    fn connect_msi(&self, fd: BorrowedFd<'_>, msi: Msi) -> Result<MsiRoute> {
        self.messages.connect(fd, msi)
    }

    fn update_msi(&self, route: &MsiRoute, msi: Msi) -> Result<()> {
        self.messages.update(route, msi)
    }

    fn disconnect_msi(&self, _: BorrowedFd<'_>, route: MsiRoute) -> Result<()> {
        self.messages.disconnect(&route)
    }

    fn bind_doorbell(&self, doorbell: Doorbell, fd: BorrowedFd<'_>) -> Result<bool> {
        self.shared.doorbells.bind(doorbell, fd).map(|()| true)
    }

    fn unbind_doorbell(&self, doorbell: Doorbell, _: BorrowedFd<'_>) -> Result<()> {
        self.shared.doorbells.unbind(doorbell)
    }

    fn set_level_triggered(&self, irqs: u16) -> Result<()> {
        lines::set_triggers(&self.shared.node, irqs)
    }

    fn inject_nmi(&self, apic_id: u32) -> Result<()> {
        ensure!(
            apic_id < self.max_vcpus,
            "There is no CPU with local APIC id {apic_id}"
        );
        let mut request = VmNmi {
            cpuid: apic_id as i32,
        };
        let sent = self.shared.node.request(&node::INJECT_NMI, &mut request);
        sent.with_context(|| {
            format!("bhyve refused an NMI for the CPU with local APIC id {apic_id}")
        })?;
        Ok(())
    }

    /// Devices and vCPUs are made anew, which makes vCPUs inactive and takes ROMs out of sight; RAM, CPUID tables and the CMOS clock
    /// stay.
    fn reset(&self) -> Result<()> {
        let Shared { node, roms, .. } = &*self.shared;
        already(node.number(node::PAUSE, 0)).context("bhyve refused to pause the VM")?;
        // Before version 16 the flag was needed; since, the driver ignores it.
        let mut request = VmReinit {
            flags: VM_REINIT_F_FORCE_SUSPEND,
        };
        node.request(&node::REINIT, &mut request)
            .context("bhyve refused to reset the VM")?;
        roms.show_again(node)?;
        self.shared.power_on_all()?;
        // The pause outlives REINIT.
        already(node.number(node::RESUME, 0)).context("bhyve refused to resume the VM")?;
        self.lines.raise_again(node)
    }

    fn start_clocks(&self, pm_timer: u16, cmos: &[(u8, u8)]) -> Result<bool> {
        let node = &self.shared.node;
        clocks::place_pm_timer(node, pm_timer)?;
        clocks::write_cmos(node, cmos)?;
        if !self.clock_set.swap(true, Ordering::AcqRel) {
            clocks::set_clock(node)?;
        }
        Ok(true)
    }
}

impl<D> BhyveVm<D> {
    fn make_vcpu(&self, created: Created, table: &CpuidProfile) -> Result<BhyveVcpu> {
        let node = &self.shared.node;
        vcpu::activate(node, created)?;
        cpuid::set(node, created.id, table)?;
        let mut request = VmCapability {
            cpuid: created.id,
            captype: VM_CAP_HALT_EXIT,
            capval: 1,
            allcpus: 0,
        };
        node.request(&node::SET_CAPABILITY, &mut request)
            .context("bhyve refused to take HLT from the guest")?;
        let all = &self.shared.created;
        all.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(created);
        Ok(BhyveVcpu::new(Arc::clone(&self.shared), created.id))
    }
}

fn make<D: Driver>(
    force: bool,
    name: &str,
    bytes: u64,
    backing: &Backing,
    early: impl FnOnce(&Arc<GuestMemory>),
) -> Result<BhyveVm<D>> {
    let flags = memory::create_flags(backing)?;
    crate::memory::check_size(bytes)?;
    let driver = create::open::<D>()?;
    let node = create::make(&driver, name, flags, force)?;
    let memory = Arc::new(memory::create_ram(&driver, &node, bytes, backing)?);
    early(&memory);
    let (cpuid, max_vcpus) = (cpuid::host(&node)?, max_vcpus(&node)?);
    let shared = Arc::new(Shared {
        roms: Roms::new(memory.regions().len()),
        node,
        memory,
        doorbells: Default::default(),
        msrs: Default::default(),
        created: Mutex::default(),
    });
    Ok(BhyveVm {
        messages: messages::Messages::start(Arc::clone(&shared))?,
        shared,
        lines: Default::default(),
        cpuid,
        max_vcpus,
        clock_set: AtomicBool::new(false),
        driver: PhantomData,
    })
}

/// 32, or 254 in some distributions' kernels.
fn max_vcpus(node: &Node) -> Result<u32> {
    let mut request = VmCpuTopology::default();
    node.request(&node::GET_TOPOLOGY, &mut request)
        .context("bhyve does not tell how many CPUs a VM can have")?;
    Ok(u32::from(request.maxcpus).min(VCPUS_MAX))
}

/// What is so already is no error.
fn already(result: io::Result<i32>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EALREADY) => Ok(()),
        other => other.map(drop),
    }
}

#[cfg(test)]
mod tests;

//! Linux KVM: a VM with in-kernel interrupt controllers and PIT, doorbells as ioeventfds, interrupts as irqfds.
//!
//! References are to the kernel's Documentation/virt/kvm/api.rst, by the name of the ioctl.
#![allow(unsafe_code)] // tells KVM where guest memory lies, and issues ioctls that kvm-ioctls lacks or that take eventfds by number

mod cpuid;
mod exits;
mod kick;
mod power_on;
mod routing;
mod vcpu;

use std::ffi::CStr;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_X86_USER_SPACE_MSR, KVM_IRQFD_FLAG_DEASSIGN, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_READONLY, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap,
    kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio, kvm_irqfd, kvm_msi, kvm_pit_config, kvm_reinject_control,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use rustix::io::Errno;
use rustix::ioctl::{Setter, ioctl, opcode};

pub use vcpu::KvmVcpu;

use super::backing::{Backing, Mapping};
use super::cpuid::{CpuidProfile, table, warn_of_hidden_threads};
use super::msr::UnknownMsrs;
use super::rom::{self, Rom};
use super::topology::APIC_ID_MAX;
use super::{CpuModel, Doorbell, Kind, Msi, MsiRoute, Space, Vm};
use crate::memory::GuestMemory;
use crate::thread;
use routing::Routing;

/// Three pages for real-mode emulation on old Intel CPUs (`KVM_SET_TSS_ADDR`), and one for its page table, in the
/// gap between the local APIC and the largest bootrom.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;

/// Where messages to local APICs go, and the delivery mode of an NMI in their data.
const MSI_ADDRESS: u64 = 0xfee0_0000;
const MSI_NMI: u32 = 0b100 << 8;

/// `KVMIO` of linux/kvm.h.
const KVMIO: u8 = 0xae;
type SetIrqfd = Setter<{ opcode::write::<kvm_irqfd>(KVMIO, 0x76) }, kvm_irqfd>;
/// `_IO`, although it takes an argument.
type SetReinject = Setter<{ opcode::none(KVMIO, 0x71) }, kvm_reinject_control>;
type SetIoeventfd = Setter<{ opcode::write::<kvm_ioeventfd>(KVMIO, 0x79) }, kvm_ioeventfd>;

/// A VM of Linux KVM.
#[derive(Debug)]
pub struct KvmVm {
    fd: VmFd,
    memory: Arc<GuestMemory>,
    /// Each in the slot after those of the guest's RAM that its place here says. Kept, because the guest has them mapped.
    roms: Mutex<Vec<Arc<Rom>>>,
    routing: Routing,
    cpuid: CpuidProfile,
    msrs: Arc<UnknownMsrs>,
    max_vcpus: u32,
}

impl Vm for KvmVm {
    const KIND: Kind = Kind::Kvm;
    type Vcpu = KvmVcpu;
    type Begun = KvmBegun;

    /// Names are not taken here.
    fn begin(_: bool) -> KvmBegun {
        KvmBegun(make())
    }

    fn create(
        begun: KvmBegun,
        name: &str,
        memory: u64,
        backing: &Backing,
        early: impl FnOnce(&Arc<GuestMemory>),
    ) -> Result<Self> {
        let describe = || format!("Cannot create VM {name}");
        let memory = Arc::new(GuestMemory::with(memory, backing).with_context(describe)?);
        early(&memory);
        let Empty {
            fd,
            cpuid,
            max_vcpus,
        } = begun.0.with_context(describe)?;
        map_memory(&fd, &memory).with_context(describe)?;
        create_devices(&fd).with_context(describe)?;
        let routing = Routing::default();
        routing.install(&fd).with_context(describe)?;
        Ok(Self {
            roms: Mutex::default(),
            routing,
            cpuid,
            msrs: Arc::default(),
            max_vcpus,
            fd,
            memory,
        })
    }

    /// Ticks of the PIT that a guest was too late for are lost, as on hardware and bhyve: KVM would deliver them all at once, one
    /// right behind the other, and a guest that can't keep up would do nothing else.
    ///
    /// KVM waits for two grace periods meanwhile, of up to 10 ms each, and keeps a guest's accesses to the PIT waiting as long: a thread
    /// does it once the guest runs.
    fn started(&self) {
        let spawned = borrow(&self.fd)
            .try_clone_to_owned()
            .and_then(|vm| thread::spawn("pit-ticks", move || drop_missed_ticks(&vm)));
        if let Err(error) = spawned {
            log::warn!("The PIT's missed ticks can't be dropped without a thread: {error}");
        }
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn create_rom(&self, gpa: u64, len: u64) -> Result<Arc<Rom>> {
        let mut roms = self.roms.lock().unwrap_or_else(PoisonError::into_inner);
        rom::check(gpa, len)?;
        let mapping = Mapping::anonymous(usize::try_from(len)?)?;
        let rom = Arc::new(Rom::new(gpa, mapping));
        self.map_rom(&rom, roms.len(), true)?;
        roms.push(Arc::clone(&rom));
        Ok(rom)
    }

    fn show_rom(&self, rom: &Rom, shown: bool) -> Result<()> {
        let roms = self.roms.lock().unwrap_or_else(PoisonError::into_inner);
        let known = roms
            .iter()
            .position(|other| std::ptr::eq(Arc::as_ptr(other), rom));
        let index = known.context("It is no ROM of this VM")?;
        self.map_rom(rom, index, shown)
    }

    fn host_cpuid() -> Result<CpuidProfile> {
        supported_cpuid(&open(c"/dev/kvm")?)
    }

    fn max_vcpus(&self) -> u32 {
        self.max_vcpus
    }

    fn cpuid(&self, model: &CpuModel) -> CpuidProfile {
        table(&self.cpuid, model, 0)
    }

    fn create_vcpu(&self, cpu: u32, model: &CpuModel) -> Result<KvmVcpu> {
        if cpu == 0 {
            warn_of_hidden_threads(&self.cpuid, model);
        }
        let cpuid = cpuid::for_vcpu(&self.cpuid, model, cpu);
        // KVM takes a vCPU's number for its local APIC id.
        let id = model.topology.apic_id(cpu);
        let fd = self
            .fd
            .create_vcpu(u64::from(id))
            .with_context(|| format!("KVM refused vCPU {cpu} with local APIC id {id}"))?;
        let shared = (Arc::clone(&self.memory), Arc::clone(&self.msrs));
        KvmVcpu::new(fd, cpu == 0, &cpuid, shared)
            .with_context(|| format!("Cannot set up vCPU {cpu}"))
    }

    fn set_irq_line(&self, gsi: u32, high: bool) -> Result<()> {
        ensure!(gsi < routing::LINES, "There is no interrupt line {gsi}");
        self.fd
            .set_irq_line(gsi, high)
            .with_context(|| format!("KVM refused interrupt line {gsi}"))
    }

    fn send_msi(&self, msi: Msi) -> Result<()> {
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // 0 says that the guest blocks the interrupt, as hardware would silently do.
        self.fd
            .signal_msi(message)
            .with_context(|| format!("KVM refused {msi:x?}"))?;
        Ok(())
    }

    fn connect_msi(&self, fd: BorrowedFd<'_>, msi: Msi) -> Result<MsiRoute> {
        let gsi = self.routing.add(&self.fd, msi)?;
        if let Err(error) = self.irqfd(fd, gsi, 0) {
            self.routing.remove(gsi);
            return Err(error).context("KVM refused to bind an eventfd to an interrupt");
        }
        Ok(MsiRoute(gsi))
    }

    fn update_msi(&self, route: &MsiRoute, msi: Msi) -> Result<()> {
        self.routing.update(&self.fd, route.0, msi)
    }

    fn disconnect_msi(&self, fd: BorrowedFd<'_>, route: MsiRoute) -> Result<()> {
        self.irqfd(fd, route.0, KVM_IRQFD_FLAG_DEASSIGN)
            .context("KVM refused to unbind an eventfd from an interrupt")?;
        self.routing.remove(route.0);
        Ok(())
    }

    fn bind_doorbell(&self, doorbell: Doorbell, fd: BorrowedFd<'_>) -> Result<bool> {
        match self.ioeventfd(doorbell, fd, 0) {
            Ok(()) => Ok(true),
            // KVM's bus is full: the write simply stays an exit.
            Err(Errno::NOSPC) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("KVM refused {doorbell:x?}")),
        }
    }

    fn unbind_doorbell(&self, doorbell: Doorbell, fd: BorrowedFd<'_>) -> Result<()> {
        self.ioeventfd(doorbell, fd, 1 << kvm_ioeventfd_flag_nr_deassign)
            .with_context(|| format!("KVM does not know {doorbell:x?}"))
    }

    fn set_level_triggered(&self, irqs: u16) -> Result<()> {
        power_on::set_trigger_modes(&self.fd, irqs)
    }

    /// As a message with delivery mode NMI (Intel SDM volume 3, section 11.11.2): KVM_NMI is an ioctl of the vCPU, which waits
    /// until that leaves the guest by itself.
    fn inject_nmi(&self, apic_id: u32) -> Result<()> {
        ensure!(
            apic_id <= APIC_ID_MAX,
            "There is no CPU with local APIC id {apic_id}"
        );
        self.send_msi(Msi {
            address: MSI_ADDRESS | u64::from(apic_id) << 12,
            data: MSI_NMI,
        })
        .with_context(|| format!("KVM refused an NMI for the CPU with local APIC id {apic_id}"))
    }

    fn reset(&self) -> Result<()> {
        power_on::reset_chips(&self.fd)
    }

    fn start_clocks(&self, _: u16, _: &[(u8, u8)]) -> Result<bool> {
        Ok(false)
    }
}

/// A VM without anything in it.
#[derive(Debug)]
pub struct KvmBegun(Result<Empty>);

/// That VM, and what KVM allows in it.
#[derive(Debug)]
struct Empty {
    fd: VmFd,
    cpuid: CpuidProfile,
    max_vcpus: u32,
}

/// KVM_CREATE_VM may wait for grace periods of the kernel's RCU, milliseconds each, and where KVM runs in a VM itself, each of the
/// leaves that KVM_GET_SUPPORTED_CPUID asks the processor for is an exit: 0.3 ms together.
fn make() -> Result<Empty> {
    let kvm = open(c"/dev/kvm")?;
    let fd = create_vm(&kvm)?;
    take_unknown_msrs(&kvm, &fd)?;
    Ok(Empty {
        fd,
        cpuid: supported_cpuid(&kvm)?,
        // Local APIC ids have 8 bits, of which 0xff means all CPUs.
        max_vcpus: kvm.get_max_vcpus().min(255) as u32,
    })
}

impl KvmVm {
    /// Sets the slot of ROM number `index`; a slot of no size is none.
    fn map_rom(&self, rom: &Rom, index: usize, shown: bool) -> Result<()> {
        let slot = kvm_userspace_memory_region {
            slot: (self.memory.regions().len() + index) as u32,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: rom.gpa(),
            memory_size: if shown { rom.len() } else { 0 },
            userspace_addr: rom.host() as u64,
        };
        // SAFETY: the range is mapped for as long as the ROM, which `roms` keeps as long as the VM, and the host accesses it
        // only as memory that is read at any time.
        unsafe { self.fd.set_user_memory_region(slot) }
            .with_context(|| format!("KVM refused the ROM at {:#x}", rom.gpa()))
    }

    fn irqfd(&self, fd: BorrowedFd<'_>, gsi: u32, flags: u32) -> Result<(), Errno> {
        let argument = kvm_irqfd {
            fd: fd.as_raw_fd() as u32,
            gsi,
            flags,
            ..Default::default()
        };
        // SAFETY: KVM_IRQFD reads a kvm_irqfd, and takes a reference of its own to the eventfd.
        unsafe { ioctl(borrow(&self.fd), SetIrqfd::new(argument)) }
    }

    fn ioeventfd(
        &self,
        doorbell: Doorbell,
        fd: BorrowedFd<'_>,
        mut flags: u32,
    ) -> Result<(), Errno> {
        if doorbell.space == Space::Pio {
            flags |= 1 << kvm_ioeventfd_flag_nr_pio;
        }
        if doorbell.value.is_some() {
            flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
        }
        let argument = kvm_ioeventfd {
            datamatch: doorbell.value.unwrap_or(0),
            addr: doorbell.address,
            len: u32::from(doorbell.width),
            fd: fd.as_raw_fd(),
            flags,
            ..Default::default()
        };
        // SAFETY: KVM_IOEVENTFD reads a kvm_ioeventfd, and takes a reference of its own to the eventfd.
        unsafe { ioctl(borrow(&self.fd), SetIoeventfd::new(argument)) }
    }
}

fn borrow(fd: &VmFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open as long as `fd` is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

fn open(path: &CStr) -> Result<Kvm> {
    let kvm = Kvm::new_with_path(path).map_err(|error| open_error(std::io::Error::from(error)))?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        bail!(
            "/dev/kvm speaks version {version} of its interface, which should be {KVM_API_VERSION}"
        );
    }
    let needed = [
        (Cap::Irqchip, "in-kernel interrupt controllers"),
        (Cap::Pit2, "the in-kernel PIT"),
        (
            Cap::ReinjectControl,
            "a PIT whose missed ticks can be dropped",
        ),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::Irqfd, "irqfd"),
        (Cap::IrqRouting, "interrupt routing"),
        (Cap::SignalMsi, "MSI"),
        (Cap::ImmediateExit, "immediate_exit"),
        (Cap::ReadonlyMem, "read-only memory"),
    ];
    for (capability, what) in needed {
        if !kvm.check_extension(capability) {
            bail!("This kernel's KVM lacks {what}: Linux 4.12 or later has it");
        }
    }
    Ok(kvm)
}

/// Why `/dev/kvm` does not open, and what to do about it.
fn open_error(error: std::io::Error) -> anyhow::Error {
    let remedy = match (error.kind(), error.raw_os_error()) {
        (ErrorKind::NotFound, _) | (_, Some(libc::ENXIO | libc::ENODEV)) => {
            "load KVM with \"modprobe kvm_intel\" or \"modprobe kvm_amd\"; if that fails, enable virtualisation in the \
             firmware setup or, inside a VM, nested virtualisation for that VM"
        }
        (ErrorKind::PermissionDenied, _) => {
            "join the group that owns it, as with \"adduser USER kvm\" and a new login, or run as root"
        }
        _ => "KVM is there but can't be used now",
    };
    anyhow!("Cannot open /dev/kvm: {error}: {remedy}")
}

fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    loop {
        match kvm.create_vm() {
            Ok(fd) => return Ok(fd),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) if error.errno() == libc::EBUSY => {
                bail!(
                    "KVM is busy: another hypervisor holds this machine's virtualisation; stop it first"
                )
            }
            Err(error) => return Err(error).context("KVM refused to create a VM"),
        }
    }
}

/// Before the interrupt controllers: afterwards each region costs an SRCU grace period (7.4 against 1.3 ms for both,
/// measured on a software-virtualised KVM).
fn map_memory(fd: &VmFd, memory: &GuestMemory) -> Result<()> {
    for (slot, region) in memory.regions().iter().enumerate() {
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.gpa,
            memory_size: region.len,
            userspace_addr: region.host().as_ptr() as u64,
        };
        // SAFETY: the range is mapped for as long as the memory lives, which every vCPU keeps alive, and the host
        // accesses it only as memory that changes at any time.
        unsafe { fd.set_user_memory_region(slot) }
            .with_context(|| format!("KVM refused guest memory at {:#x}", region.gpa))?;
    }
    Ok(())
}

fn supported_cpuid(kvm: &Kvm) -> Result<CpuidProfile> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .context("KVM does not tell its CPU features")?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    Ok(cpuid::host(supported.as_slice(), tsc_deadline))
}

/// Has accesses to registers that KVM does not know come out (`KVM_CAP_X86_USER_SPACE_MSR`), from Linux 5.10 on; before,
/// they are exceptions in the guest. A bad access to a register that KVM knows stays an exception, as on hardware: guests
/// find out so what a CPU lacks.
fn take_unknown_msrs(kvm: &Kvm, fd: &VmFd) -> Result<()> {
    if !kvm.check_extension(Cap::X86UserSpaceMsr) {
        return Ok(());
    }
    let mut capability = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        ..Default::default()
    };
    capability.args[0] = u64::from(KVM_MSR_EXIT_REASON_UNKNOWN);
    fd.enable_cap(&capability)
        .context("KVM refused to hand over unknown MSRs")
}

fn create_devices(fd: &VmFd) -> Result<()> {
    fd.set_identity_map_address(IDENTITY_MAP)
        .context("KVM refused its identity map page")?;
    fd.set_tss_address(TSS)
        .context("KVM refused its TSS pages")?;
    fd.create_irq_chip()
        .context("KVM refused in-kernel interrupt controllers")?;
    // The speaker's port 0x61 is what Linux calibrates its clock with.
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    fd.create_pit2(pit).context("KVM refused the PIT")
}

fn drop_missed_ticks(vm: &OwnedFd) {
    let reinject = kvm_reinject_control::default();
    // SAFETY: KVM_REINJECT_CONTROL reads a kvm_reinject_control.
    if let Err(error) = unsafe { ioctl(vm, SetReinject::new(reinject)) } {
        log::warn!("KVM refused to drop the PIT's missed ticks: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keeps_kvm_from_opening_comes_with_a_remedy() {
        let missing = open(c"/nonexistent/kvm").unwrap_err().to_string();
        assert!(
            missing.contains("Cannot open /dev/kvm") && missing.contains("modprobe kvm_amd"),
            "{missing}"
        );
        let denied = open_error(std::io::Error::from_raw_os_error(libc::EACCES)).to_string();
        assert!(denied.contains("adduser USER kvm"), "{denied}");
        let unloaded = open_error(std::io::Error::from_raw_os_error(libc::ENODEV)).to_string();
        assert!(unloaded.contains("nested virtualisation"), "{unloaded}");
        let other = open(c"/dev/null").unwrap_err().to_string();
        assert!(other.contains("version"), "{other}");
    }
}

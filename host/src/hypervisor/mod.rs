//! The machine underneath: one pair of traits, [`Vm`] and [`Vcpu`], in guest terms, and an implementation
//! per operating system (`kvm` on Linux, `bhyve` on illumos).
//!
//! Nothing outside this folder asks which one runs, but for the check of what a VM file calls it, and nothing outside it carries
//! `cfg(target_os)`.
//! The traits are called, never boxed: code is generic over [`Vm`], and `main` names the [`Backend`] that the target selects.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::memory::GuestMemory;
use cpuid::CpuidProfile;
use rom::Rom;
use topology::Topology;

pub mod affinity;
pub mod backing;
pub mod bhyve;
pub mod cpuid;
pub mod gathering;
#[cfg(target_os = "linux")]
pub mod kvm;
pub mod msr;
pub mod resident;
pub mod rom;
#[cfg(test)]
pub(crate) mod tests;
pub mod topology;
#[cfg(not(any(target_os = "linux", target_os = "illumos")))]
pub mod unsupported;

#[cfg(target_os = "linux")]
pub use kvm::KvmVm as Backend;
#[cfg(not(any(target_os = "linux", target_os = "illumos")))]
pub use unsupported::UnsupportedVm as Backend;

/// What `main` runs VMs with.
#[cfg(target_os = "illumos")]
pub type Backend = bhyve::BhyveVm<bhyve::dev_vmm::DevVmmCtl>;

/// The hypervisors that there are, by the names that `[main] hypervisor` has for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Linux KVM.
    Kvm,
    /// illumos bhyve.
    Bhyve,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Kvm, Self::Bhyve];

    /// Its name in VM files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Kvm => "kvm",
            Kind::Bhyve => "bhyve",
        }
    }

    /// The system that has it.
    #[must_use]
    pub fn system(self) -> &'static str {
        match self {
            Kind::Kvm => "Linux",
            Kind::Bhyve => "illumos",
        }
    }

    /// The longest name of a VM in bytes, if it has a limit: with bhyve, names are those of nodes below `/dev/vmm`.
    #[must_use]
    pub fn name_max(self) -> Option<usize> {
        match self {
            Kind::Kvm => None,
            Kind::Bhyve => Some(bhyve::abi::VM_MAX_NAMELEN - 1),
        }
    }

    /// Whether it makes guest memory itself, of what its kernel keeps for VMs or has free.
    #[must_use]
    pub fn makes_memory(self) -> bool {
        self == Kind::Bhyve
    }
}

/// A message signalled interrupt: what a PCI function writes where (PCI 3.0 section 6.8.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msi {
    /// Message address, `0xfee0_0000` based on x86.
    pub address: u64,
    /// Message data: vector and delivery mode.
    pub data: u32,
}

/// A guest write that only signals: bound to an eventfd so that it needs no exit to userspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Port or memory address space.
    pub space: Space,
    /// Guest address of the register.
    pub address: u64,
    /// Access width in bytes (1, 2, 4 or 8), or 0 for any width.
    pub width: u8,
    /// Only this value signals; `None` takes every value.
    pub value: Option<u64>,
}

/// The two address spaces of an x86 guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Ports 0 to 0xffff.
    Pio,
    /// Guest physical memory.
    Mmio,
}

/// What the CPUs of a VM are to its guest.
#[derive(Clone, Debug)]
pub struct CpuModel {
    /// How many there are, and where.
    pub topology: Topology,
    /// What CPUID says; without one, what this machine's CPUs and the hypervisor offer.
    pub profile: Option<Arc<CpuidProfile>>,
    /// Whether guests without a profile are offered the x2APIC, if there is one.
    pub x2apic: bool,
}

/// What answers the guest's register accesses while a vCPU runs. `width` is 1, 2, 4 or 8 bytes; a read's
/// result is truncated to it.
pub trait ExitHandler {
    /// The guest read from a port.
    fn pio_read(&mut self, port: u16, width: u8) -> u32;
    /// The guest wrote to a port.
    fn pio_write(&mut self, port: u16, width: u8, value: u32);
    /// The guest read memory that is not RAM.
    fn mmio_read(&mut self, address: u64, width: u8) -> u64;
    /// The guest wrote to memory that is not RAM.
    fn mmio_write(&mut self, address: u64, width: u8, value: u64);
}

/// Why [`Vcpu::run`] returned. Register accesses never get here: they went to the [`ExitHandler`].
#[derive(Debug)]
pub enum Exit {
    /// [`Kick::kick`] or a signal: look for work, then run again.
    Kicked,
    /// Triple fault, or a reset that the hypervisor itself saw.
    TripleFault,
    /// Every vCPU halts with interrupts disabled (only hypervisors that detect it themselves report this).
    Halted,
    /// Another process has destroyed the VM (only hypervisors whose VMs have names let one). Nothing of it can be used further.
    Destroyed,
    /// The hypervisor can't go on with this guest. The text says in words what happened.
    Crash(String),
}

impl Exit {
    /// What happened, in a word or two.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kicked => "kicked",
            Self::TripleFault => "triple fault",
            Self::Halted => "halted",
            Self::Destroyed => "destroyed",
            Self::Crash(_) => "crash",
        }
    }
}

/// One virtual CPU. Owned and run by its own thread.
pub trait Vcpu: Send {
    /// Runs the guest until something other than a register access happens.
    ///
    /// # Errors
    /// The hypervisor refused to run; the vCPU can't be used further.
    fn run(&mut self, handler: &mut dyn ExitHandler) -> anyhow::Result<Exit>;

    /// A handle by which any thread can make [`Vcpu::run`] return [`Exit::Kicked`].
    fn kick_handle(&self) -> Arc<dyn Kick>;

    /// Back to power-on state (Intel SDM volume 3, table 10-1). CPU 0 becomes runnable, the others wait for INIT/SIPI.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn reset(&mut self) -> anyhow::Result<()>;

    /// Reads general, control and segment registers, for diagnosis and direct boot.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn registers(&self) -> anyhow::Result<Registers>;

    /// Sets them.
    ///
    /// # Errors
    /// The hypervisor refused, as it does for values no CPU could hold.
    fn set_registers(&mut self, registers: &Registers) -> anyhow::Result<()>;

    /// Sets model-specific registers that [`Registers`] has no fields for, each an index and a value, in this order.
    ///
    /// # Errors
    /// The hypervisor doesn't know one, or refused its value: those before it are set.
    fn set_msrs(&mut self, values: &[(u32, u64)]) -> anyhow::Result<()>;

    /// Whether this vCPU waits in HLT with interrupts disabled, or was never started, so that nothing but an NMI,
    /// another CPU or a reset wakes it. Asked only on the thread that runs it, between two runs.
    fn halted_for_good(&self) -> bool;
}

/// Makes a running vCPU leave the guest.
pub trait Kick: Send + Sync {
    /// Forces the next, or the present, [`Vcpu::run`] to return soon. Callable from any thread at any time.
    fn kick(&self);

    /// How often the vCPU has left the guest for anything but a kick. A figure that stands still says that the
    /// vCPU computes without I/O, or halts.
    fn exits(&self) -> u64;
}

/// One virtual machine with its in-kernel interrupt controllers (two 8259, one I/O APIC, a local APIC per CPU) and PIT.
pub trait Vm: Send + Sync + Sized + 'static {
    /// Which one it is.
    const KIND: Kind;
    /// The vCPU that belongs to it.
    type Vcpu: Vcpu;
    /// A VM that is being made, see [`Vm::begin`].
    type Begun;

    /// Begins to make a VM, with what takes long and needs nothing of the VM file: that is read on another thread meanwhile. With `force`
    /// the VM takes the place of one of the same name, where the hypervisor has names.
    fn begin(force: bool) -> Self::Begun;

    /// Makes of `begun` the VM with `memory` bytes of RAM (as [`crate::memory::layout`] places them) made of what `backing` says, in the
    /// order that is cheapest for this hypervisor. It makes the memory too, since some hypervisors own it, and calls `early` as soon
    /// as that can be filled, which may be long before the VM is done.
    ///
    /// # Errors
    /// No hypervisor, no permission, a size that [`crate::memory::check_size`] refuses, or out of resources: the
    /// message says what to do.
    fn create(
        begun: Self::Begun,
        name: &str,
        memory: u64,
        backing: &backing::Backing,
        early: impl FnOnce(&Arc<GuestMemory>),
    ) -> anyhow::Result<Self>;

    /// The guest runs now, for the first time: what was better left until then. Returns soon.
    fn started(&self) {}

    /// The guest's RAM.
    fn memory(&self) -> &Arc<GuestMemory>;

    /// Makes `len` zero bytes at guest address `gpa`, both whole pages, that the guest reads and executes without an exit.
    /// Its writes there reach the [`ExitHandler`].
    ///
    /// # Errors
    /// Out of memory, or the hypervisor has something else there.
    fn create_rom(&self, gpa: u64, len: u64) -> anyhow::Result<Arc<Rom>>;

    /// Takes a ROM of this VM out of the guest's sight, so that its reads reach the [`ExitHandler`] too, or puts it back.
    /// Callable while vCPUs run.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn show_rom(&self, rom: &Rom, shown: bool) -> anyhow::Result<()>;

    /// What CPUID tells the first of CPUs like these.
    fn cpuid(&self, model: &CpuModel) -> CpuidProfile;

    /// What CPUID tells a guest without a profile, before it is made for one CPU. Needs no VM.
    ///
    /// # Errors
    /// No hypervisor, or no permission: the message says what to do.
    fn host_cpuid() -> anyhow::Result<CpuidProfile>;

    /// The largest number of vCPUs this host allows.
    fn max_vcpus(&self) -> u32;

    /// Adds vCPU `cpu`, counted from 0, of a VM whose CPUs are `model`. Its local APIC id is what
    /// [`Topology::apic_id`] says.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn create_vcpu(&self, cpu: u32, model: &CpuModel) -> anyhow::Result<Self::Vcpu>;

    /// Drives interrupt line `gsi` (0 to 23): the I/O APIC pin of that number, and below 16 also the 8259 input. As
    /// on every PC, line 0 (the PIT) reaches I/O APIC pin 2, and line 2 the 8259 cascade alone.
    ///
    /// # Errors
    /// No such line.
    fn set_irq_line(&self, gsi: u32, high: bool) -> anyhow::Result<()>;

    /// Delivers one message signalled interrupt now.
    ///
    /// # Errors
    /// The message names no destination.
    fn send_msi(&self, msi: Msi) -> anyhow::Result<()>;

    /// From now on each count written to `fd` delivers `msi`, without userspace where the hypervisor can.
    ///
    /// # Errors
    /// Out of routes or descriptors.
    fn connect_msi(&self, fd: BorrowedFd<'_>, msi: Msi) -> anyhow::Result<MsiRoute>;

    /// Changes what `route` delivers. No interrupt is lost meanwhile.
    ///
    /// # Errors
    /// The hypervisor refused; the route keeps its old message.
    fn update_msi(&self, route: &MsiRoute, msi: Msi) -> anyhow::Result<()>;

    /// Ends a route; counts written to its fd stay there, to be read by whoever holds it.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn disconnect_msi(&self, fd: BorrowedFd<'_>, route: MsiRoute) -> anyhow::Result<()>;

    /// Binds a doorbell to an eventfd. `Ok(false)`: this hypervisor can't, so the write reaches the
    /// [`ExitHandler`] as any other, and the device handles it there.
    ///
    /// # Errors
    /// The hypervisor could, but refused this one (address taken, out of resources).
    fn bind_doorbell(&self, doorbell: Doorbell, fd: BorrowedFd<'_>) -> anyhow::Result<bool>;

    /// Undoes [`Vm::bind_doorbell`].
    ///
    /// # Errors
    /// It was not bound.
    fn unbind_doorbell(&self, doorbell: Doorbell, fd: BorrowedFd<'_>) -> anyhow::Result<()>;

    /// Makes the 8259s take the inputs whose bits are set in `irqs` as levels and the others as edges, as firmware does by
    /// their trigger mode registers (0x4d0, 0x4d1). Inputs that can only be edges (0, 1, 2, 8, 13) stay so. [`Vm::reset`] makes all
    /// of them edges again.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn set_level_triggered(&self, irqs: u16) -> anyhow::Result<()>;

    /// Delivers a non-maskable interrupt to the CPU with this local APIC id, as the NMI button of a PC does. From any thread.
    ///
    /// # Errors
    /// No CPU can have this id, or the hypervisor refused.
    fn inject_nmi(&self, apic_id: u32) -> anyhow::Result<()>;

    /// Puts the in-kernel devices back to power-on state. Called while no vCPU runs; RAM, routes and doorbells stay.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn reset(&self) -> anyhow::Result<()>;

    /// Sets up the CMOS clock and the ACPI PM timer, if the hypervisor has them: the timer's port is `pm_timer`, and the battery-backed
    /// memory holds `cmos`, each an address and a value. `Ok(false)`: it has none, and the board makes them. Once before the guest
    /// runs, when the clock is set to the host's, and again after each [`Vm::reset`].
    ///
    /// # Errors
    /// The hypervisor refused.
    fn start_clocks(&self, pm_timer: u16, cmos: &[(u8, u8)]) -> anyhow::Result<bool>;
}

/// A route from an eventfd to an interrupt, made by [`Vm::connect_msi`].
#[derive(Debug, PartialEq, Eq)]
pub struct MsiRoute(pub(crate) u32);

/// A segment register with its hidden part (Intel SDM volume 3, section 3.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Type (3:0), S (4), DPL (6:5), P (7), AVL (12), L (13), D/B (14), G (15), unusable (16).
    pub access: u32,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// The registers that direct boot sets and diagnosis prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the field names are the registers' own
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

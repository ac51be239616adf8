//! The board: what every PC guest needs around its CPUs, and nothing that a VM file names as a device.
//!
//! [`Machine`] owns both buses, the PCI root, the interrupt lines and the chipset: i440FX, PIIX3 and PIIX4 as guests know
//! them. Devices are added to it; it decides where they are and carries their interrupts.

pub mod acpi;
pub mod e820;
mod i440fx;
mod isa;
pub mod pm;
pub mod power;
pub mod reset;
pub mod rtc;

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

use self::acpi::IsaDevice;
use self::pm::Pm;
use self::power::EventSender;
use self::reset::{KeyboardPorts, ResetControl};
use self::rtc::Rtc;
use crate::bus::{BusAccess, Buses, Registers};
use crate::hypervisor::{Space, Vm};
use crate::memory::{GuestMemory, HIGH_START};
use crate::pci::{
    Aperture, Apertures, Bdf, CONFIG_PORTS, CONFIG_PORTS_LEN, ConfigPorts, Ecam, Function,
    IrqLines, IrqPin, LiveCapability, PciFunctionDesc, Root, Target,
};

pub use isa::{IsaDesc, IsaHandle, IsaPin, IsaRegion};

/// Memory mapped configuration space, one MiB for each of 256 buses.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Its size.
pub const ECAM_LEN: u64 = 256 << 20;
/// I/O APIC, in the hypervisor.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Local APICs, in the hypervisor.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Memory BARs below 4 GiB.
const MMIO32: Aperture = Aperture {
    first: 0xc000_0000,
    last: 0xdfff_ffff,
};
/// I/O BARs: above everything that ISA devices and the chipset have at fixed places.
const IO: Aperture = Aperture {
    first: 0xc000,
    last: 0xffff,
};
/// Memory BARs above RAM end here: every 64-bit CPU has at least 36 address bits, and most guests map 39 or more.
const MMIO64_LEN: u64 = 64 << 30;

/// Ports that the hypervisor answers: 8259 pair, PIT, speaker gate, 8259 trigger modes. First, count, whose.
const HYPERVISOR_PORTS: [(u64, u64, &str); 5] = [
    (0x20, 2, "the first interrupt controller"),
    (0x40, 4, "the interval timer"),
    (0x61, 1, "the interval timer's gate"),
    (0xa0, 2, "the second interrupt controller"),
    (0x4d0, 2, "the interrupt controllers"),
];

/// What a board has beyond what every guest needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Board {
    /// The PC of old: PIIX3 and PIIX4 functions, and ACPI's fixed hardware. Without, ACPI is of the hardware-reduced kind, and
    /// a guest that goes by it touches no 8259, interval timer, CMOS clock or power management block.
    pub legacy: bool,
    /// A PCI root that guests are told of.
    pub pci: bool,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            legacy: true,
            pci: true,
        }
    }
}

/// One machine without its CPUs. All methods may be called on any thread; those that change what there is are meant
/// for the time before the guest runs.
pub struct Machine<V: Vm> {
    buses: Arc<Buses>,
    lines: Arc<IrqLines<V>>,
    root: Arc<Root<V>>,
    config_ports: Arc<ConfigPorts<V>>,
    pm: Arc<Pm<V>>,
    rtc: Arc<Rtc>,
    apertures: Apertures,
    cpus: u32,
    board: Board,
    isa: Mutex<Vec<IsaDevice>>,
}

impl<V: Vm> Machine<V> {
    /// The bare board for `cpus` CPUs and this memory, with what `board` says. `events` hears of power off and reset; it is called on vCPU threads.
    ///
    /// # Errors
    /// Memory lies where the board has something else.
    pub fn new(
        vm: Arc<V>,
        memory: &GuestMemory,
        cpus: u32,
        board: Board,
        events: EventSender,
    ) -> Result<Self> {
        let buses = Arc::new(Buses::default());
        let lines = IrqLines::new(Arc::clone(&vm));
        let root = Root::new(vm, Arc::clone(&buses), Arc::clone(&lines));
        let sci = lines
            .pin(u32::from(pm::SCI))
            .context("the system control interrupt has no line")?;
        let reset = Arc::new(ResetControl::new(Arc::clone(&events)));
        let config_ports = Arc::new(ConfigPorts::new(Arc::clone(&root), reset));
        let pm = Arc::new(Pm::new(sci, Arc::clone(&events)));
        let rtc = Arc::new(Rtc::default());
        reserve(&buses, memory)?;
        let claim = |owner: &str, regions: &[IsaRegion], target: Arc<dyn Registers>| {
            isa::claim(&buses, owner, regions, &target)
        };
        let ecam = IsaRegion {
            id: 0,
            space: Space::Mmio,
            address: ECAM_BASE,
            size: ECAM_LEN,
        };
        claim(
            "PCI configuration space",
            &[ecam],
            Arc::new(Ecam::new(Arc::clone(&root))),
        )?;
        let ports = [IsaRegion::ports_at(0, CONFIG_PORTS, CONFIG_PORTS_LEN)];
        claim("PCI configuration ports", &ports, config_ports.clone())?;
        let blocks = [
            IsaRegion::ports_at(pm::REGION_PM, pm::PM_BASE, pm::PM_LEN),
            IsaRegion::ports_at(pm::REGION_GPE0, pm::GPE0_BASE, u16::from(pm::GPE0_LEN)),
        ];
        claim("power management", &blocks, pm.clone())?;
        claim(
            "the CMOS clock",
            &[IsaRegion::ports_at(0, rtc::RTC_PORT, 2)],
            rtc.clone(),
        )?;
        let keyboard = [
            IsaRegion::ports_at(reset::REGION_DATA, reset::KEYBOARD_DATA, 1),
            IsaRegion::ports_at(reset::REGION_STATUS, reset::KEYBOARD_STATUS, 1),
        ];
        claim(
            "the keyboard controller",
            &keyboard,
            Arc::new(KeyboardPorts::new(events)),
        )?;
        // The host bridge is what makes a guest believe in the configuration ports.
        let functions = if board.legacy { usize::MAX } else { 1 };
        for function in i440fx::functions().into_iter().take(functions) {
            let target = Target {
                registers: Arc::new(i440fx::NoRegisters),
                live: None,
            };
            root.add(
                &Arc::from(function.name),
                function.bdf,
                &function.desc,
                &function.registers,
                target,
            )?;
        }
        let apertures = Apertures {
            io: IO,
            mmio32: MMIO32,
            mmio64: mmio64(memory),
        };
        Ok(Self {
            buses,
            lines,
            root,
            config_ports,
            pm,
            rtc,
            apertures,
            cpus,
            board,
            isa: Mutex::default(),
        })
    }

    /// What one vCPU thread hands to [`Vcpu::run`](crate::hypervisor::Vcpu::run).
    #[must_use]
    pub fn exit_handler(&self) -> BusAccess {
        self.buses.exit_handler()
    }

    /// Both buses.
    #[must_use]
    pub fn buses(&self) -> &Arc<Buses> {
        &self.buses
    }

    /// PCI bus 0.
    #[must_use]
    pub fn root(&self) -> &Arc<Root<V>> {
        &self.root
    }

    /// Adds a device at fixed addresses, with its interrupt pins.
    ///
    /// # Errors
    /// An address is taken (both owners are named), a line doesn't exist, or the hardware id is none.
    pub fn add_isa(
        &self,
        owner: &str,
        desc: &IsaDesc,
        target: &Arc<dyn Registers>,
    ) -> Result<IsaHandle<V>> {
        if let Some(hid) = &desc.hid {
            acpi::check_hid(hid).with_context(|| owner.to_owned())?;
        }
        let pins = desc
            .pins
            .iter()
            .map(|pin| self.isa_pin(owner, *pin))
            .collect::<Result<Vec<_>>>()?;
        isa::claim(&self.buses, owner, &desc.regions, target)?;
        if let Some(hid) = &desc.hid {
            let ports = desc.regions.iter().filter_map(IsaRegion::ports).collect();
            let irq = desc.pins.first().map(|pin| (pin.irq, pin.level));
            let device = IsaDevice {
                name: owner.to_owned(),
                hid: hid.clone(),
                ports,
                irq,
            };
            self.isa
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(device);
        }
        Ok(IsaHandle::new(owner, pins))
    }

    fn isa_pin(&self, owner: &str, pin: IsaPin) -> Result<IrqPin<V>> {
        ensure!(
            pin.irq < 16,
            "{owner}: ISA interrupt {} is out of range: 0 to 15",
            pin.irq
        );
        ensure!(
            !matches!(pin.irq, 0 | 2 | 8 | 13),
            "{owner}: ISA interrupt {} belongs to the board (timer, cascade, clock or coprocessor)",
            pin.irq
        );
        self.lines
            .pin(u32::from(pin.irq))
            .with_context(|| format!("{owner}: no interrupt line {}", pin.irq))
    }

    /// Adds a PCI function.
    ///
    /// # Errors
    /// The slot is taken (both owners are named), or the description is unsound.
    pub fn add_pci(
        &self,
        owner: &str,
        bdf: Bdf,
        desc: &PciFunctionDesc,
        registers: Arc<dyn Registers>,
        live: Option<Arc<dyn LiveCapability>>,
    ) -> Result<Arc<Function<V>>> {
        self.root.add(
            &Arc::from(owner),
            bdf,
            desc,
            &[],
            Target { registers, live },
        )
    }

    /// Does firmware's part for a kernel that is booted directly: BAR addresses, interrupt lines, decoding on. Before
    /// the guest runs, and again after each [`Machine::reset`].
    ///
    /// # Errors
    /// No room for a BAR: names device and BAR.
    pub fn assign_resources(&self) -> Result<()> {
        self.root.assign_resources(&self.apertures, &self.buses)
    }

    /// Writes the ACPI tables into guest memory and returns the RSDP's address. Before the guest runs, and again
    /// whenever memory was cleared.
    ///
    /// # Errors
    /// Memory ends below 1 MiB, or the tables are too large.
    pub fn write_acpi(&self, memory: &GuestMemory) -> Result<u64> {
        let isa = self.isa.lock().unwrap_or_else(PoisonError::into_inner);
        let contents = acpi::Contents {
            cpus: self.cpus,
            board: self.board,
            apertures: &self.apertures,
            isa: &isa,
        };
        let tables = acpi::build(&contents)?;
        memory
            .write(tables.base, &tables.bytes)
            .context("no room for the ACPI tables")?;
        Ok(tables.base)
    }

    /// The board's part of the reset line. While no vCPU runs; devices are reset by whoever holds them.
    pub fn reset(&self) {
        self.root.reset();
        self.config_ports.reset();
        self.pm.reset();
        self.rtc.reset();
    }

    /// Presses the power button. Returns whether the guest listens to it.
    pub fn press_power_button(&self) -> bool {
        self.pm.press_power_button()
    }
}

/// Keeps devices away from what RAM and the hypervisor answer.
fn reserve(buses: &Buses, memory: &GuestMemory) -> Result<()> {
    for region in memory.regions() {
        buses.mmio.reserve("guest RAM", region.gpa, region.len)?;
    }
    buses.mmio.reserve("the I/O APIC", IOAPIC_BASE, 0x1000)?;
    buses
        .mmio
        .reserve("the local APICs", LAPIC_BASE, 0x10_0000)?;
    for (port, count, owner) in HYPERVISOR_PORTS {
        buses.pio.reserve(owner, port, count)?;
    }
    Ok(())
}

/// From the end of high RAM, on a GiB boundary.
fn mmio64(memory: &GuestMemory) -> Aperture {
    let first = memory
        .high_end()
        .unwrap_or(HIGH_START)
        .max(HIGH_START)
        .next_multiple_of(1 << 30);
    Aperture {
        first,
        last: first + MMIO64_LEN - 1,
    }
}

#[cfg(test)]
mod tests;

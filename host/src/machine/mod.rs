//! The board: what every PC guest needs around its CPUs, and nothing that a VM file names as a device.
//!
//! [`Machine`] owns both buses, the PCI root, the interrupt lines and the chipset: i440FX, PIIX3 and PIIX4 as guests know
//! them. Devices are added to it; it decides where they are and carries their interrupts.

pub mod acpi;
pub mod boot_order;
mod debug_port;
pub mod e820;
pub mod flash;
pub mod fw_cfg;
mod i440fx;
mod isa;
mod latches;
mod legacy;
pub mod pm;
pub mod power;
mod ps2;
pub mod reset;
pub mod rtc;
pub mod smbios;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use self::acpi::IsaDevice;
use self::fw_cfg::{FW_CFG_PORT, FW_CFG_PORTS, FwCfg};
use self::legacy::Legacy;
use self::power::EventSender;
use self::reset::ResetControl;
use crate::bus::{BusAccess, Buses, Registers};
use crate::hypervisor::{Space, Vm};
use crate::memory::{GuestMemory, HIGH_START};
use crate::pci::{
    Aperture, Apertures, Bdf, BoardRegisters, CONFIG_PORTS, CONFIG_PORTS_LEN, ConfigPorts, Ecam,
    Function, IrqLines, IrqPin, LINK_GSI, LiveCapability, PciFunctionDesc, Root, Target,
};

pub use debug_port::{DebugOutput, DebugPort};
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

/// Lines that the 8259s must take as levels: the SCI, and what [`LINK_GSI`] routes PCI's links to.
const LEVEL_IRQS: u16 =
    1 << pm::SCI | 1 << LINK_GSI[0] | 1 << LINK_GSI[1] | 1 << LINK_GSI[2] | 1 << LINK_GSI[3];

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
    /// A PS/2 controller with keyboard and mouse; without, ports 0x60 and 0x64 know the reset pulse only.
    pub ps2: bool,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            legacy: true,
            pci: true,
            ps2: true,
        }
    }
}

/// Ports of the board for which ACPI lists no device: first, count.
const BOARD_PORTS: [(u16, u16); 6] = [
    (pm::PM_BASE, pm::PM_LEN),
    (pm::GPE0_BASE, pm::GPE0_LEN as u16),
    (reset::CONTROL_PORT_A, 1),
    (latches::PAGE_PORTS, latches::PAGE_PORTS_LEN),
    (latches::APM_PORTS, latches::APM_PORTS_LEN),
    (debug_port::DEBUG_PORT, 1),
];

/// Where direct boot puts SMBIOS's entry point, on a 16-byte boundary behind the RSDP, and its tables.
const SMBIOS_ANCHOR: u64 = e820::SCANNED + 0x40;
const SMBIOS_TABLES: u64 = e820::SCANNED + 0x60;

/// One machine without its CPUs. All methods may be called on any thread; those that change what there is are meant
/// for the time before the guest runs.
pub struct Machine<V: Vm> {
    vm: Arc<V>,
    buses: Arc<Buses>,
    lines: Arc<IrqLines<V>>,
    root: Arc<Root<V>>,
    config_ports: Arc<ConfigPorts<V>>,
    reset_control: Arc<ResetControl>,
    legacy: Legacy<V>,
    board: Board,
    fw_cfg: OnceLock<Arc<FwCfg>>,
    apertures: Apertures,
    /// End of the RAM below 4 GiB.
    low_end: u64,
    /// Local APIC id of each CPU.
    apic_ids: Vec<u32>,
    isa: Mutex<Vec<IsaDevice>>,
}

impl<V: Vm> Machine<V> {
    /// The bare board for CPUs with these local APIC ids and this memory, with what `board` says. `events` hears of power off
    /// and reset; it is called on vCPU threads.
    ///
    /// # Errors
    /// Memory lies where the board has something else.
    pub fn new(
        vm: Arc<V>,
        memory: &GuestMemory,
        apic_ids: Vec<u32>,
        board: Board,
        debug_port: Arc<DebugPort>,
        events: EventSender,
    ) -> Result<Self> {
        let buses = Arc::new(Buses::default());
        let lines = IrqLines::new(Arc::clone(&vm));
        let root = Root::new(Arc::clone(&vm), Arc::clone(&buses), Arc::clone(&lines));
        let reset_control = Arc::new(ResetControl::new(Arc::clone(&events)));
        let config_ports = Arc::new(ConfigPorts::new(Arc::clone(&root), reset_control.clone()));
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
        let legacy = Legacy::new(&*vm, &buses, &lines, memory, board, debug_port, &events)?;
        // The host bridge is what makes a guest believe in the configuration ports.
        let functions = if board.legacy { usize::MAX } else { 1 };
        for function in i440fx::functions().into_iter().take(functions) {
            let target = Target {
                registers: Arc::new(i440fx::NoRegisters),
                live: None,
                board: function.routes_links.then(|| {
                    Arc::new(i440fx::LinkRoutes::new(Arc::clone(&lines))) as Arc<dyn BoardRegisters>
                }),
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
            vm,
            buses,
            lines,
            root,
            config_ports,
            reset_control,
            legacy,
            board,
            fw_cfg: OnceLock::new(),
            apertures,
            low_end: memory.low_end(),
            apic_ids,
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
        if let Some(holder) = self.legacy.irq_holder(pin.irq) {
            bail!(
                "{owner}: ISA interrupt {} belongs to the board's {holder}",
                pin.irq
            );
        }
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
            Target {
                registers,
                live,
                board: None,
            },
        )
    }

    /// Puts `len` bytes of `target` at guest address `gpa` for good.
    ///
    /// # Errors
    /// An address is taken (both owners are named).
    pub fn add_window(
        &self,
        owner: &str,
        gpa: u64,
        len: u64,
        target: &Arc<dyn Registers>,
    ) -> Result<()> {
        let region = IsaRegion {
            id: 0,
            space: Space::Mmio,
            address: gpa,
            size: len,
        };
        isa::claim(&self.buses, owner, &[region], target)
    }

    /// Gives the guest a firmware configuration device with these items. Once.
    ///
    /// # Errors
    /// There is one, or its ports are taken.
    pub fn add_fw_cfg(&self, device: FwCfg) -> Result<()> {
        let device = Arc::new(device);
        let ports = [IsaRegion::ports_at(0, FW_CFG_PORT, FW_CFG_PORTS)];
        let target: Arc<dyn Registers> = device.clone();
        isa::claim(&self.buses, "firmware configuration", &ports, &target)?;
        // The ports can be claimed once.
        let _ = self.fw_cfg.set(device);
        Ok(())
    }

    /// Does firmware's part for a kernel that is booted directly: BAR addresses, interrupt routes and lines, decoding on. Before
    /// the guest runs, and again after each [`Machine::reset`].
    ///
    /// # Errors
    /// No room for a BAR: names device and BAR.
    pub fn assign_resources(&self) -> Result<()> {
        i440fx::route_links(&self.root);
        self.vm
            .set_level_triggered(LEVEL_IRQS)
            .context("interrupt lines can't be made level-triggered")?;
        self.root.assign_resources(&self.apertures, &self.buses)
    }

    /// Calls `use_contents` with what the ACPI tables are to say now.
    fn with_contents<T>(&self, use_contents: impl FnOnce(&acpi::Contents<'_>) -> T) -> T {
        let isa = self.isa.lock().unwrap_or_else(PoisonError::into_inner);
        let bars = self.root.memory_bars();
        let windows = acpi::Windows::new(self.low_end, self.apertures.mmio64, &bars);
        use_contents(&acpi::Contents {
            apic_ids: &self.apic_ids,
            windows: &windows,
            board: self.board,
            board_ports: &BOARD_PORTS,
            isa: &isa,
        })
    }

    /// The ACPI tables for firmware, with windows around the BARs where they are at this moment: to be made when
    /// firmware asks for them, which it does after it has placed the BARs.
    #[must_use]
    pub fn acpi_blobs(&self) -> acpi::Blobs {
        self.with_contents(acpi::build)
    }

    /// Writes the ACPI tables into guest memory and returns the RSDP's address. Before the guest runs, and again
    /// whenever memory was cleared.
    ///
    /// # Errors
    /// Memory ends below 1 MiB, or the tables are too large.
    pub fn write_acpi(&self, memory: &GuestMemory) -> Result<u64> {
        let place = acpi::Place {
            tables: e820::TABLES,
            end: e820::SCANNED,
        };
        let blobs = self.with_contents(|contents| acpi::link(contents, &place))?;
        let room = "no room for the ACPI tables";
        memory.write(e820::TABLES, &blobs.tables).context(room)?;
        memory.write(e820::SCANNED, &blobs.rsdp).context(room)?;
        Ok(e820::SCANNED)
    }

    /// The SMBIOS tables of a machine with this identity and these processors. `uefi`: firmware starts the guest.
    #[must_use]
    pub fn smbios_blobs(
        &self,
        memory: &GuestMemory,
        identity: &smbios::Identity,
        processors: &smbios::Processors,
        uefi: bool,
    ) -> smbios::Blobs {
        let regions = memory.regions().iter();
        let ram: Vec<(u64, u64)> = regions.map(|region| (region.gpa, region.len)).collect();
        let functions = self.root.functions();
        let mut slots: Vec<u8> = functions.iter().map(|f| f.bdf().device()).collect();
        slots.dedup();
        // The chipset's are no slots.
        slots.retain(|&device| {
            !i440fx::functions()
                .iter()
                .any(|own| own.bdf.device() == device)
        });
        smbios::build(&smbios::Contents {
            identity,
            processors,
            ram: &ram,
            slots: &slots,
            uefi,
        })
    }

    /// Writes SMBIOS tables into guest memory, beside the ACPI tables, for a guest that is booted directly.
    ///
    /// # Errors
    /// Memory ends below 1 MiB, or the tables are too large.
    pub fn write_smbios(&self, memory: &GuestMemory, blobs: &smbios::Blobs) -> Result<()> {
        let end = SMBIOS_TABLES + blobs.tables.len() as u64;
        ensure!(
            end <= e820::MIB,
            "the SMBIOS tables end at {end:#x}, beyond {:#x}: fewer sockets or shorter texts make them smaller",
            e820::MIB
        );
        let room = "no room for the SMBIOS tables";
        let anchor = blobs.anchor_for(SMBIOS_TABLES);
        memory.write(SMBIOS_ANCHOR, &anchor).context(room)?;
        memory.write(SMBIOS_TABLES, &blobs.tables).context(room)
    }

    /// The board's part of the reset line. While no vCPU runs; devices are reset by whoever holds them.
    pub fn reset(&self) {
        self.root.reset();
        self.config_ports.reset();
        self.reset_control.reset();
        self.legacy.reset();
        if let Some(fw_cfg) = self.fw_cfg.get() {
            fw_cfg.reset();
        }
    }

    /// Starts the hypervisor's clocks again, if it has them: after each [`Vm::reset`].
    ///
    /// # Errors
    /// The hypervisor refused.
    pub fn restart_clocks(&self) -> Result<()> {
        self.legacy.restart_clocks(&self.vm)
    }

    /// Presses the power button. Returns whether the guest listens to it.
    pub fn press_power_button(&self) -> bool {
        self.legacy.pm.press_power_button()
    }

    /// Presses the NMI button, as a server has one: a guest that hangs then shows where, or dumps itself.
    pub fn press_nmi_button(&self) {
        for &id in &self.apic_ids {
            if let Err(error) = self.vm.inject_nmi(id) {
                log::error!("{error:#}");
            }
        }
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

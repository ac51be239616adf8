//! The root bus: which function sits where, and how the guest reaches its configuration space.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context, Result, bail};

use super::Bdf;
use super::config_space::BoardRegister;
use super::decode::Decoder;
use super::desc::PciFunctionDesc;
use super::function::{Function, Target};
use super::lines::IrqLines;
use crate::bus::{Buses, Registers, ones};
use crate::hypervisor::Vm;

/// Configuration mechanism 1: address register at +0, data at +4 (PCI 3.0 section 3.2.2.3.2).
pub const CONFIG_PORTS: u16 = 0xcf8;
/// How many ports it takes.
pub const CONFIG_PORTS_LEN: u16 = 8;
/// The chipset's reset control register lies inside them; it alone takes byte accesses there.
pub const RESET_PORT_OFFSET: u64 = 1;

/// What functions are wired to.
pub(super) struct Wiring<V: Vm> {
    pub vm: Arc<V>,
    pub lines: Arc<IrqLines<V>>,
    pub decoder: Arc<Decoder<V>>,
}

/// PCI bus 0. The functions on it are fixed once the guest runs.
pub struct Root<V: Vm> {
    wiring: Wiring<V>,
    functions: RwLock<BTreeMap<Bdf, Arc<Function<V>>>>,
}

impl<V: Vm> Root<V> {
    /// An empty bus whose BARs decode on `buses`.
    #[must_use]
    pub fn new(vm: Arc<V>, buses: Arc<Buses>, lines: Arc<IrqLines<V>>) -> Arc<Self> {
        let decoder = Arc::new(Decoder::new(Arc::clone(&vm), buses));
        Arc::new(Self {
            wiring: Wiring { vm, lines, decoder },
            functions: RwLock::default(),
        })
    }

    /// Puts a function at `bdf`.
    ///
    /// # Errors
    /// The slot is taken (both are named), or the description is unsound.
    pub fn add(
        &self,
        owner: &Arc<str>,
        bdf: Bdf,
        desc: &PciFunctionDesc,
        board: &[BoardRegister],
        target: Target,
    ) -> Result<Arc<Function<V>>> {
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = functions.get(&bdf) {
            bail!(
                "{owner}: PCI slot {bdf} is taken by {}: choose another pci-path",
                other.owner()
            );
        }
        let function = Function::new(owner, bdf, desc, board, target, &self.wiring)
            .with_context(|| format!("{owner} at PCI slot {bdf}"))?;
        let function = Arc::new(function);
        functions.insert(bdf, Arc::clone(&function));
        Ok(function)
    }

    /// Every function, by address.
    #[must_use]
    pub fn functions(&self) -> Vec<Arc<Function<V>>> {
        self.functions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    /// First and last address of every memory BAR that has been given one.
    #[must_use]
    pub fn memory_bars(&self) -> Vec<(u64, u64)> {
        let functions = self.functions();
        functions.iter().flat_map(|f| f.memory_bars()).collect()
    }

    /// The function at bus, device and function number of a configuration address, and whether its device has others.
    fn find(&self, bus: u32, devfn: u32) -> Option<(Arc<Function<V>>, bool)> {
        let bdf = Bdf::new((devfn >> 3 & 31) as u8, (devfn & 7) as u8).filter(|_| bus == 0)?;
        let functions = self
            .functions
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let function = Arc::clone(functions.get(&bdf)?);
        let multi = functions
            .keys()
            .any(|other| other.device() == bdf.device() && *other != bdf);
        Some((function, multi))
    }

    /// Reads configuration space; nobody there reads as ones.
    pub fn config_read(&self, bus: u32, devfn: u32, register: u16, width: u8) -> u32 {
        match self.find(bus, devfn) {
            Some((function, multi)) => function.config_read(register, width, multi),
            None => ones(width) as u32,
        }
    }

    /// Writes configuration space.
    pub fn config_write(&self, bus: u32, devfn: u32, register: u16, width: u8, value: u32) {
        if let Some((function, _)) = self.find(bus, devfn) {
            function.config_write(register, width, value);
        }
    }

    /// All functions to power-on state: nothing decoded, no interrupt enabled. Called while no vCPU runs.
    pub fn reset(&self) {
        for function in self.functions() {
            function.reset();
        }
    }
}

/// Configuration mechanism 1, with the reset control register that shares its address dword.
pub struct ConfigPorts<V: Vm> {
    root: Arc<Root<V>>,
    address: AtomicU32,
    reset: Arc<dyn Registers>,
}

impl<V: Vm> ConfigPorts<V> {
    /// Ports for `root`; `reset` answers byte accesses to the reset control register.
    #[must_use]
    pub fn new(root: Arc<Root<V>>, reset: Arc<dyn Registers>) -> Self {
        Self {
            root,
            address: AtomicU32::new(0),
            reset,
        }
    }

    /// Bus, device and function, register, if the address register's enable bit is set.
    fn selected(&self, offset: u64) -> Option<(u32, u32, u16)> {
        let address = self.address.load(Ordering::Acquire);
        let register = (address & 0xfc) as u16 + (offset - 4) as u16;
        (address >> 31 != 0).then_some((address >> 16 & 0xff, address >> 8 & 0xff, register))
    }

    /// Power-on state.
    pub fn reset(&self) {
        self.address.store(0, Ordering::Release);
    }
}

impl<V: Vm> Registers for ConfigPorts<V> {
    fn read(&self, _: u32, offset: u64, width: u8) -> u64 {
        match (offset, width) {
            (0, 4) => u64::from(self.address.load(Ordering::Acquire)),
            (RESET_PORT_OFFSET, 1) => self.reset.read(0, 0, 1),
            (4.., 1 | 2 | 4) => {
                self.selected(offset)
                    .map_or(ones(width), |(bus, devfn, register)| {
                        u64::from(self.root.config_read(bus, devfn, register, width))
                    })
            }
            _ => ones(width),
        }
    }

    fn write(&self, _: u32, offset: u64, width: u8, value: u64) {
        match (offset, width) {
            // Bits 30 to 24 and the low two are reserved and read as zero.
            (0, 4) => self
                .address
                .store(value as u32 & 0x80ff_fffc, Ordering::Release),
            (RESET_PORT_OFFSET, 1) => self.reset.write(0, 0, 1, value),
            (4.., 1 | 2 | 4) => {
                if let Some((bus, devfn, register)) = self.selected(offset) {
                    self.root
                        .config_write(bus, devfn, register, width, value as u32);
                }
            }
            _ => {}
        }
    }
}

/// Memory mapped configuration space: 1 MiB for each bus, 4 KiB for each function (PCI Firmware 3.0 section 4.1).
pub struct Ecam<V: Vm> {
    root: Arc<Root<V>>,
}

impl<V: Vm> Ecam<V> {
    /// A window onto `root`.
    #[must_use]
    pub fn new(root: Arc<Root<V>>) -> Self {
        Self { root }
    }
}

fn ecam_parts(offset: u64) -> (u32, u32, u16) {
    (
        (offset >> 20) as u32,
        (offset >> 12 & 0xff) as u32,
        (offset & 0xfff) as u16,
    )
}

/// Configuration space takes up to 4 bytes at a time: 8 are two halves.
impl<V: Vm> Registers for Ecam<V> {
    fn read(&self, _: u32, offset: u64, width: u8) -> u64 {
        (0..width).step_by(4).fold(0, |value, at| {
            let (bus, devfn, register) = ecam_parts(offset + u64::from(at));
            value | u64::from(self.root.config_read(bus, devfn, register, width.min(4))) << (8 * at)
        })
    }

    fn write(&self, _: u32, offset: u64, width: u8, value: u64) {
        for at in (0..width).step_by(4) {
            let (bus, devfn, register) = ecam_parts(offset + u64::from(at));
            self.root.config_write(
                bus,
                devfn,
                register,
                width.min(4),
                (value >> (8 * at)) as u32,
            );
        }
    }
}

//! Devices at fixed addresses: claiming their regions, and their interrupt pins.

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::bus::{Buses, Registers};
use crate::hypervisor::{Space, Vm};
use crate::pci::IrqPin;

/// A range of registers at a fixed address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsaRegion {
    /// The device's own number for it.
    pub id: u32,
    /// Ports or memory.
    pub space: Space,
    /// First address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

impl IsaRegion {
    /// `count` ports from `first` on.
    pub(super) fn ports_at(id: u32, first: u16, count: u16) -> Self {
        Self {
            id,
            space: Space::Pio,
            address: u64::from(first),
            size: u64::from(count),
        }
    }

    /// First port and how many, if these are ports.
    pub(super) fn ports(&self) -> Option<(u16, u16)> {
        match self.space {
            Space::Pio => Some((
                u16::try_from(self.address).ok()?,
                u16::try_from(self.size).ok()?,
            )),
            Space::Mmio => None,
        }
    }
}

/// An interrupt pin wired to an ISA line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsaPin {
    /// Line, 0 to 15; those of the board itself (0, 2, 8, 13) can't be had.
    pub irq: u8,
    /// Level triggered, as ACPI tells the guest; else edge.
    pub level: bool,
}

/// A device at fixed addresses.
#[derive(Clone, Debug, Default)]
pub struct IsaDesc {
    /// Its registers.
    pub regions: Vec<IsaRegion>,
    /// Its interrupt pins.
    pub pins: Vec<IsaPin>,
    /// ACPI hardware id under which the guest finds it; `None`: it is not listed.
    pub hid: Option<String>,
}

/// Claims all regions or none.
pub(super) fn claim(
    buses: &Buses,
    owner: &str,
    regions: &[IsaRegion],
    target: &Arc<dyn Registers>,
) -> Result<()> {
    let owner: Arc<str> = Arc::from(owner);
    for (at, region) in regions.iter().enumerate() {
        let bus = buses.space(region.space);
        if let Err(error) = bus.insert(
            &owner,
            region.address,
            region.size,
            region.id,
            Arc::clone(target),
        ) {
            for done in &regions[..at] {
                buses.space(done.space).remove(done.address);
            }
            return Err(error.into());
        }
    }
    Ok(())
}

/// The device's hold on its interrupt lines. Callable on any thread.
pub struct IsaHandle<V: Vm> {
    owner: String,
    pins: Vec<IrqPin<V>>,
}

impl<V: Vm> IsaHandle<V> {
    pub(super) fn new(owner: &str, pins: Vec<IrqPin<V>>) -> Self {
        Self {
            owner: owner.to_owned(),
            pins,
        }
    }

    /// Drives pin number `pin` (its index in the description) high or low. For an edge: high, then low.
    ///
    /// # Errors
    /// No such pin.
    pub fn level(&self, pin: usize, high: bool) -> Result<()> {
        let pins = self.pins.len();
        let pin = self.pins.get(pin).with_context(|| {
            format!(
                "{}: interrupt pin {pin} of {pins} doesn't exist",
                self.owner
            )
        })?;
        pin.set(high);
        Ok(())
    }

    /// Lets go of all lines: part of the device's reset.
    pub fn reset(&self) {
        for pin in &self.pins {
            pin.set(false);
        }
    }
}

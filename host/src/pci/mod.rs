//! PCI as the host owns it: the bus, configuration space, BARs, doorbells, INTx and MSI-X.
//!
//! A device hands over a description ([`PciFunctionDesc`]) and answers its regions; it never learns where the guest placed
//! them. What a guest writes into configuration space takes effect here and nowhere else, which is also where a bad plugin
//! is contained: a description is checked before it is believed, and no BAR can take what another owner holds.

mod assign;
mod bdf;
mod config_space;
mod decode;
mod desc;
#[cfg(test)]
pub(crate) mod fake_vm;
mod function;
mod lines;
mod msix;
mod root;

pub use assign::{Aperture, Apertures};
pub use bdf::{BadBdf, Bdf};
pub use config_space::BoardRegister;
pub use desc::{BarDesc, BarKind, CapDesc, LiveCapability, PciFunctionDesc};
pub use function::{BoardRegisters, Function, Target};
pub use lines::{IrqLines, IrqPin, LINKS};
pub use root::{CONFIG_PORTS, CONFIG_PORTS_LEN, ConfigPorts, Ecam, Root};

/// The interrupt lines that firmware for this board routes PIRQ A to D to; direct boot does the same.
pub const LINK_GSI: [u32; LINKS] = [10, 10, 11, 11];

/// Which PIRQ, 0 to 3 for A to D, pin `pin` (1 to 4 for INTA to INTD) of device `device` on bus 0 is wired to.
///
/// The one place that knows how the board is wired; the ACPI routing table is made from it.
#[must_use]
pub fn intx_link(device: u8, pin: u8) -> usize {
    (usize::from(device) + usize::from(pin) + 2) % LINKS
}

/// The interrupt line of a pin once firmware, or direct boot, has routed the links.
#[must_use]
pub fn intx_gsi(device: u8, pin: u8) -> u32 {
    LINK_GSI[intx_link(device, pin)]
}

#[cfg(test)]
mod tests;

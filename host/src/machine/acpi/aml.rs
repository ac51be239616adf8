//! The few shapes of AML that the DSDT is made of.

use acpi_tables::aml::{AddressSpace, Device, EISAName, IO, Name, ResourceTemplate};
use acpi_tables::{Aml, AmlSink};

/// AML that was made already.
pub(super) struct Raw(pub Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

pub(super) fn raw(aml: &dyn Aml) -> Raw {
    Raw(super::bytes(aml))
}

pub(super) fn name(name: &str, value: &dyn Aml) -> Raw {
    raw(&Name::new(name.into(), value))
}

/// `_HID` in the form that belongs to its length: EISA id or string.
pub(super) fn hid(hid: &str) -> Raw {
    if hid.len() == 7 {
        name("_HID", &EISAName::new(hid))
    } else {
        name("_HID", &hid.to_owned())
    }
}

/// `_CRS`.
pub(super) fn resources(resources: &[Raw]) -> Raw {
    let resources = resources.iter().map(|one| one as &dyn Aml).collect();
    name("_CRS", &ResourceTemplate::new(resources))
}

pub(super) fn device(name: &str, children: &[Raw]) -> Raw {
    let children = children.iter().map(|child| child as &dyn Aml).collect();
    raw(&Device::new(name.into(), children))
}

/// `count` ports from `first` on.
pub(super) fn ports(first: u16, count: u16) -> Raw {
    match u8::try_from(count) {
        Ok(count) => raw(&IO::new(first, first, 1, count)),
        Err(_) => raw(&AddressSpace::new_io(
            first,
            first.saturating_add(count - 1),
            None,
        )),
    }
}

/// An edge-triggered ISA interrupt (ACPI 6.4 section 6.4.2.1, the form without flags).
pub(super) fn isa_irq(line: u8) -> Raw {
    let [low, high] = (1_u16 << (line & 15)).to_le_bytes();
    Raw(vec![0x22, low, high])
}

/// Interrupts to choose from, or the one that is used: level, active high, shared (ACPI 6.4 section 6.4.3.6).
pub(super) fn level_interrupts(lines: &[u32]) -> Raw {
    let mut bytes = vec![0x89];
    bytes.extend((2 + 4 * lines.len() as u16).to_le_bytes());
    bytes.extend([1 | 1 << 3, lines.len() as u8]);
    for line in lines {
        bytes.extend(line.to_le_bytes());
    }
    Raw(bytes)
}
/// Where the first interrupt's number is in a resource buffer that starts with [`level_interrupts`].
pub(super) const FIRST_INTERRUPT: u8 = 5;

//! The DSDT: the PCI root with its windows and interrupt routing, fixed devices, and how to turn the power off.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, PackageBuilder, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{Contents, IsaDevice, LAST_BUS, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::machine::pm::SLP_TYP_S5;
use crate::machine::rtc::RTC_PORT;
use crate::machine::{ECAM_BASE, ECAM_LEN};
use crate::pci::{CONFIG_PORTS, CONFIG_PORTS_LEN, intx_gsi};

/// PCI devices per bus and pins per device.
const DEVICES: u8 = 32;
const PINS: u8 = 4;

/// AML that was made already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn raw(aml: &dyn Aml) -> Raw {
    Raw(super::bytes(aml))
}

/// Differentiated System Description Table.
pub(super) fn dsdt(contents: &Contents<'_>) -> Vec<u8> {
    let bus = if contents.board.pci {
        vec![pci_root(contents), ecam_reservation()]
    } else {
        isa_devices(contents.isa)
    };
    let bus = bus.iter().map(|device| device as &dyn Aml).collect();
    let bus = Scope::new("_SB_".into(), bus).to_bytes();
    let sleep_type = SLP_TYP_S5 as u8;
    let s5 = raw(&Name::new(
        "_S5_".into(),
        &Package::new(vec![&sleep_type, &sleep_type, &ZERO, &ZERO]),
    ));
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&bus);
    table.append_slice(&s5.0);
    table.as_slice().to_vec()
}

trait ToBytes {
    fn to_bytes(&self) -> Vec<u8>;
}

impl<T: Aml> ToBytes for T {
    fn to_bytes(&self) -> Vec<u8> {
        super::bytes(self)
    }
}

fn pci_root(contents: &Contents<'_>) -> Raw {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A03"));
    let uid = Name::new("_UID".into(), &ZERO);
    let bus_number = Name::new("_BBN".into(), &ZERO);
    let windows = windows(contents);
    let routing = routing();
    let isa = isa_bridge(contents);
    raw(&Device::new(
        "PCI0".into(),
        vec![&hid, &uid, &bus_number, &windows, &routing, &isa],
    ))
}

/// `_CRS`: what the root passes on to PCI, around the configuration ports, which it keeps.
fn windows(contents: &Contents<'_>) -> Raw {
    let (low, high) = (contents.apertures.mmio32, contents.apertures.mmio64);
    let ports = (CONFIG_PORTS, CONFIG_PORTS_LEN);
    let uncached = AddressSpaceCacheable::NotCacheable;
    raw(&Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![
            &AddressSpace::new_bus_number(0_u16, u16::from(LAST_BUS)),
            &IO::new(ports.0, ports.0, 1, ports.1 as u8),
            &AddressSpace::new_io(0_u16, ports.0 - 1, None),
            &AddressSpace::new_io(ports.0 + ports.1, 0xffff, None),
            &AddressSpace::new_memory(uncached, true, low.first as u32, low.last as u32, None),
            &AddressSpace::new_memory(uncached, true, high.first, high.last, None),
        ]),
    ))
}

/// `_PRT`: every pin of every device straight to its I/O APIC input, which is the same number on the 8259s.
fn routing() -> Raw {
    let mut table = PackageBuilder::new();
    for device in 0..DEVICES {
        for pin in 0..PINS {
            let address = u32::from(device) << 16 | 0xffff;
            let gsi = intx_gsi(device, pin + 1);
            table.add_element(&Package::new(vec![&address, &pin, &ZERO, &gsi]));
        }
    }
    raw(&Name::new("_PRT".into(), &table))
}

/// The ISA bridge and what is behind it.
fn isa_bridge(contents: &Contents<'_>) -> Raw {
    let address = Name::new("_ADR".into(), &0x0001_0000_u32);
    let mut devices = isa_devices(contents.isa);
    if contents.board.legacy {
        devices.insert(0, rtc());
    }
    let mut children: Vec<&dyn Aml> = vec![&address];
    children.extend(devices.iter().map(|device| device as &dyn Aml));
    raw(&Device::new("ISA_".into(), children))
}

fn isa_devices(devices: &[IsaDevice]) -> Vec<Raw> {
    devices
        .iter()
        .enumerate()
        .map(|(number, device)| isa_device(number, devices, device))
        .collect()
}

fn rtc() -> Raw {
    raw(&Device::new(
        "RTC_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(RTC_PORT, RTC_PORT, 1, 2)]),
            ),
        ],
    ))
}

fn isa_device(number: usize, all: &[IsaDevice], device: &IsaDevice) -> Raw {
    let hid = if device.hid.len() == 7 {
        Name::new("_HID".into(), &EISAName::new(&device.hid))
    } else {
        Name::new("_HID".into(), &device.hid)
    };
    // Counts devices with the same hardware id, as operating systems number them.
    let uid = all[..number]
        .iter()
        .filter(|other| other.hid == device.hid)
        .count() as u32;
    let mut resources = Vec::new();
    for &(first, count) in &device.ports {
        resources.push(match u8::try_from(count) {
            Ok(count) => raw(&IO::new(first, first, 1, count)),
            Err(_) => raw(&AddressSpace::new_io(
                first,
                first.saturating_add(count - 1),
                None,
            )),
        });
    }
    if let Some((irq, level)) = device.irq {
        resources.push(raw(&Interrupt::new(
            true,
            !level,
            false,
            level,
            u32::from(irq),
        )));
    }
    let resources = resources
        .iter()
        .map(|resource| resource as &dyn Aml)
        .collect();
    raw(&Device::new(
        Path::new(&format!("D{number:03X}")),
        vec![
            &hid,
            &Name::new("_UID".into(), &uid),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    ))
}

/// The ECAM window has to be claimed by a board device, or the guest won't trust it (PCI Firmware 3.0 section 4.1.2).
fn ecam_reservation() -> Raw {
    raw(&Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    true,
                    ECAM_BASE as u32,
                    ECAM_LEN as u32,
                )]),
            ),
        ],
    ))
}

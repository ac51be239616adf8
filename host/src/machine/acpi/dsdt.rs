//! The DSDT: CPUs, the PCI root with its windows, fixed devices, and how to turn the power off.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, IO, Memory32Fixed, Package, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::aml::{Raw, device, hid, name, ports, raw, resources};
use super::{Contents, LAST_BUS, OEM_ID, OEM_REVISION, OEM_TABLE_ID, Windows, isa, links};
use crate::machine::pm::SLP_TYP_S5;
use crate::machine::{ECAM_BASE, ECAM_LEN};
use crate::pci::{CONFIG_PORTS, CONFIG_PORTS_LEN};

/// Differentiated System Description Table.
pub(super) fn dsdt(contents: &Contents<'_>) -> Vec<u8> {
    let mut objects = Vec::new();
    if contents.board.pci {
        objects.extend([pci_root(contents), board_resources(contents)]);
    }
    if contents.board.legacy {
        // The UID is what the MADT calls the same CPU.
        objects.extend((0..contents.apic_ids.len()).map(|uid| {
            let children = [hid("ACPI0007"), name("_UID", &(uid as u32))];
            device(&format!("C{uid:03X}"), &children)
        }));
    } else {
        // No bridge, so no bus of their own.
        objects.extend(isa::isa_devices(contents.isa));
    }
    let objects = objects.iter().map(|object| object as &dyn Aml).collect();
    let bus = raw(&Scope::new("_SB_".into(), objects));
    let sleep_type = SLP_TYP_S5 as u8;
    let s5 = name(
        "_S5_",
        &Package::new(vec![&sleep_type, &sleep_type, &ZERO, &ZERO]),
    );
    // Revision 2: integers of 64 bits (ACPI 6.4 section 5.2.11.1).
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&bus.0);
    table.append_slice(&s5.0);
    table.as_slice().to_vec()
}

fn pci_root(contents: &Contents<'_>) -> Raw {
    let mut children = vec![
        hid("PNP0A03"),
        name("_UID", &ZERO),
        name("_BBN", &ZERO),
        windows(contents.windows),
    ];
    if contents.board.legacy {
        children.push(isa::isa_bridge(contents));
        children.push(links::routing(Some("\\_SB_.PCI0.ISA_")));
    } else {
        children.push(links::routing(None));
    }
    device("PCI0", &children)
}

/// `_CRS`: what the root passes on to PCI, around the configuration ports, which it keeps.
fn windows(windows: &Windows) -> Raw {
    let uncached = AddressSpaceCacheable::NotCacheable;
    let (config, count) = (CONFIG_PORTS, CONFIG_PORTS_LEN);
    let mut all = vec![
        raw(&AddressSpace::new_bus_number(0_u16, u16::from(LAST_BUS))),
        raw(&IO::new(config, config, 1, count as u8)),
        raw(&AddressSpace::new_io(0_u16, config - 1, None)),
        raw(&AddressSpace::new_io(config + count, 0xffff, None)),
    ];
    for window in &windows.mmio32 {
        let (first, last) = (window.first as u32, window.last as u32);
        all.push(raw(&AddressSpace::new_memory(
            uncached, true, first, last, None,
        )));
    }
    let high = windows.mmio64;
    all.push(raw(&AddressSpace::new_memory(
        uncached, true, high.first, high.last, None,
    )));
    resources(&all)
}

/// What the board itself takes: the ECAM window, which the guest won't trust unless a board device claims it
/// (PCI Firmware 3.0 section 4.1.2), and the ports of no device of their own.
fn board_resources(contents: &Contents<'_>) -> Raw {
    let ecam = Memory32Fixed::new(true, ECAM_BASE as u32, ECAM_LEN as u32);
    let mut all = vec![raw(&ecam)];
    for &(first, count) in contents.board_ports {
        all.push(ports(first, count));
    }
    device(
        "MBRD",
        &[hid("PNP0C02"), name("_UID", &ZERO), resources(&all)],
    )
}

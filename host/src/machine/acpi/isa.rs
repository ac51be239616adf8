//! The ISA bridge and what is behind it: the board's own devices, and those that plugins bring.

use super::aml::{Raw, device, hid, isa_irq, name, ports, raw, resources};
use super::{Contents, IsaDevice, links};
use crate::machine::fw_cfg::{FW_CFG_HID, FW_CFG_PORT, FW_CFG_PORTS};
use crate::machine::rtc::RTC_PORT;
use acpi_tables::aml::Interrupt;

/// `ISA_`, below the PCI root.
pub(super) fn isa_bridge(contents: &Contents<'_>) -> Raw {
    let mut children = vec![name("_ADR", &0x0001_0000_u32)];
    children.extend(links::links());
    children.extend(board(contents));
    children.extend(isa_devices(contents.isa));
    device("ISA_", &children)
}

/// Those that plugins bring.
pub(super) fn isa_devices(all: &[IsaDevice]) -> Vec<Raw> {
    let numbered = all.iter().enumerate();
    numbered
        .map(|(number, device)| isa_device(number, all, device))
        .collect()
}

/// What is always there, and what this board has of the rest. A device that is not real is not listed: there is no DMA
/// controller and no coprocessor interrupt.
fn board(contents: &Contents<'_>) -> Vec<Raw> {
    let mut devices = vec![
        fixed(
            "PIC_",
            "PNP0000",
            &[(0x20, 2), (0xa0, 2), (0x4d0, 2)],
            Some(2),
        ),
        fixed("TMR_", "PNP0100", &[(0x40, 4)], Some(0)),
        fixed("SPKR", "PNP0800", &[(0x61, 1)], None),
        fixed("RTC_", "PNP0B00", &[(RTC_PORT, 2)], Some(8)),
    ];
    if contents.board.ps2 {
        devices.push(fixed("KBD_", "PNP0303", &[(0x60, 1), (0x64, 1)], Some(1)));
        // It shares the keyboard's ports, which are listed there.
        devices.push(fixed("MOU_", "PNP0F13", &[], Some(12)));
    }
    let children = [
        hid(FW_CFG_HID),
        // Present and working, but nothing to show to a user.
        name("_STA", &0x0b_u8),
        resources(&[ports(FW_CFG_PORT, FW_CFG_PORTS)]),
    ];
    devices.push(device("FWCF", &children));
    devices
}

fn fixed(own: &str, id: &str, ranges: &[(u16, u16)], irq: Option<u8>) -> Raw {
    let mut uses: Vec<Raw> = ranges.iter().map(|&(at, len)| ports(at, len)).collect();
    uses.extend(irq.map(isa_irq));
    device(own, &[hid(id), resources(&uses)])
}

fn isa_device(number: usize, all: &[IsaDevice], isa: &IsaDevice) -> Raw {
    // Counts devices with the same hardware id, as operating systems number them.
    let uid = all[..number]
        .iter()
        .filter(|other| other.hid == isa.hid)
        .count() as u32;
    let mut uses: Vec<Raw> = isa.ports.iter().map(|&(at, len)| ports(at, len)).collect();
    if let Some((irq, level)) = isa.irq {
        let irq = u32::from(irq);
        uses.push(raw(&Interrupt::new(true, !level, false, level, irq)));
    }
    let children = [hid(&isa.hid), name("_UID", &uid), resources(&uses)];
    device(&format!("D{number:03X}"), &children)
}

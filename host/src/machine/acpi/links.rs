//! How PCI interrupt pins reach lines: four link devices over the PIIX3's PIRQ registers, and `_PRT`, which says which
//! pin of which device is wired to which of them.

use acpi_tables::aml::{
    And, Arg, CreateDWordField, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    If, LessThan, Method, MethodCall, OpRegion, OpRegionSpace, Or, Package, PackageBuilder, Path,
    ResourceTemplate, Return, Store, ZERO,
};

use super::aml::{FIRST_INTERRUPT, Raw, device, hid, level_interrupts, name, raw};
use crate::pci::{intx_gsi, intx_link};

/// PCI devices per bus and pins per device.
const DEVICES: u8 = 32;
const PINS: u8 = 4;

/// PIRQ route control A to D in the ISA bridge's configuration space (PIIX3 datasheet, section 2.2.12).
const PIRQ_REGISTERS: u8 = 0x60;
/// Set: the pin is routed nowhere.
const PIRQ_DISABLED: u8 = 0x80;
/// Which line, if not.
const PIRQ_LINE: u8 = 0x0f;
/// Lines that the interrupt controllers take as level triggered, but for that of the SCI.
const POSSIBLE: [u32; 3] = [5, 10, 11];

/// Names of the registers, and of the links over them.
const REGISTERS: [[u8; 4]; 4] = [*b"PRQA", *b"PRQB", *b"PRQC", *b"PRQD"];
const LINKS: [&str; 4] = ["LNKA", "LNKB", "LNKC", "LNKD"];

/// The links and what they share: children of the ISA bridge.
pub(super) fn links() -> Vec<Raw> {
    let region = raw(&OpRegion::new(
        "PIRQ".into(),
        OpRegionSpace::PCIConfig,
        &PIRQ_REGISTERS,
        &4_u8,
    ));
    let registers = raw(&Field::new(
        "PIRQ".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        REGISTERS.map(|name| FieldEntry::Named(name, 8)).into(),
    ));
    let mut all = vec![region, registers, link_status(), link_resources()];
    all.extend((0..4).map(link));
    all
}

/// `LSTA(register)`: present, decoding and functioning, or present and disabled (ACPI 6.4 section 6.3.7).
fn link_status() -> Raw {
    raw(&Method::new(
        "LSTA".into(),
        1,
        false,
        vec![
            &If::new(
                &And::new(&ZERO, &Arg(0), &PIRQ_DISABLED),
                vec![&Return::new(&0x09_u8)],
            ),
            &Return::new(&0x0b_u8),
        ],
    ))
}

/// `LCRS(register)`: the line in use; line 0, which is none of PCI's, if disabled.
fn link_resources() -> Raw {
    let buffer = name(
        "BUFF",
        &ResourceTemplate::new(vec![&level_interrupts(&[0])]),
    );
    raw(&Method::new(
        "LCRS".into(),
        1,
        true,
        vec![
            &buffer,
            &CreateDWordField::new(&path("LINE"), &path("BUFF"), &FIRST_INTERRUPT),
            &If::new(
                &LessThan::new(&Arg(0), &PIRQ_DISABLED),
                vec![&And::new(&path("LINE"), &Arg(0), &PIRQ_LINE)],
            ),
            &Return::new(&path("BUFF")),
        ],
    ))
}

fn path(name: &str) -> Path {
    name.into()
}

fn link(number: usize) -> Raw {
    let register = String::from_utf8_lossy(&REGISTERS[number]).into_owned();
    let register = path(&register);
    let shared = |own: &str, called: &str| {
        let call = MethodCall::new(called.into(), vec![&register]);
        raw(&Method::new(
            own.into(),
            0,
            false,
            vec![&Return::new(&call)],
        ))
    };
    device(
        LINKS[number],
        &[
            hid("PNP0C0F"),
            name("_UID", &(number as u8)),
            name(
                "_PRS",
                &ResourceTemplate::new(vec![&level_interrupts(&POSSIBLE)]),
            ),
            shared("_STA", "LSTA"),
            shared("_CRS", "LCRS"),
            raw(&Method::new(
                "_DIS".into(),
                0,
                false,
                vec![&Or::new(&register, &register, &PIRQ_DISABLED)],
            )),
            raw(&Method::new(
                "_SRS".into(),
                1,
                true,
                vec![
                    &CreateDWordField::new(&path("LINE"), &Arg(0), &FIRST_INTERRUPT),
                    &Store::new(&register, &path("LINE")),
                ],
            )),
        ],
    )
}

/// `_PRT`: every pin of every device to its link, which is below `bridge`, or, where there is none, straight to its line.
pub(super) fn routing(bridge: Option<&str>) -> Raw {
    let mut table = PackageBuilder::new();
    for device in 0..DEVICES {
        for pin in 0..PINS {
            let address = u32::from(device) << 16 | 0xffff;
            if let Some(bridge) = bridge {
                let link = path(&format!("{bridge}.{}", LINKS[intx_link(device, pin + 1)]));
                table.add_element(&Package::new(vec![&address, &pin, &link, &ZERO]));
            } else {
                let gsi = intx_gsi(device, pin + 1);
                table.add_element(&Package::new(vec![&address, &pin, &ZERO, &gsi]));
            }
        }
    }
    name("_PRT", &table)
}

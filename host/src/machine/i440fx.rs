//! The chipset as PCI functions: i440FX host bridge, PIIX3 ISA bridge, PIIX4 power management.

use crate::bus::Registers;
use crate::pci::{Bdf, BoardRegister, LINK_GSI, PciFunctionDesc};

use super::pm::PM_BASE;

/// Subsystem vendor id of the board's own functions.
const SUBSYSTEM_VENDOR: u16 = 0x01de;

/// One function of the board.
pub(super) struct BoardFunction {
    pub name: &'static str,
    pub bdf: Bdf,
    pub desc: PciFunctionDesc,
    pub registers: Vec<BoardRegister>,
}

/// The functions that are always there.
pub(super) fn functions() -> [BoardFunction; 3] {
    [
        BoardFunction {
            name: "the i440FX host bridge",
            bdf: Bdf::board(0, 0),
            desc: desc(0x1237, 0x06_00_00, 2, 0xfffe),
            registers: host_bridge_registers(),
        },
        BoardFunction {
            name: "the PIIX3 ISA bridge",
            bdf: Bdf::board(1, 0),
            desc: desc(0x7000, 0x06_01_00, 0, 0xfffd),
            registers: isa_bridge_registers(),
        },
        BoardFunction {
            name: "the PIIX4 power management",
            bdf: Bdf::board(1, 3),
            desc: desc(0x7113, 0x06_80_00, 3, 0xfffc),
            registers: power_management_registers(),
        },
    ]
}

fn desc(device: u16, class: u32, revision: u8, subsystem: u16) -> PciFunctionDesc {
    PciFunctionDesc {
        vendor: 0x8086,
        device,
        class,
        revision,
        subsystem_vendor: SUBSYSTEM_VENDOR,
        subsystem,
        ..PciFunctionDesc::default()
    }
}

/// Memory attributes of the legacy ROM area (82441FX datasheet, section 3.2.18): held, without effect, because RAM is there.
fn host_bridge_registers() -> Vec<BoardRegister> {
    (0x59..=0x5f).map(|offset| (offset, 0, 0xff)).collect()
}

/// PIRQ route control (PIIX3 datasheet, section 2.2.12) shows the board's wiring; passive release (0x82) is on,
/// as firmware for this chipset leaves it.
fn isa_bridge_registers() -> Vec<BoardRegister> {
    let mut registers: Vec<BoardRegister> = LINK_GSI
        .iter()
        .zip(0x60..)
        .map(|(&gsi, offset)| (offset, gsi as u8, 0))
        .collect();
    registers.push((0x82, 0x02, 0));
    registers
}

/// PMBASE (PIIX4 datasheet, section 7.1.15) and its enable bit: fixed, as the block itself is.
fn power_management_registers() -> Vec<BoardRegister> {
    let [low, high] = (PM_BASE | 1).to_le_bytes();
    vec![(0x40, low, 0), (0x41, high, 0), (0x80, 1, 0)]
}

/// The board's functions have no BARs, so nothing ever gets here.
pub(super) struct NoRegisters;

impl Registers for NoRegisters {
    fn read(&self, _: u32, _: u64, width: u8) -> u64 {
        crate::bus::ones(width)
    }
    fn write(&self, _: u32, _: u64, _: u8, _: u64) {}
}

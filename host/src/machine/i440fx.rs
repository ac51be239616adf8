//! The chipset as PCI functions: i440FX host bridge, PIIX3 ISA bridge, PIIX4 power management.

use std::sync::Arc;

use crate::bus::Registers;
use crate::hypervisor::Vm;
use crate::pci::{
    Bdf, BoardRegister, BoardRegisters, IrqLines, LINK_GSI, LINKS, PciFunctionDesc, Root,
};

use super::pm::PM_BASE;

/// Subsystem vendor id of the board's own functions.
const SUBSYSTEM_VENDOR: u16 = 0x01de;

/// One function of the board.
pub(super) struct BoardFunction {
    pub name: &'static str,
    pub bdf: Bdf,
    pub desc: PciFunctionDesc,
    pub registers: Vec<BoardRegister>,
    /// Whether it has the PIRQ route control registers.
    pub routes_links: bool,
}

/// Device number of the ISA bridge.
const ISA_BRIDGE: u8 = 1;
/// PIRQ route control, links A to D (PIIX3 datasheet, section 2.2.12): off in bit 7, else the line in bits 3 to 0.
const PIRQ_ROUTE: u8 = 0x60;
const PIRQ_OFF: u8 = 1 << 7;
const PIRQ_WRITABLE: u8 = PIRQ_OFF | 0x0f;
/// The lines that a link can be routed to; other values are reserved, and route it nowhere.
const PIRQ_LINES: u16 = 0b1101_1110_1111_1000;

/// The functions that are always there.
pub(super) fn functions() -> [BoardFunction; 3] {
    [
        BoardFunction {
            name: "the i440FX host bridge",
            bdf: Bdf::board(0, 0),
            desc: desc(0x1237, 0x06_00_00, 2, 0xfffe),
            registers: host_bridge_registers(),
            routes_links: false,
        },
        BoardFunction {
            name: "the PIIX3 ISA bridge",
            bdf: Bdf::board(ISA_BRIDGE, 0),
            desc: desc(0x7000, 0x06_01_00, 0, 0xfffd),
            registers: isa_bridge_registers(),
            routes_links: true,
        },
        BoardFunction {
            name: "the PIIX4 power management",
            bdf: Bdf::board(1, 3),
            desc: desc(0x7113, 0x06_80_00, 3, 0xfffc),
            registers: power_management_registers(),
            routes_links: false,
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

/// No link is routed at power-on; passive release (0x82) is on, as firmware for this chipset leaves it.
fn isa_bridge_registers() -> Vec<BoardRegister> {
    let mut registers: Vec<BoardRegister> = (PIRQ_ROUTE..)
        .take(LINKS)
        .map(|offset| (offset, PIRQ_OFF, PIRQ_WRITABLE))
        .collect();
    registers.push((0x82, 0x02, 0));
    registers
}

/// Makes the links go where the PIRQ route control registers say.
pub(super) struct LinkRoutes<V: Vm> {
    lines: Arc<IrqLines<V>>,
}

impl<V: Vm> LinkRoutes<V> {
    pub fn new(lines: Arc<IrqLines<V>>) -> Self {
        Self { lines }
    }
}

impl<V: Vm> BoardRegisters for LinkRoutes<V> {
    fn follow(&self, config: &[u8; 256]) {
        let registers = config.iter().skip(usize::from(PIRQ_ROUTE)).take(LINKS);
        for (link, &register) in registers.enumerate() {
            let line = u32::from(register & 0x0f);
            let routed = register & PIRQ_OFF == 0 && PIRQ_LINES >> line & 1 != 0;
            self.lines.route(link, routed.then_some(line));
        }
    }
}

/// Routes the links as firmware does.
pub(super) fn route_links<V: Vm>(root: &Root<V>) {
    for (gsi, register) in LINK_GSI.into_iter().zip(u16::from(PIRQ_ROUTE)..) {
        root.config_write(0, u32::from(ISA_BRIDGE) << 3, register, 1, gsi);
    }
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

//! PCI by configuration mechanism 1: enumeration, BARs, capabilities, MSI-X.

use crate::io::{inb, inl, inw, outb, outl, outw, read16, read32, write32};
use crate::{acpi, check, interrupts, memory, skip};
use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

/// A function on bus 0.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Function {
    device: u8,
    function: u8,
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "0.{}.{}", self.device, self.function)
    }
}

/// What a BAR decodes.
#[derive(Clone, Copy)]
pub struct Bar {
    /// Port or memory address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// Ports, not memory.
    pub io: bool,
    wide: bool,
}

impl Function {
    fn select(self, offset: u8) {
        outl(
            ADDRESS,
            1 << 31
                | u32::from(self.device) << 11
                | u32::from(self.function) << 8
                | u32::from(offset & 0xfc),
        );
    }

    /// Reads four bytes of configuration space.
    pub fn read32(self, offset: u8) -> u32 {
        self.select(offset);
        inl(DATA)
    }

    /// Writes four bytes of configuration space.
    pub fn write32(self, offset: u8, value: u32) {
        self.select(offset);
        outl(DATA, value);
    }

    /// Reads two bytes.
    pub fn read16(self, offset: u8) -> u16 {
        self.select(offset);
        inw(DATA + u16::from(offset & 2))
    }

    /// Writes two bytes.
    pub fn write16(self, offset: u8, value: u16) {
        self.select(offset);
        outw(DATA + u16::from(offset & 2), value);
    }

    /// Reads one byte.
    pub fn read8(self, offset: u8) -> u8 {
        self.select(offset);
        inb(DATA + u16::from(offset & 3))
    }

    /// Writes one byte.
    pub fn write8(self, offset: u8, value: u8) {
        self.select(offset);
        outb(DATA + u16::from(offset & 3), value);
    }

    /// Whether the function holds its interrupt line (status bit 3).
    pub fn interrupt_status(self) -> bool {
        self.read16(6) & 8 != 0
    }

    /// Forbids or allows the use of the interrupt line (command bit 10).
    pub fn disable_line(self, disable: bool) {
        let old = self.read16(4) & !0x400;
        self.write16(4, old | u16::from(disable) << 10);
    }

    /// Vendor and device.
    pub fn identity(self) -> (u16, u16) {
        (self.read16(0), self.read16(2))
    }

    /// Calls `each` with the offset and id of every capability; bounded, should the list be a loop.
    pub fn capabilities(self, mut each: impl FnMut(u8, u8)) {
        if self.read16(6) & 0x10 == 0 {
            return;
        }
        let mut at = self.read8(0x34) & 0xfc;
        for _ in 0..48 {
            if at < 0x40 {
                break;
            }
            each(at, self.read8(at));
            at = self.read8(at + 1) & 0xfc;
        }
    }

    /// The offset of a capability.
    pub fn capability(self, wanted: u8) -> Option<u8> {
        let mut found = None;
        self.capabilities(|at, id| {
            if id == wanted && found.is_none() {
                found = Some(at);
            }
        });
        found
    }

    /// Sizes a BAR as PCI 3.0 section 6.2.5.1 describes, and puts it back.
    pub fn bar(self, index: u8) -> Option<Bar> {
        let offset = 0x10 + index * 4;
        let command = self.read16(4);
        self.write16(4, command & !3);
        let low = self.read32(offset);
        self.write32(offset, !0);
        let mask = self.read32(offset);
        self.write32(offset, low);
        let mut bar = Bar {
            address: 0,
            size: 0,
            io: low & 1 != 0,
            wide: false,
        };
        if bar.io {
            bar.address = u64::from(low & !3);
            bar.size = u64::from(!(mask & !3) & 0xffff) + 1;
        } else if low & 6 == 4 && index < 5 {
            let high = self.read32(offset + 4);
            self.write32(offset + 4, !0);
            let mask = u64::from(mask & !15) | u64::from(self.read32(offset + 4)) << 32;
            self.write32(offset + 4, high);
            bar.address = u64::from(low & !15) | u64::from(high) << 32;
            bar.size = (!mask).wrapping_add(1);
            bar.wide = true;
        } else {
            bar.address = u64::from(low & !15);
            bar.size = u64::from((!(mask & !15)).wrapping_add(1));
        }
        self.write16(4, command);
        (mask != 0 && mask != !0 || bar.wide)
            .then_some(bar)
            .filter(|bar| bar.size != 0)
    }

    /// Puts a BAR somewhere else.
    pub fn set_bar(self, index: u8, bar: Bar, address: u64) {
        let offset = 0x10 + index * 4;
        let command = self.read16(4);
        self.write16(4, command & !3);
        self.write32(offset, address as u32);
        if bar.wide {
            self.write32(offset + 4, (address >> 32) as u32);
        }
        self.write16(4, command);
    }

    /// Calls `each` with every BAR.
    pub fn bars(self, mut each: impl FnMut(u8, Bar)) {
        let mut index = 0;
        while index < 6 {
            if let Some(bar) = self.bar(index) {
                each(index, bar);
                index += u8::from(bar.wide);
            }
            index += 1;
        }
    }

    /// Gives every BAR without an address one, where firmware would have, and turns decoding and
    /// bus mastering on.
    pub fn enable(self) {
        static MEMORY: AtomicU32 = AtomicU32::new(0xd000_0000);
        static PORTS: AtomicU32 = AtomicU32::new(0xd000);
        self.bars(|index, bar| {
            if bar.address == 0 {
                let next = if bar.io { &PORTS } else { &MEMORY };
                let size = bar.size as u32;
                let address = next
                    .load(Ordering::Relaxed)
                    .next_multiple_of(size.max(if bar.io { 4 } else { 4096 }));
                next.store(address + size, Ordering::Relaxed);
                self.write32(0x10 + index * 4, address);
                if bar.wide {
                    self.write32(0x14 + index * 4, 0);
                }
            }
        });
        self.write16(4, self.read16(4) & !0x400 | 7);
    }

    /// The MSI-X capability, if the function has one.
    pub fn msix(self) -> Option<Msix> {
        let capability = self.capability(0x11)?;
        let place = |offset: u8| {
            let value = self.read32(capability + offset);
            self.bar((value & 7) as u8)
                .map(|bar| memory::map(bar.address) + u64::from(value & !7))
        };
        Some(Msix {
            function: self,
            capability,
            vectors: (self.read16(capability + 2) & 0x7ff) + 1,
            table: place(4)?,
            pending: place(8)?,
        })
    }
}

/// A function's MSI-X table and controls.
#[derive(Clone, Copy)]
pub struct Msix {
    function: Function,
    capability: u8,
    /// Entries in the table.
    pub vectors: u16,
    table: u64,
    pending: u64,
}

impl Msix {
    /// Points an entry at a vector of this processor, unmasked.
    pub fn set(&self, entry: u16, vector: u8) {
        let at = self.table + u64::from(entry) * 16;
        write32(at + 12, 1);
        write32(at, 0xfee0_0000 | interrupts::apic_id() << 12);
        write32(at + 4, 0);
        write32(at + 8, u32::from(vector));
        write32(at + 12, 0);
    }

    /// Masks or unmasks one entry.
    pub fn mask(&self, entry: u16, masked: bool) {
        write32(self.table + u64::from(entry) * 16 + 12, u32::from(masked));
    }

    /// Reads back an entry's message data and vector control.
    pub fn entry(&self, entry: u16) -> (u32, u32) {
        let at = self.table + u64::from(entry) * 16;
        (read32(at + 8), read32(at + 12))
    }

    /// Whether an entry's pending bit is set.
    pub fn is_pending(&self, entry: u16) -> bool {
        read32(self.pending + u64::from(entry / 32) * 4) >> (entry % 32) & 1 != 0
    }

    /// Turns MSI-X on or off, and its function mask.
    pub fn control(&self, enable: bool, mask_all: bool) {
        let old = self.function.read16(self.capability + 2) & 0x3fff;
        self.function.write16(
            self.capability + 2,
            old | u16::from(enable) << 15 | u16::from(mask_all) << 14,
        );
    }
}

/// Calls `each` with every function on bus 0.
pub fn functions(mut each: impl FnMut(Function)) {
    for device in 0..32 {
        let first = Function {
            device,
            function: 0,
        };
        if first.read16(0) == 0xffff {
            continue;
        }
        let last = if first.read8(0x0e) & 0x80 != 0 { 8 } else { 1 };
        for function in 0..last {
            let it = Function { device, function };
            if it.read16(0) != 0xffff {
                each(it);
            }
        }
    }
}

/// Gives the PIIX3's four PCI interrupt lines an ISA interrupt each where firmware has not.
pub fn route_lines() {
    functions(|it| {
        if it.identity() == (0x8086, 0x7000) {
            for (register, irq) in [(0x60, 10), (0x61, 10), (0x62, 11), (0x63, 11)] {
                if it.read8(register) & 0x80 != 0 {
                    it.write8(register, irq);
                }
            }
        }
    });
}

/// Checks configuration space of every function.
pub fn run() {
    outl(ADDRESS, 0x8000_0000);
    check!(
        inl(ADDRESS) == 0x8000_0000,
        "pci",
        "configuration mechanism 1 is there"
    );
    let bridge = Function {
        device: 0,
        function: 0,
    };
    check!(bridge.read16(0x0a) == 0x0600, "pci", "host bridge at 0.0.0");
    let nobody = Function {
        device: 31,
        function: 7,
    };
    check!(
        nobody.read32(0) == !0,
        "pci",
        "an absent function reads as ones"
    );
    let mut count = 0;
    functions(|it| {
        let (vendor, device) = it.identity();
        let class = it.read32(8) >> 8;
        count += 1;
        check!(
            it.read8(0) == vendor as u8
                && it.read8(3) == (device >> 8) as u8
                && it.read16(0x0a) == (class >> 8) as u16,
            "pci",
            "found {vendor:04x}:{device:04x} at {it}, class {class:06x}"
        );
        it.write32(0, 0);
        check!(
            it.identity() == (vendor, device),
            "pci",
            "{it}: the identity is read-only"
        );
        bars(it);
    });
    check!(count >= 1, "pci", "{count} functions on bus 0");
    ecam();
}

fn bars(it: Function) {
    it.bars(|index, bar| {
        let kind = if bar.io { "ports" } else { "memory" };
        check!(
            bar.size.is_power_of_two() && bar.address % bar.size == 0,
            "pci",
            "{it}: BAR{index} is {:#x} of {kind} at {:#x}",
            bar.size,
            bar.address
        );
    });
}

fn ecam() {
    let Some(base) = acpi::ecam() else {
        skip!("pci", "no MCFG, so no memory-mapped configuration space");
        return;
    };
    let base = memory::map(base);
    let (mut same, mut compared) = (true, 0);
    functions(|it| {
        let place = base + (u64::from(it.device) << 15) + (u64::from(it.function) << 12);
        for offset in (0..0x40u8).step_by(4) {
            same &= read32(place + u64::from(offset)) == it.read32(offset);
            compared += 1;
        }
        same &= read16(place + 2) == it.identity().1;
    });
    check!(
        same,
        "pci",
        "memory-mapped configuration space agrees in {compared} registers"
    );
    check!(
        read32(base + (31 << 15) + (7 << 12)) == !0,
        "pci",
        "and has nothing at 0.31.7"
    );
}

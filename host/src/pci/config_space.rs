//! The 256 bytes of one function: what they hold, and which bits the guest may write.
//!
//! BAR sizing needs no code of its own: the address bits below a BAR's size are not writable, so a guest that writes
//! ones reads its size back (PCI 3.0 section 6.2.5.1).

use super::desc::{BarKind, CAP_MSIX, CAPS_START, CONFIG_SIZE, PciFunctionDesc};

/// Command register: I/O space, memory space, bus master, INTx disable (PCI 3.0 section 6.2.2).
pub(super) const COMMAND: usize = 0x04;
pub(super) const COMMAND_IO: u16 = 1 << 0;
pub(super) const COMMAND_MEMORY: u16 = 1 << 1;
pub(super) const COMMAND_MASTER: u16 = 1 << 2;
pub(super) const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Parity and SERR enable do nothing here, but software may set them.
const COMMAND_WRITABLE: u16 =
    COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTX_DISABLE;
const STATUS: usize = 0x06;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CACHE_LINE_SIZE: usize = 0x0c;
const LATENCY_TIMER: usize = 0x0d;
const HEADER_TYPE: usize = 0x0e;
const MULTI_FUNCTION: u8 = 0x80;
const BAR0: usize = 0x10;
const CAPABILITIES_POINTER: usize = 0x34;
pub(super) const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;

/// MSI-X message control: enable and function mask (PCI 3.0 section 6.8.2.3).
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;

/// A register byte beyond the standard header, as chipset functions have them: offset, power-on value, writable bits.
pub type BoardRegister = (u8, u8, u8);

/// The body of a live capability.
struct LiveBody {
    cap: u32,
    start: usize,
    len: usize,
}

/// A part of an access that is all the host's or all one live capability's.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Bytes held here.
    Plain { offset: usize, len: usize },
    /// Bytes of capability `cap`, from `body` on.
    Live { cap: u32, body: u32, len: usize },
}

/// One BAR as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bar {
    pub index: u8,
    pub kind: BarKind,
    pub size: u64,
}

pub(super) struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    power_on: [u8; CONFIG_SIZE],
    bars: Vec<Bar>,
    live: Vec<LiveBody>,
    msix: Option<usize>,
}

/// Size of the BAR for an MSI-X table of `vectors` entries with its pending bits, and where the latter start.
pub(super) fn msix_layout(vectors: u16) -> (u64, u64) {
    let pending = u64::from(vectors) * 16;
    let end = pending + u64::from(vectors).div_ceil(64) * 8;
    (end.next_power_of_two().max(0x1000), pending)
}

impl ConfigSpace {
    /// Lays out a checked description; `pin` is 0 (none) or 1 to 4.
    pub fn new(desc: &PciFunctionDesc, pin: u8, board: &[BoardRegister]) -> Self {
        let mut this = Self {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            power_on: [0; CONFIG_SIZE],
            bars: Vec::new(),
            live: Vec::new(),
            msix: None,
        };
        this.put(0x00, &desc.vendor.to_le_bytes());
        this.put(0x02, &desc.device.to_le_bytes());
        this.put(
            0x08,
            &(desc.class << 8 | u32::from(desc.revision)).to_le_bytes(),
        );
        this.put(0x2c, &desc.subsystem_vendor.to_le_bytes());
        this.put(0x2e, &desc.subsystem.to_le_bytes());
        this.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        this.allow(CACHE_LINE_SIZE, &[0xff]);
        this.allow(LATENCY_TIMER, &[0xff]);
        if pin != 0 {
            this.put(INTERRUPT_PIN, &[pin]);
            this.allow(INTERRUPT_LINE, &[0xff]);
        }
        for bar in &desc.bars {
            this.add_bar(bar.index, bar.kind, bar.size, bar.prefetch);
        }
        if desc.msix_vectors > 0 {
            this.add_bar(
                desc.msix_bar,
                BarKind::Mmio32,
                msix_layout(desc.msix_vectors).0,
                false,
            );
        }
        this.add_caps(desc);
        for &(offset, value, writable) in board {
            this.put(usize::from(offset), &[value]);
            this.allow(usize::from(offset), &[writable]);
        }
        this.power_on = this.bytes;
        this
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    fn add_bar(&mut self, index: u8, kind: BarKind, size: u64, prefetch: bool) {
        let at = BAR0 + 4 * usize::from(index);
        let address_bits = !(size - 1);
        let prefetch = u32::from(prefetch) << 3;
        let (flags, bits) = match kind {
            BarKind::Io => (1, address_bits & !0b11),
            BarKind::Mmio32 => (prefetch, address_bits & !0b1111),
            BarKind::Mmio64 => (0b100 | prefetch, address_bits & !0b1111),
        };
        self.put(at, &flags.to_le_bytes());
        self.allow(at, &(bits as u32).to_le_bytes());
        if kind == BarKind::Mmio64 {
            self.allow(at + 4, &((bits >> 32) as u32).to_le_bytes());
        }
        self.bars.push(Bar { index, kind, size });
    }

    /// The chain: MSI-X first, then the device's own in their order, each on a 4-byte boundary.
    fn add_caps(&mut self, desc: &PciFunctionDesc) {
        let (mut at, mut link) = (CAPS_START, CAPABILITIES_POINTER);
        let mut next = |this: &mut Self, id: u8, body: &[u8]| {
            let here = at;
            this.put(link, &[here as u8]);
            this.put(here, &[id, 0]);
            this.put(here + 2, body);
            this.bytes[STATUS] |= STATUS_CAPABILITIES;
            (link, at) = (here + 1, (here + 2 + body.len()).next_multiple_of(4));
            here
        };
        if desc.msix_vectors > 0 {
            let bar = u32::from(desc.msix_bar);
            let mut body = (desc.msix_vectors - 1).to_le_bytes().to_vec();
            body.extend(bar.to_le_bytes());
            body.extend((msix_layout(desc.msix_vectors).1 as u32 | bar).to_le_bytes());
            let here = next(self, CAP_MSIX, &body);
            self.writable[here + 3] = ((MSIX_ENABLE | MSIX_FUNCTION_MASK) >> 8) as u8;
            self.msix = Some(here);
        }
        for (cap, description) in desc.caps.iter().enumerate() {
            let here = next(self, description.id, &description.body);
            if description.live {
                self.live.push(LiveBody {
                    cap: cap as u32,
                    start: here + 2,
                    len: description.body.len(),
                });
            }
        }
    }

    /// Splits `len` bytes at `offset`, all inside one aligned dword, by who answers them.
    pub fn parts(&self, offset: usize, len: usize) -> Vec<Part> {
        let end = offset + len;
        let Some(body) = self
            .live
            .iter()
            .find(|body| body.start < end && offset < body.start + body.len)
        else {
            return vec![Part::Plain { offset, len }];
        };
        let (from, to) = (offset.max(body.start), end.min(body.start + body.len));
        let mut parts = Vec::with_capacity(3);
        if offset < from {
            parts.push(Part::Plain {
                offset,
                len: from - offset,
            });
        }
        let mut at = from;
        while at < to {
            // A device sees naturally aligned accesses only: three bytes arrive as two and one.
            let len = if at % 4 == 0 && to - at == 4 {
                4
            } else if at % 2 == 0 && to - at >= 2 {
                2
            } else {
                1
            };
            parts.push(Part::Live {
                cap: body.cap,
                body: (at - body.start) as u32,
                len,
            });
            at += len;
        }
        if to < end {
            parts.push(Part::Plain {
                offset: to,
                len: end - to,
            });
        }
        parts
    }

    /// Reads up to 4 bytes. `interrupt`: the status register's interrupt bit; `multi`: the multi-function bit.
    pub fn read(&self, offset: usize, len: usize, interrupt: bool, multi: bool) -> u32 {
        (offset..offset + len)
            .enumerate()
            .fold(0, |value, (at, offset)| {
                let mut byte = self.bytes.get(offset).copied().unwrap_or(0);
                if offset == STATUS && interrupt {
                    byte |= STATUS_INTERRUPT;
                }
                if offset == HEADER_TYPE && multi {
                    byte |= MULTI_FUNCTION;
                }
                value | u32::from(byte) << (8 * at)
            })
    }

    /// Writes up to 4 bytes, as far as they are writable.
    pub fn write(&mut self, offset: usize, len: usize, value: u32) {
        for (byte, offset) in value.to_le_bytes().into_iter().zip(offset..offset + len) {
            if let (Some(held), Some(&mask)) =
                (self.bytes.get_mut(offset), self.writable.get(offset))
            {
                *held = *held & !mask | byte & mask;
            }
        }
    }

    /// All of it, as it is held.
    pub fn bytes(&self) -> &[u8; CONFIG_SIZE] {
        &self.bytes
    }

    /// Back to power-on values.
    pub fn reset(&mut self) {
        self.bytes = self.power_on;
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn dword(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.word(COMMAND)
    }

    /// MSI-X enable and function mask.
    pub fn msix_control(&self) -> (bool, bool) {
        let control = self.msix.map_or(0, |at| self.word(at + 2));
        (
            control & MSIX_ENABLE != 0,
            control & MSIX_FUNCTION_MASK != 0,
        )
    }

    /// The BARs, the MSI-X one last.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// What address a BAR holds, whether it decodes there or not; 0 means that nobody has placed it yet.
    pub fn address(&self, bar: Bar) -> u64 {
        let at = BAR0 + 4 * usize::from(bar.index);
        let low = u64::from(self.dword(at));
        match bar.kind {
            BarKind::Io => low & !0b11,
            BarKind::Mmio32 => low & !0b1111,
            BarKind::Mmio64 => low & !0b1111 | u64::from(self.dword(at + 4)) << 32,
        }
    }

    /// Where a BAR decodes now.
    pub fn decoded(&self, bar: Bar) -> Option<u64> {
        let enable = match bar.kind {
            BarKind::Io => COMMAND_IO,
            BarKind::Mmio32 | BarKind::Mmio64 => COMMAND_MEMORY,
        };
        let address = self.address(bar);
        (self.command() & enable != 0 && address != 0).then_some(address)
    }
}

/// Offset of BAR register `index`.
pub(super) fn bar_offset(index: u8) -> usize {
    BAR0 + 4 * usize::from(index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::desc::{BarDesc, CapDesc};

    fn space() -> ConfigSpace {
        let bar = |index, kind, size, region, prefetch| BarDesc {
            index,
            kind,
            size,
            region,
            prefetch,
        };
        let desc = PciFunctionDesc {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_80_00,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 2,
            intx: true,
            msix_vectors: 3,
            msix_bar: 1,
            bars: vec![
                bar(0, BarKind::Io, 0x200, 0, false),
                bar(2, BarKind::Mmio64, 0x1_0000_0000, 2, true),
                bar(4, BarKind::Mmio32, 0x4000, 4, false),
            ],
            caps: vec![
                CapDesc {
                    id: 9,
                    body: vec![0xaa, 0xbb, 0xcc],
                    live: false,
                },
                CapDesc {
                    id: 9,
                    body: vec![0; 17],
                    live: true,
                },
            ],
        };
        desc.check().unwrap();
        ConfigSpace::new(&desc, 1, &[])
    }

    fn size_of_bar(space: &mut ConfigSpace, index: u8) -> u32 {
        space.write(bar_offset(index), 4, u32::MAX);
        space.read(bar_offset(index), 4, false, false)
    }

    #[test]
    fn identity_is_read_only() {
        let mut space = space();
        for offset in [0x00, 0x08, 0x0e, 0x2c, 0x34, 0x40, 0x4c] {
            let before = space.read(offset, 4, false, false);
            space.write(offset, 4, !before);
            let writable =
                u32::from_le_bytes(std::array::from_fn(|at| space.writable[offset + at]));
            assert_eq!(
                space.read(offset, 4, false, false) & !writable,
                before & !writable,
                "{offset:#x}"
            );
        }
        assert_eq!(space.read(0, 4, false, false), 0x1042_1af4);
        assert_eq!(space.read(8, 4, false, false), 0x0180_0001);
    }

    #[test]
    fn sizing_gives_size_and_kind() {
        let mut space = space();
        assert_eq!(size_of_bar(&mut space, 0), 0xffff_fe01);
        assert_eq!(size_of_bar(&mut space, 1), 0xffff_f000);
        assert_eq!(size_of_bar(&mut space, 2), 0x0000_000c);
        assert_eq!(size_of_bar(&mut space, 3), 0xffff_ffff);
        assert_eq!(size_of_bar(&mut space, 4), 0xffff_c000);
        assert_eq!(size_of_bar(&mut space, 5), 0);
    }

    #[test]
    fn the_chain_holds_msix_then_the_device_own() {
        let space = space();
        assert_eq!(space.read(0x34, 1, false, false), 0x40);
        assert_eq!(space.read(0x40, 4, false, false), 0x0002_4c11);
        assert_eq!(space.read(0x44, 4, false, false), 1);
        assert_eq!(space.read(0x48, 4, false, false), 0x31);
        assert_eq!(space.read(0x4c, 4, false, false), 0xbbaa_5409);
        assert_eq!(space.read(0x50, 4, false, false), 0xcc);
        assert_eq!(space.read(0x54, 2, false, false), 9);
        assert_eq!(space.read(6, 2, false, false), 0x10);
        assert_eq!(space.read(6, 2, true, false), 0x18);
        assert_eq!(space.read(0xc, 4, false, true), 0x0080_0000);
    }

    #[test]
    fn live_bodies_are_cut_out_of_an_access() {
        let space = space();
        assert_eq!(
            space.parts(0x50, 4),
            [Part::Plain {
                offset: 0x50,
                len: 4
            }]
        );
        assert_eq!(
            space.parts(0x54, 4),
            [
                Part::Plain {
                    offset: 0x54,
                    len: 2
                },
                Part::Live {
                    cap: 1,
                    body: 0,
                    len: 2
                }
            ]
        );
        assert_eq!(
            space.parts(0x58, 4),
            [Part::Live {
                cap: 1,
                body: 2,
                len: 4
            }]
        );
        // The body ends at 0x66, inclusive: 17 bytes from 0x56 on.
        assert_eq!(
            space.parts(0x64, 4),
            [
                Part::Live {
                    cap: 1,
                    body: 14,
                    len: 2
                },
                Part::Live {
                    cap: 1,
                    body: 16,
                    len: 1
                },
                Part::Plain {
                    offset: 0x67,
                    len: 1
                }
            ]
        );
        assert_eq!(
            space.parts(0x59, 1),
            [Part::Live {
                cap: 1,
                body: 3,
                len: 1
            }]
        );
    }

    #[test]
    fn decoding_follows_command_and_address() {
        let mut space = space();
        let bars = space.bars().to_vec();
        space.write(bar_offset(2), 4, 0);
        space.write(bar_offset(3), 4, 0x12);
        assert_eq!(space.decoded(bars[1]), None);
        space.write(COMMAND, 2, u32::from(COMMAND_MEMORY));
        assert_eq!(space.decoded(bars[1]), Some(0x12_0000_0000));
        assert_eq!(space.decoded(bars[0]), None);
        assert_eq!(space.decoded(bars[2]), None);
        space.reset();
        assert_eq!(space.decoded(bars[1]), None);
        assert_eq!(space.read(bar_offset(2), 4, false, false), 0xc);
    }
}

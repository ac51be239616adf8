//! What a device says it is on PCI, and the checks before the host believes it.

use anyhow::{Result, ensure};

/// First byte of configuration space that capabilities may use (PCI 3.0 section 6.7).
pub(super) const CAPS_START: usize = 0x40;
/// Size of conventional configuration space.
pub(super) const CONFIG_SIZE: usize = 256;
/// Capability id of MSI.
const CAP_MSI: u8 = 0x05;
/// Capability id of MSI-X.
pub(super) const CAP_MSIX: u8 = 0x11;
/// Bytes of an MSI-X capability (PCI 3.0 section 6.8.2).
const MSIX_CAP_LEN: usize = 12;
/// Largest I/O BAR. PCI allows 256 bytes; virtio's legacy one may be larger.
const MAX_IO_BAR: u64 = 0x1000;
/// Largest memory BAR below 4 GiB: half the window there.
const MAX_MMIO32_BAR: u64 = 256 << 20;
/// Largest 64-bit memory BAR.
const MAX_MMIO64_BAR: u64 = 64 << 30;

/// Which addresses a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Mmio32,
    /// Memory anywhere; takes this BAR register and the next.
    Mmio64,
}

/// One base address register.
#[derive(Clone, Debug)]
pub struct BarDesc {
    /// Register number, 0 to 5.
    pub index: u8,
    /// Which addresses.
    pub kind: BarKind,
    /// Bytes; a power of two, at least 16 for memory and 4 for I/O.
    pub size: u64,
    /// The number by which the device knows it in [`Registers`](crate::bus::Registers).
    pub region: u32,
    /// Memory without read side effects.
    pub prefetch: bool,
}

/// One capability, in the order in which the guest finds them.
#[derive(Clone, Debug)]
pub struct CapDesc {
    /// Capability id.
    pub id: u8,
    /// The bytes after id and next pointer; read-only to the guest unless `live`.
    pub body: Vec<u8>,
    /// The guest's accesses to the body go to [`LiveCapability`] instead.
    pub live: bool,
}

/// Answers the guest's accesses to the bodies of live capabilities. Any vCPU thread, several at once; called
/// without any lock of the host's, so it may raise interrupts or bind doorbells.
pub trait LiveCapability: Send + Sync {
    /// Reads `width` (1, 2 or 4) bytes at `offset` into the body of capability `cap` (its index in the description).
    fn read(&self, cap: u32, offset: u32, width: u8) -> u32;
    /// Writes there.
    fn write(&self, cap: u32, offset: u32, width: u8, value: u32);
}

/// A PCI function as a device describes it.
#[derive(Clone, Debug, Default)]
pub struct PciFunctionDesc {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Class, subclass and programming interface: 24 bits, class highest.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Whether it has an INTx pin.
    pub intx: bool,
    /// MSI-X vectors, 0 (no MSI-X) to 2048.
    pub msix_vectors: u16,
    /// The BAR that the host makes for MSI-X table and pending bits; `bars` must leave it free.
    pub msix_bar: u8,
    /// The device's own BARs.
    pub bars: Vec<BarDesc>,
    /// Capabilities other than MSI-X, which the host adds.
    pub caps: Vec<CapDesc>,
}

impl PciFunctionDesc {
    /// Checks everything that the rest of the host then relies on.
    ///
    /// # Errors
    /// Says what is wrong in terms of the description; the caller adds whose it is.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.vendor != 0xffff && self.vendor != 0,
            "vendor id {:#06x} means that there is no device",
            self.vendor
        );
        ensure!(
            self.class >> 24 == 0,
            "class {:#x} has more than 24 bits",
            self.class
        );
        let mut taken = self.check_bars()?;
        self.check_msix(&mut taken)?;
        self.check_caps()
    }

    fn check_bars(&self) -> Result<[bool; 6]> {
        let mut taken = [false; 6];
        for (at, bar) in self.bars.iter().enumerate() {
            let (index, size) = (bar.index, bar.size);
            let (least, most, last) = match bar.kind {
                BarKind::Io => (4, MAX_IO_BAR, 5),
                BarKind::Mmio32 => (16, MAX_MMIO32_BAR, 5),
                BarKind::Mmio64 => (16, MAX_MMIO64_BAR, 4),
            };
            ensure!(
                index <= last,
                "BAR {index} ({:?}) is out of range: 0 to {last}",
                bar.kind
            );
            ensure!(
                size.is_power_of_two(),
                "BAR {index} has a size of {size:#x}, which is no power of two"
            );
            ensure!(
                (least..=most).contains(&size),
                "BAR {index} ({:?}) has a size of {size:#x}, expected {least:#x} to {most:#x}",
                bar.kind
            );
            ensure!(
                !(bar.prefetch && bar.kind == BarKind::Io),
                "BAR {index} is I/O, which can't be prefetchable"
            );
            for slot in index..=index + u8::from(bar.kind == BarKind::Mmio64) {
                claim(&mut taken, slot)?;
            }
            ensure!(
                self.bars[..at]
                    .iter()
                    .all(|other| other.region != bar.region),
                "two BARs have region {}",
                bar.region
            );
        }
        Ok(taken)
    }

    fn check_msix(&self, taken: &mut [bool; 6]) -> Result<()> {
        if self.msix_vectors == 0 {
            return Ok(());
        }
        let (vectors, bar) = (self.msix_vectors, self.msix_bar);
        ensure!(
            vectors <= 2048,
            "{vectors} MSI-X vectors are too many: 1 to 2048"
        );
        ensure!(bar < 6, "MSI-X BAR {bar} is out of range: 0 to 5");
        claim(taken, bar)
    }

    fn check_caps(&self) -> Result<()> {
        let mut end = CAPS_START;
        if self.msix_vectors > 0 {
            end += MSIX_CAP_LEN;
        }
        for (at, cap) in self.caps.iter().enumerate() {
            let id = cap.id;
            ensure!(
                !matches!(id, 0 | CAP_MSI | CAP_MSIX | 0xff),
                "capability {at} has id {id:#04x}, which is the host's or none"
            );
            end = end.saturating_add(cap.body.len().saturating_add(2).next_multiple_of(4));
            ensure!(
                end <= CONFIG_SIZE,
                "capability {at} (id {id:#04x}) ends at {end:#x}: all capabilities have to fit into {CAPS_START:#x} to 0xff"
            );
        }
        Ok(())
    }
}

fn claim(taken: &mut [bool; 6], slot: u8) -> Result<()> {
    let register = &mut taken[usize::from(slot)];
    ensure!(
        !*register,
        "BAR register {slot} is used twice (a 64-bit BAR takes the next one too)"
    );
    *register = true;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desc() -> PciFunctionDesc {
        PciFunctionDesc {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_00_00,
            ..PciFunctionDesc::default()
        }
    }

    fn bar(index: u8, kind: BarKind, size: u64, region: u32) -> BarDesc {
        BarDesc {
            index,
            kind,
            size,
            region,
            prefetch: false,
        }
    }

    fn refused(desc: &PciFunctionDesc, part: &str) {
        let error = desc.check().unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }

    #[test]
    fn a_sound_description_passes() {
        let mut desc = desc();
        desc.bars = vec![
            bar(0, BarKind::Io, 0x200, 0),
            bar(2, BarKind::Mmio64, 0x4000, 2),
            bar(5, BarKind::Mmio32, 16, 5),
        ];
        (desc.msix_vectors, desc.msix_bar) = (2048, 1);
        desc.caps = vec![
            CapDesc {
                id: 9,
                body: vec![0; 14],
                live: false
            };
            11
        ];
        desc.check().unwrap();
        desc.caps.push(CapDesc {
            id: 9,
            body: vec![0; 14],
            live: false,
        });
        refused(&desc, "capability 11 (id 0x09) ends at 0x10c");
    }

    #[test]
    fn unsound_bars_are_refused() {
        for (bars, part) in [
            (
                vec![bar(6, BarKind::Mmio32, 16, 0)],
                "BAR 6 (Mmio32) is out of range: 0 to 5",
            ),
            (vec![bar(5, BarKind::Mmio64, 16, 0)], "out of range: 0 to 4"),
            (vec![bar(0, BarKind::Mmio32, 24, 0)], "no power of two"),
            (vec![bar(0, BarKind::Mmio32, 0, 0)], "no power of two"),
            (vec![bar(0, BarKind::Mmio32, 8, 0)], "expected 0x10"),
            (vec![bar(0, BarKind::Io, 2, 0)], "expected 0x4"),
            (vec![bar(0, BarKind::Io, 0x2000, 0)], "expected 0x4"),
            (vec![bar(0, BarKind::Mmio64, 1 << 63, 0)], "expected 0x10"),
            (
                vec![
                    bar(0, BarKind::Mmio64, 16, 0),
                    bar(1, BarKind::Mmio32, 16, 1),
                ],
                "BAR register 1 is used twice",
            ),
            (
                vec![
                    bar(0, BarKind::Mmio32, 16, 3),
                    bar(1, BarKind::Mmio32, 16, 3),
                ],
                "two BARs have region 3",
            ),
        ] {
            let mut desc = desc();
            desc.bars = bars;
            refused(&desc, part);
        }
    }

    #[test]
    fn unsound_identity_msix_and_capabilities_are_refused() {
        refused(
            &PciFunctionDesc {
                vendor: 0xffff,
                ..desc()
            },
            "vendor id 0xffff",
        );
        refused(
            &PciFunctionDesc {
                class: 0x0100_0000,
                ..desc()
            },
            "24 bits",
        );
        refused(
            &PciFunctionDesc {
                msix_vectors: 2049,
                ..desc()
            },
            "2049 MSI-X vectors",
        );
        refused(
            &PciFunctionDesc {
                msix_vectors: 1,
                msix_bar: 6,
                ..desc()
            },
            "MSI-X BAR 6",
        );
        let mut both = PciFunctionDesc {
            msix_vectors: 1,
            msix_bar: 1,
            ..desc()
        };
        both.bars = vec![bar(0, BarKind::Mmio64, 16, 0)];
        refused(&both, "BAR register 1 is used twice");
        for id in [0, 0x05, 0x11, 0xff] {
            let caps = vec![CapDesc {
                id,
                body: vec![0; 2],
                live: false,
            }];
            refused(&PciFunctionDesc { caps, ..desc() }, "the host's or none");
        }
    }
}

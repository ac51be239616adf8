//! Which addresses the PCI root passes on: whoever placed the BARs, direct boot or firmware, they must lie inside.

use crate::machine::{ECAM_BASE, ECAM_LEN, IOAPIC_BASE};
use crate::memory::HIGH_START;
use crate::pci::Aperture;

/// No CPU has more physical address bits (Intel SDM volume 3, section 4.1.4): a BAR beyond holds no address but the
/// guest's sizing pattern.
const ADDRESSES: u64 = 1 << 52;

/// The PCI root's memory windows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::machine) struct Windows {
    /// Below 4 GiB.
    pub mmio32: Vec<Aperture>,
    /// Above RAM.
    pub mmio64: Aperture,
}

impl Windows {
    /// Below 4 GiB all that is neither RAM nor the board's: firmware starts at the end of RAM or at 2 GiB, direct boot
    /// at 3 GiB. Above, direct boot's aperture, and as far beyond it as `bars` (first and last address) go.
    pub fn new(low_end: u64, aperture: Aperture, bars: &[(u64, u64)]) -> Self {
        let below = |first, last| Aperture { first, last };
        let mut mmio64 = aperture;
        for &(first, last) in bars {
            if first >= HIGH_START && last < ADDRESSES {
                mmio64.first = mmio64.first.min(first);
                mmio64.last = mmio64.last.max(last);
            }
        }
        Self {
            mmio32: vec![
                below(low_end, ECAM_BASE - 1),
                below(ECAM_BASE + ECAM_LEN, IOAPIC_BASE - 1),
            ],
            mmio64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT: Aperture = Aperture {
        first: 0x1_4000_0000,
        last: 0x11_3fff_ffff,
    };

    #[test]
    fn windows_hold_every_bar_and_no_ram() {
        let windows = Windows::new(0x1000_0000, DEFAULT, &[]);
        let ranges: Vec<_> = windows.mmio32.iter().map(|w| (w.first, w.last)).collect();
        assert_eq!(
            ranges,
            [(0x1000_0000, 0xdfff_ffff), (0xf000_0000, 0xfebf_ffff)]
        );
        assert_eq!(windows.mmio64, DEFAULT);
        // As firmware places them: near the top of 46 address bits, and just above RAM.
        let bars = [
            (0x3fff_8000_0000, 0x3fff_8000_3fff),
            (0x1_3000_0000, 0x1_3000_0fff),
            (0x8000_0000, 0x8000_3fff),
        ];
        let windows = Windows::new(0x1000_0000, DEFAULT, &bars);
        assert_eq!(
            windows.mmio64,
            Aperture {
                first: 0x1_3000_0000,
                last: 0x3fff_8000_3fff
            }
        );
    }

    #[test]
    fn a_bar_that_is_being_sized_moves_nothing() {
        let windows = Windows::new(0xc000_0000, DEFAULT, &[(u64::MAX - 0x3fff, u64::MAX)]);
        assert_eq!(windows.mmio64, DEFAULT);
    }
}

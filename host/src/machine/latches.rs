//! Ports that hold what was written and do nothing else: POST codes among the DMA page registers, and the APM ports.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use crate::bus::Registers;

/// DMA page registers (PIIX3 datasheet, section 2.3), of which the first has no channel: firmware writes its progress there.
pub(super) const PAGE_PORTS: u16 = 0x80;
pub(super) const PAGE_PORTS_LEN: u16 = 0x10;
/// APM control and status (PIIX4 datasheet, section 7.2.1). There is no system management mode, so no SMI follows.
pub(super) const APM_PORTS: u16 = 0xb2;
pub(super) const APM_PORTS_LEN: u16 = 2;
/// Their region numbers on the bus.
pub(super) const REGION_PAGE: u32 = 0;
pub(super) const REGION_APM: u32 = 1;

/// POST codes that are logged in the life of a VM. Linux waits by writing to that port, and must not fill the log.
const CODES_LOGGED: u32 = 256;

/// All of these ports.
#[derive(Default)]
pub struct Latches {
    pages: [AtomicU8; PAGE_PORTS_LEN as usize],
    apm: [AtomicU8; APM_PORTS_LEN as usize],
    codes: AtomicU32,
}

impl Latches {
    /// Power-on state.
    pub(super) fn reset(&self) {
        for cell in self.pages.iter().chain(&self.apm) {
            cell.store(0, Ordering::Relaxed);
        }
    }

    fn cell(&self, region: u32, offset: u64) -> Option<&AtomicU8> {
        let cells = match region {
            REGION_PAGE => &self.pages[..],
            _ => &self.apm[..],
        };
        cells.get(usize::try_from(offset).ok()?)
    }

    fn log_code(&self, code: u8) {
        if self.codes.load(Ordering::Relaxed) < CODES_LOGGED
            && self.codes.fetch_add(1, Ordering::Relaxed) < CODES_LOGGED
        {
            log::debug!("POST code {code:#04x}");
        }
    }
}

impl Registers for Latches {
    fn read(&self, region: u32, offset: u64, width: u8) -> u64 {
        (0..width).fold(0, |value, at| {
            let cell = self.cell(region, offset + u64::from(at));
            let byte = cell.map_or(0xff, |cell| cell.load(Ordering::Relaxed));
            value | u64::from(byte) << (8 * at)
        })
    }

    fn write(&self, region: u32, offset: u64, width: u8, value: u64) {
        for at in 0..width {
            let (offset, byte) = (offset + u64::from(at), (value >> (8 * at)) as u8);
            if let Some(cell) = self.cell(region, offset)
                && cell.swap(byte, Ordering::Relaxed) != byte
                && (region, offset) == (REGION_PAGE, 0)
            {
                self.log_code(byte);
            }
        }
    }
}

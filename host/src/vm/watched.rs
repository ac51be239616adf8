//! A vCPU's way to the buses, which notes the guest's signs of life: its first port write, and whether it uses a serial port.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bus::BusAccess;
use crate::diagnose::{Mark, Timeline};
use crate::hypervisor::ExitHandler;

/// Data registers of the PC's four serial ports, and where each one's line control register is from there.
const SERIAL_PORTS: [u16; 4] = [0x3f8, 0x2f8, 0x3e8, 0x2e8];
const LINE_CONTROL: u16 = 3;
/// The data register is a part of the rate divisor while this is set in the line control register.
const DIVISOR_ACCESS: u32 = 0x80;

/// What answers one vCPU's register accesses.
pub(super) struct Watched {
    bus: BusAccess,
    timeline: Arc<Timeline>,
    wrote: bool,
    divisor: bool,
    printed: bool,
    /// Whether any vCPU has printed.
    spoke: Arc<AtomicBool>,
}

impl Watched {
    /// Marks the first write in `timeline`, and sets `spoke` when the guest prints on a serial port.
    pub fn new(bus: BusAccess, timeline: Arc<Timeline>, spoke: Arc<AtomicBool>) -> Self {
        Self {
            bus,
            timeline,
            wrote: false,
            divisor: false,
            printed: false,
            spoke,
        }
    }

    fn look(&mut self, port: u16, value: u32) {
        if !self.wrote {
            self.wrote = true;
            self.timeline.mark(Mark::FirstPortWrite);
        }
        if SERIAL_PORTS.contains(&port) && !self.divisor {
            self.printed = true;
            self.spoke.store(true, Ordering::Release);
        } else if SERIAL_PORTS.contains(&port.wrapping_sub(LINE_CONTROL)) {
            self.divisor = value & DIVISOR_ACCESS != 0;
        }
    }
}

impl ExitHandler for Watched {
    fn pio_read(&mut self, port: u16, width: u8) -> u32 {
        self.bus.pio_read(port, width)
    }

    fn pio_write(&mut self, port: u16, width: u8, value: u32) {
        if !self.printed {
            self.look(port, value);
        }
        self.bus.pio_write(port, width, value);
    }

    fn mmio_read(&mut self, address: u64, width: u8) -> u64 {
        self.bus.mmio_read(address, width)
    }

    fn mmio_write(&mut self, address: u64, width: u8, value: u64) {
        self.bus.mmio_write(address, width, value);
    }
}

//! How a guest resets its machine: the reset control register, or the keyboard controller's pulse.

use std::sync::atomic::{AtomicU8, Ordering};

use super::power::{EventSender, VmEvent};
use crate::bus::Registers;

/// The reset control register (PIIX3 datasheet, section 2.5.1), which ACPI's reset register points to.
pub const RESET_PORT: u16 = 0xcf9;
/// The value that resets: hard reset, and go.
pub const RESET_VALUE: u8 = 6;
const GO: u8 = 1 << 2;

/// Keyboard controller ports. There is no keyboard: the status says that nothing waits, so that no probe hangs.
pub(super) const KEYBOARD_DATA: u16 = 0x60;
pub(super) const KEYBOARD_STATUS: u16 = 0x64;
/// Their region numbers on the bus.
pub(super) const REGION_DATA: u32 = 0;
pub(super) const REGION_STATUS: u32 = 1;
/// Keyboard controller command "pulse output line 0", which is wired to the CPUs' reset.
const PULSE_RESET: u64 = 0xfe;

/// Port 0xcf9.
pub struct ResetControl {
    events: EventSender,
    held: AtomicU8,
}

impl ResetControl {
    /// At power-on.
    #[must_use]
    pub fn new(events: EventSender) -> Self {
        Self {
            events,
            held: AtomicU8::new(0),
        }
    }
}

impl Registers for ResetControl {
    fn read(&self, _: u32, _: u64, _: u8) -> u64 {
        u64::from(self.held.load(Ordering::Acquire))
    }

    fn write(&self, _: u32, _: u64, _: u8, value: u64) {
        let value = value as u8;
        // The reset happens on the rise of bit 2 and clears it again.
        self.held.store(value & !GO, Ordering::Release);
        if value & GO != 0 {
            log::debug!("the guest resets its machine by port {RESET_PORT:#x}");
            (self.events)(VmEvent::Reset);
        }
    }
}

/// Ports 0x60 and 0x64 of a board without keyboard: only the reset pulse works.
pub struct KeyboardPorts {
    events: EventSender,
}

impl KeyboardPorts {
    /// At power-on.
    #[must_use]
    pub fn new(events: EventSender) -> Self {
        Self { events }
    }
}

impl Registers for KeyboardPorts {
    fn read(&self, _: u32, _: u64, _: u8) -> u64 {
        0
    }

    fn write(&self, region: u32, _: u64, _: u8, value: u64) {
        if region == REGION_STATUS && value & 0xff == PULSE_RESET {
            log::debug!("the guest resets its machine by the keyboard controller");
            (self.events)(VmEvent::Reset);
        }
    }
}

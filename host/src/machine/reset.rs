//! How a guest resets its machine without ACPI: reset control register, keyboard controller's pulse, system control port A.

use std::sync::atomic::{AtomicU8, Ordering};

use super::power::{EventSender, VmEvent};
use super::ps2::REGION_COMMAND;
use crate::bus::Registers;

/// The reset control register (PIIX3 datasheet, section 2.5.1), which ACPI's reset register points to.
pub const RESET_PORT: u16 = 0xcf9;
/// The value that resets: hard reset, and go.
pub const RESET_VALUE: u8 = 6;
const GO: u8 = 1 << 2;

/// Keyboard controller command "pulse output line 0", which is wired to the CPUs' reset.
const PULSE_RESET: u64 = 0xfe;
/// System control port A (IBM PS/2 Technical Reference, system board): address line 20 and the fast reset.
pub(super) const CONTROL_PORT_A: u16 = 0x92;
const FAST_RESET: u64 = 1;
const A20: u64 = 1 << 1;

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

    /// Power-on state.
    pub fn reset(&self) {
        self.held.store(0, Ordering::Release);
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

/// Ports 0x60 and 0x64 of a board without PS/2 controller: only the reset pulse works, and the status says that nothing
/// waits, so that no probe hangs.
pub struct ResetPulse {
    events: EventSender,
}

impl ResetPulse {
    /// Reports pulses to `events`.
    #[must_use]
    pub fn new(events: EventSender) -> Self {
        Self { events }
    }
}

impl Registers for ResetPulse {
    fn read(&self, _: u32, _: u64, _: u8) -> u64 {
        0
    }

    fn write(&self, region: u32, _: u64, _: u8, value: u64) {
        if region == REGION_COMMAND && value & 0xff == PULSE_RESET {
            log::debug!("the guest resets its machine by the keyboard controller");
            (self.events)(VmEvent::Reset);
        }
    }
}

/// Port 0x92. Address line 20 is always on.
pub struct ControlPortA {
    events: EventSender,
}

impl ControlPortA {
    /// At power-on.
    #[must_use]
    pub fn new(events: EventSender) -> Self {
        Self { events }
    }
}

impl Registers for ControlPortA {
    fn read(&self, _: u32, _: u64, _: u8) -> u64 {
        A20
    }

    /// The reset bit reads as 0, so that writing 1 is always a rise.
    fn write(&self, _: u32, _: u64, _: u8, value: u64) {
        if value & FAST_RESET != 0 {
            log::debug!("the guest resets its machine by port {CONTROL_PORT_A:#x}");
            (self.events)(VmEvent::Reset);
        }
    }
}

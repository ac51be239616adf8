//! The power management block: fixed ACPI hardware (ACPI 6.4 section 4.8), always in ACPI mode.
//!
//! There is no SMI command port to leave or enter ACPI mode by: SCI_EN reads as one from power-on. For guests that are told
//! of no fixed hardware, sleep control and status registers follow it (section 4.8.3.7).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::power::{EventSender, VmEvent};
use crate::bus::Registers;
use crate::hypervisor::Vm;
use crate::pci::IrqPin;

/// First port of the block.
pub const PM_BASE: u16 = 0xb000;
/// How many ports it takes.
pub const PM_LEN: u16 = 0x40;
/// First port of general purpose event block 0.
pub const GPE0_BASE: u16 = 0xafe0;
/// Its length: status, then enable bits, two bytes each.
pub const GPE0_LEN: u8 = 4;
/// Offsets in the block.
pub const PM1_EVENT: u16 = 0;
/// Control register.
pub const PM1_CONTROL: u16 = 4;
/// Timer.
pub const PM_TIMER: u16 = 8;
/// Sleep control register.
pub const SLEEP_CONTROL: u16 = 16;
/// Sleep status register; there is no waking, so it reads as zero.
pub const SLEEP_STATUS: u16 = 17;
/// The interrupt of all this, level, active high.
pub const SCI: u8 = 9;
/// Value of SLP_TYP for S5.
pub const SLP_TYP_S5: u16 = 0;

/// Region numbers on the bus.
pub(super) const REGION_PM: u32 = 0;
pub(super) const REGION_GPE0: u32 = 1;

const TIMER_HZ: u128 = 3_579_545;

/// Power button, in PM1 status and enable.
const POWER_BUTTON: u16 = 1 << 8;
/// Timer, global lock, power button and RTC: the events that can be enabled.
const ENABLE_BITS: u16 = 1 | 1 << 5 | POWER_BUTTON | 1 << 10;
const SCI_EN: u16 = 1;
/// Bus master reload and sleep type are held; sleep enable and global lock release act and read as zero.
const CONTROL_HELD: u16 = 1 << 1 | 0b111 << 10;
const SLP_EN: u16 = 1 << 13;
/// The same in the sleep control register.
const SLEEP_ENABLE: u64 = 1 << 5;

#[derive(Default)]
struct State {
    status: u16,
    enable: u16,
    control: u16,
    gpe_enable: u16,
    /// Whether a sleep type that there isn't was logged.
    complained: bool,
}

/// PM1 event, control and timer registers, and an empty GPE block.
pub struct Pm<V: Vm> {
    sci: IrqPin<V>,
    events: EventSender,
    start: Instant,
    state: Mutex<State>,
}

impl<V: Vm> Pm<V> {
    /// At power-on; interrupts by `sci`.
    #[must_use]
    pub fn new(sci: IrqPin<V>, events: EventSender) -> Self {
        Self {
            sci,
            events,
            start: Instant::now(),
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Presses the fixed power button. Returns whether the guest listens: if not, nothing will come of it.
    pub fn press_power_button(&self) -> bool {
        let mut state = self.lock();
        state.status |= POWER_BUTTON;
        self.drive(&state);
        state.enable & POWER_BUTTON != 0
    }

    /// Power-on state; the timer counts on.
    pub fn reset(&self) {
        let mut state = self.lock();
        *state = State {
            complained: state.complained,
            ..State::default()
        };
        self.drive(&state);
    }

    fn drive(&self, state: &State) {
        self.sci.set(state.status & state.enable != 0);
    }

    fn timer(&self) -> u32 {
        (self.start.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000) as u32
    }

    /// The block's first 16 bytes as one number: any width at any offset is a part of it.
    fn image(&self) -> u128 {
        let timer = u128::from(self.timer());
        let state = self.lock();
        u128::from(state.status)
            | u128::from(state.enable) << 16
            | u128::from(state.control | SCI_EN) << (8 * PM1_CONTROL)
            | timer << (8 * PM_TIMER)
    }

    fn write_pm1(&self, offset: u64, width: u8, value: u64) {
        let shift = 8 * offset as u32;
        let written = u128::from(value) << shift;
        let touched = u128::from(crate::bus::ones(width)) << shift;
        let part = |at: u32| ((written >> at) as u16, (touched >> at) as u16);
        let mut state = self.lock();
        state.status &= !part(0).0;
        let (enable, mask) = part(16);
        state.enable = (state.enable & !mask | enable & mask) & ENABLE_BITS;
        let (control, mask) = part(8 * u32::from(PM1_CONTROL));
        state.control = (state.control & !mask | control & mask) & CONTROL_HELD;
        self.drive(&state);
        let sleep_type = state.control >> 10 & 0b111;
        drop(state);
        if control & SLP_EN != 0 {
            self.sleep(sleep_type);
        }
    }

    fn sleep(&self, sleep_type: u16) {
        if sleep_type == SLP_TYP_S5 {
            log::debug!("the guest turns its power off");
            (self.events)(VmEvent::PowerOff);
        } else if !std::mem::replace(&mut self.lock().complained, true) {
            log::warn!(
                "the guest asks for sleep type {sleep_type}, which its ACPI tables don't offer: ignored, and not said again"
            );
        }
    }
}

impl<V: Vm> Registers for Pm<V> {
    fn read(&self, region: u32, offset: u64, width: u8) -> u64 {
        if region == REGION_GPE0 {
            return u64::from(u32::from(self.lock().gpe_enable) << 16) >> (8 * offset);
        }
        if offset < 16 {
            (self.image() >> (8 * offset)) as u64 & crate::bus::ones(width)
        } else {
            0
        }
    }

    fn write(&self, region: u32, offset: u64, width: u8, value: u64) {
        if region == REGION_GPE0 {
            let (written, touched) = (
                value << (8 * offset),
                crate::bus::ones(width) << (8 * offset),
            );
            let (enable, mask) = ((written >> 16) as u16, (touched >> 16) as u16);
            let mut state = self.lock();
            state.gpe_enable = state.gpe_enable & !mask | enable & mask;
        } else if offset < 16 {
            self.write_pm1(offset, width, value);
        } else if offset == u64::from(SLEEP_CONTROL) && value & SLEEP_ENABLE != 0 {
            self.sleep((value >> 2 & 0b111) as u16);
        }
    }
}

//! Ways to end: power off, reset.

use crate::io::{inw, outb, outw};
use crate::{clock, serial};
use core::sync::atomic::{AtomicU16, Ordering};

static EVENT: AtomicU16 = AtomicU16::new(0xb000);
static CONTROL: AtomicU16 = AtomicU16::new(0xb004);
const SLP_EN: u16 = 1 << 13;
const PWRBTN_STS: u16 = 1 << 8;

/// Uses the PM1a ports that the FADT names.
pub fn set_ports(event: u16, control: u16) {
    EVENT.store(event, Ordering::Relaxed);
    CONTROL.store(control, Ordering::Relaxed);
}

/// Powers off: PM1_CNT with SLP_EN and SLP_TYP 0, which is S5 on this board.
pub fn off() -> ! {
    serial::drain();
    outw(CONTROL.load(Ordering::Relaxed), SLP_EN);
    clock::sleep(2000);
    crate::println!("FAIL power: still running after power off");
    reset()
}

/// Resets through port 0xcf9.
pub fn reset() -> ! {
    serial::drain();
    outb(0xcf9, 0x02);
    outb(0xcf9, 0x06);
    loop {
        core::hint::spin_loop();
    }
}

/// Resets by the keyboard controller's pulse of the reset line.
pub fn reset_by_keyboard_controller() -> ! {
    serial::drain();
    outb(0x64, 0xfe);
    loop {
        core::hint::spin_loop();
    }
}

/// Resets by system control port A, if it has the fast reset.
pub fn reset_by_control_port() -> ! {
    serial::drain();
    outb(0x92, 0x02);
    outb(0x92, 0x03);
    loop {
        core::hint::spin_loop();
    }
}

/// Tells the board that this guest listens to its power button (PM1_EN). Both PICs and the I/O
/// APIC's input stay masked: the status is polled.
pub fn enable_button() {
    outw(EVENT.load(Ordering::Relaxed) + 2, PWRBTN_STS);
}

/// Whether the power button was pressed since it was last acknowledged.
pub fn button_pressed() -> bool {
    inw(EVENT.load(Ordering::Relaxed)) & PWRBTN_STS != 0
}

/// Clears the power button's status bit (write one to clear).
pub fn acknowledge_button() {
    outw(EVENT.load(Ordering::Relaxed), PWRBTN_STS);
}

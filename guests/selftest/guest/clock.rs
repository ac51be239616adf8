//! Time from the ACPI power management timer (3.579545 MHz, 24 bits).

use crate::io::inl;
use core::sync::atomic::{AtomicU16, Ordering};

const HERTZ: u64 = 3_579_545;
static PORT: AtomicU16 = AtomicU16::new(0xb008);

/// Uses the timer port that the FADT names.
pub fn set_port(port: u16) {
    PORT.store(port, Ordering::Relaxed);
}

/// The timer's 24 bits.
pub fn ticks() -> u32 {
    inl(PORT.load(Ordering::Relaxed)) & 0xff_ffff
}

/// Waits until `done` says so; false if that took longer than the given milliseconds.
/// With a timer that stands still it gives up after a bounded number of rounds.
pub fn wait_until(milliseconds: u64, mut done: impl FnMut() -> bool) -> bool {
    let limit = milliseconds * HERTZ / 1000;
    let mut elapsed = 0u64;
    let mut idle = 0u32;
    let mut last = ticks();
    while !done() {
        for _ in 0..100 {
            core::hint::spin_loop();
            if done() {
                return true;
            }
        }
        let now = ticks();
        let step = now.wrapping_sub(last) & 0xff_ffff;
        idle = if step == 0 { idle + 1 } else { 0 };
        last = now;
        elapsed += u64::from(step);
        if elapsed > limit || idle > 1_000_000 {
            return false;
        }
    }
    true
}

/// Waits.
pub fn sleep(milliseconds: u64) {
    let _ = wait_until(milliseconds, || false);
}

//! The CMOS clock (MC146818): what the time is, its interrupts, and battery-backed memory that lasts as long as the VM.
//!
//! It runs on the host's clock plus whatever the guest has set it to. Registers show what has happened when they are read; only while
//! the guest has an interrupt enabled is there a thread that waits for the next one.

mod calendar;
mod registers;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use self::registers::Registers;
use crate::hypervisor::Vm;
use crate::memory::{GuestMemory, HIGH_START};
use crate::pci::IrqPin;
use crate::thread;

/// Index port; data is the next.
pub const RTC_PORT: u16 = 0x70;
/// CMOS address of the century, as PCs have it and ACPI's FADT says.
pub const CENTURY: u8 = 0x32;
/// Its interrupt line.
pub(super) const RTC_IRQ: u8 = 8;

/// The thread looks at the host's clock at least this often, for that may be set.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How long the thread stays when no interrupt is enabled any more: guests often enable one again at once.
const LINGER: Duration = Duration::from_secs(1);

struct State {
    registers: Registers,
    /// Whether the thread runs; it says so itself when it ends.
    ticking: bool,
    thread: Option<JoinHandle<()>>,
    /// Whether it was logged that there can be none.
    refused: bool,
    ended: bool,
}

struct Shared<V: Vm> {
    pin: IrqPin<V>,
    state: Mutex<State>,
    /// Told when the next interrupt may be due earlier than the thread thinks.
    changed: Condvar,
}

/// Ports 0x70 and 0x71.
pub struct Rtc<V: Vm> {
    shared: Arc<Shared<V>>,
    sizes: [(u8, u8); 11],
}

/// The host's clock: nanoseconds since 1970.
fn host_clock() -> i64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

/// How PC firmware learns of memory: addresses and values of the bytes that tell its size below 640 KiB, above 1 MiB (twice),
/// above 16 MiB and above 4 GiB, each low byte first, in KiB or units of 64 KiB, as far as they can count.
pub(super) fn memory_sizes(memory: &GuestMemory) -> [(u8, u8); 11] {
    let (low, high) = (memory.low_end(), memory.high_end().unwrap_or(HIGH_START));
    let capped = |bytes: u64, unit: u64| u16::try_from(bytes / unit).unwrap_or(u16::MAX);
    let [base_0, base_1] = capped(low.min(640 << 10), 1 << 10).to_le_bytes();
    let [ext_0, ext_1] = capped(low.saturating_sub(1 << 20), 1 << 10).to_le_bytes();
    let [above_0, above_1] = capped(low.saturating_sub(16 << 20), 64 << 10).to_le_bytes();
    let high = (high - HIGH_START) / (64 << 10);
    let [high_0, high_1, high_2, ..] = high.min(0xff_ffff).to_le_bytes();
    [
        (0x15, base_0),
        (0x16, base_1),
        (0x17, ext_0),
        (0x18, ext_1),
        (0x30, ext_0),
        (0x31, ext_1),
        (0x34, above_0),
        (0x35, above_1),
        (0x5b, high_0),
        (0x5c, high_1),
        (0x5d, high_2),
    ]
}

impl<V: Vm> Rtc<V> {
    /// A clock that interrupts by `pin`, in a machine of these [`memory_sizes`].
    pub(super) fn new(pin: IrqPin<V>, sizes: [(u8, u8); 11]) -> Self {
        let state = State {
            registers: Registers::new(host_clock()),
            ticking: false,
            thread: None,
            refused: false,
            ended: false,
        };
        let this = Self {
            shared: Arc::new(Shared {
                pin,
                state: Mutex::new(state),
                changed: Condvar::new(),
            }),
            sizes,
        };
        this.reset();
        this
    }

    /// What the reset line does, and the memory sizes, which a guest may have overwritten.
    pub fn reset(&self) {
        let mut state = self.shared.lock();
        state.registers.reset();
        for (address, value) in self.sizes {
            state.registers.put(address, value);
        }
        self.settle(&mut state);
    }

    /// Makes the line and the thread agree with the registers.
    fn settle(&self, state: &mut State) {
        self.shared.pin.set(state.registers.interrupting());
        if state.ticking {
            self.shared.changed.notify_one();
        } else if state.registers.enabled() {
            let shared = Arc::clone(&self.shared);
            let thread = thread::spawn("rtc", move || shared.tick());
            match thread {
                Ok(thread) => (state.thread, state.ticking) = (Some(thread), true),
                Err(error) if !state.refused => {
                    state.refused = true;
                    log::error!("the CMOS clock can't interrupt: no thread: {error}");
                }
                Err(_) => {}
            }
        }
    }
}

impl<V: Vm> Shared<V> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises interrupts when they are due, until none has been enabled for a while.
    fn tick(&self) {
        let mut state = self.lock();
        while !state.ended {
            let now = host_clock();
            state.registers.advance(now);
            self.pin.set(state.registers.interrupting());
            let due = state.registers.deadline(now);
            let enabled = state.registers.enabled();
            let wait = match due {
                Some(due) => {
                    Duration::from_nanos(due.saturating_sub(now).unsigned_abs()).min(LONGEST_WAIT)
                }
                None if enabled => LONGEST_WAIT,
                None => LINGER,
            };
            let waited = self.changed.wait_timeout(state, wait);
            let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = guard;
            if timeout.timed_out() && !enabled && !state.registers.enabled() {
                break;
            }
        }
        state.ticking = false;
    }
}

impl<V: Vm> Drop for Rtc<V> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ended = true;
        let thread = state.thread.take();
        self.shared.changed.notify_one();
        drop(state);
        if let Some(thread) = thread {
            // A panic was reported by the panic hook already.
            let _ = thread.join();
        }
    }
}

impl<V: Vm> crate::bus::Registers for Rtc<V> {
    fn read(&self, _: u32, offset: u64, width: u8) -> u64 {
        // The index port is write-only.
        if (offset, width) != (1, 1) {
            return crate::bus::ones(width);
        }
        let mut state = self.shared.lock();
        let held = state.registers.interrupting();
        let value = state.registers.read(host_clock());
        if held && !state.registers.interrupting() {
            self.settle(&mut state);
        }
        u64::from(value)
    }

    fn write(&self, _: u32, offset: u64, width: u8, value: u64) {
        let mut state = self.shared.lock();
        if offset == 0 {
            state.registers.select(value as u8);
        }
        let data = match (offset, width) {
            (0, 2) => (value >> 8) as u8,
            (1, 1) => value as u8,
            _ => return,
        };
        state.registers.write(host_clock(), data);
        self.settle(&mut state);
    }
}

#[cfg(test)]
mod tests;

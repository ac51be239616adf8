//! Interrupt lines that several pins share: a line is high for as long as any of its pins is.

use std::sync::{Arc, Mutex, PoisonError};

use crate::hypervisor::Vm;

/// I/O APIC inputs.
const LINES: usize = 24;

/// The board's interrupt lines, each with a count of the pins that hold it high.
pub struct IrqLines<V: Vm> {
    vm: Arc<V>,
    /// The lock is held while the hypervisor is told, so that two changes reach it in the order they were counted.
    held: [Mutex<u32>; LINES],
}

impl<V: Vm> IrqLines<V> {
    /// All lines low.
    #[must_use]
    pub fn new(vm: Arc<V>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            held: std::array::from_fn(|_| Mutex::new(0)),
        })
    }

    /// A pin wired to line `gsi`, low. `None`: there is no such line (0 to 23).
    #[must_use]
    pub fn pin(self: &Arc<Self>, gsi: u32) -> Option<IrqPin<V>> {
        let gsi = usize::try_from(gsi).ok().filter(|&gsi| gsi < LINES)?;
        Some(IrqPin {
            lines: Arc::clone(self),
            gsi,
            high: Mutex::new(false),
        })
    }

    fn change(&self, gsi: usize, high: bool) {
        let mut held = self.held[gsi]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let before = *held;
        *held = if high {
            before + 1
        } else {
            before.saturating_sub(1)
        };
        if (before == 0) == (*held == 0) {
            return;
        }
        if let Err(error) = self.vm.set_irq_line(gsi as u32, high) {
            log::error!(
                "interrupt line {gsi} can't be driven {}: {error:#}",
                if high { "high" } else { "low" }
            );
        }
    }
}

/// One pin on a shared line. Any thread may drive it.
pub struct IrqPin<V: Vm> {
    lines: Arc<IrqLines<V>>,
    gsi: usize,
    high: Mutex<bool>,
}

impl<V: Vm> IrqPin<V> {
    /// Drives the pin. Driving it as it is already changes nothing. An edge is high, then low.
    pub fn set(&self, high: bool) {
        let mut now = self.high.lock().unwrap_or_else(PoisonError::into_inner);
        if *now != high {
            *now = high;
            self.lines.change(self.gsi, high);
        }
    }

    /// The line's number.
    #[must_use]
    pub fn gsi(&self) -> u32 {
        self.gsi as u32
    }
}

impl<V: Vm> Drop for IrqPin<V> {
    /// A pin that goes away lets go of its line.
    fn drop(&mut self) {
        self.set(false);
    }
}

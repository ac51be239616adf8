//! Interrupt lines that several pins share: a line is high for as long as any of its pins is.
//!
//! PCI's pins don't reach lines directly but by four links, PIRQ A to D, each of which the chipset routes to a line or to
//! none. Locks are taken from pin to link to line, and never two of a kind.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::hypervisor::Vm;

/// I/O APIC inputs.
const LINES: usize = 24;
/// PIRQ A to D.
pub const LINKS: usize = 4;

/// Where a link's pins arrive, and how many of them are high.
#[derive(Default)]
struct Link {
    held: u32,
    line: Option<usize>,
}

/// The board's interrupt lines, each with a count of the pins and links that hold it high.
pub struct IrqLines<V: Vm> {
    vm: Arc<V>,
    /// The lock is held while the hypervisor is told, so that two changes reach it in the order they were counted.
    held: [Mutex<u32>; LINES],
    /// The lock is held while its line changes, so that a link that moves takes its level along.
    links: [Mutex<Link>; LINKS],
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<V: Vm> IrqLines<V> {
    /// All lines low, all links without a line.
    #[must_use]
    pub fn new(vm: Arc<V>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            held: std::array::from_fn(|_| Mutex::new(0)),
            links: Default::default(),
        })
    }

    /// A pin wired to line `gsi`, low. `None`: there is no such line (0 to 23).
    #[must_use]
    pub fn pin(self: &Arc<Self>, gsi: u32) -> Option<IrqPin<V>> {
        let gsi = usize::try_from(gsi).ok().filter(|&gsi| gsi < LINES)?;
        Some(self.wired(Wire::Line(gsi)))
    }

    /// A pin wired to link `link` (modulo 4: 0 is PIRQ A), low.
    #[must_use]
    pub(super) fn link_pin(self: &Arc<Self>, link: usize) -> IrqPin<V> {
        self.wired(Wire::Link(link % LINKS))
    }

    fn wired(self: &Arc<Self>, wire: Wire) -> IrqPin<V> {
        IrqPin {
            lines: Arc::clone(self),
            wire,
            high: Mutex::new(false),
        }
    }

    /// Routes a link (modulo 4) to a line, or to none. If pins hold it, the old line loses their level and the new one gets it.
    pub fn route(&self, link: usize, gsi: Option<u32>) {
        let line = gsi
            .and_then(|gsi| usize::try_from(gsi).ok())
            .filter(|&gsi| gsi < LINES);
        let mut link = lock(&self.links[link % LINKS]);
        if link.line == line {
            return;
        }
        let old = std::mem::replace(&mut link.line, line);
        if link.held > 0 {
            for (line, high) in [(old, false), (line, true)] {
                if let Some(line) = line {
                    self.change(line, high);
                }
            }
        }
    }

    fn change_link(&self, link: usize, high: bool) {
        let mut link = lock(&self.links[link]);
        if count(&mut link.held, high)
            && let Some(line) = link.line
        {
            self.change(line, high);
        }
    }

    fn change(&self, gsi: usize, high: bool) {
        let mut held = lock(&self.held[gsi]);
        if count(&mut held, high)
            && let Err(error) = self.vm.set_irq_line(gsi as u32, high)
        {
            log::error!(
                "interrupt line {gsi} can't be driven {}: {error:#}",
                if high { "high" } else { "low" }
            );
        }
    }
}

/// Counts one more or one fewer. Returns whether that was the first or the last.
fn count(held: &mut u32, high: bool) -> bool {
    let before = *held;
    *held = if high {
        before + 1
    } else {
        before.saturating_sub(1)
    };
    (before == 0) != (*held == 0)
}

/// What a pin is soldered to.
#[derive(Clone, Copy)]
enum Wire {
    Line(usize),
    Link(usize),
}

/// One pin on a shared line or link. Any thread may drive it.
pub struct IrqPin<V: Vm> {
    lines: Arc<IrqLines<V>>,
    wire: Wire,
    high: Mutex<bool>,
}

impl<V: Vm> IrqPin<V> {
    /// Drives the pin. Driving it as it is already changes nothing. An edge is high, then low.
    pub fn set(&self, high: bool) {
        let mut now = lock(&self.high);
        if *now != high {
            *now = high;
            match self.wire {
                Wire::Line(gsi) => self.lines.change(gsi, high),
                Wire::Link(link) => self.lines.change_link(link, high),
            }
        }
    }
}

impl<V: Vm> Drop for IrqPin<V> {
    /// A pin that goes away lets go of its line.
    fn drop(&mut self) {
        self.set(false);
    }
}

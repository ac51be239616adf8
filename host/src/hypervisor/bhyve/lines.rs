//! Interrupt lines: which pins each drives, and what level it has.
//!
//! The driver counts who asserts a pin, and refuses to count below zero (ERANGE). It ignores requests to an 8259 that the guest has
//! not programmed, without counting them: a line that rises before and falls after would make it refuse, and if one request named both
//! chips, the I/O APIC's pin would stay high. So each level is kept here, each chip is asked for itself, and ERANGE is no error.

use std::io;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use super::abi::*;
use super::node::{self, Node};

/// Lines of a PC with one I/O APIC of 24 pins; bhyve's has 32, of which nothing drives the rest.
const LINES: usize = 24;
/// Inputs of the 8259s that can only be edges: PIT, keyboard, cascade, clock, coprocessor.
const EDGES: u16 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 8 | 1 << 13;
/// `vm_isa_irq.ioapic_irq`: the 8259s alone.
const NO_PIN: i32 = -1;

/// The levels of all lines.
#[derive(Default)]
pub(super) struct Lines([Mutex<bool>; LINES]);

/// One request, as far as it depends on the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pin {
    Pic(i32),
    Ioapic(i32),
}

/// As wired on a PC: line 0 reaches pin 2 of the I/O APIC, and line 2 is the 8259s' cascade.
fn pins(gsi: usize) -> [Option<Pin>; 2] {
    let number = gsi as i32;
    let pic = (gsi < 16).then_some(Pin::Pic(number));
    let ioapic = match gsi {
        0 => Some(Pin::Ioapic(2)),
        2 => None,
        _ => Some(Pin::Ioapic(number)),
    };
    [pic, ioapic]
}

impl Lines {
    /// Drives line `gsi`.
    pub(super) fn set(&self, node: &Node, gsi: u32, high: bool) -> Result<()> {
        self.drive(gsi, high, |pin, high| request(node, pin, high))
    }

    /// The lines that are high, as bits.
    pub(super) fn levels(&self) -> u32 {
        let high = |level: &Mutex<bool>| *level.lock().unwrap_or_else(PoisonError::into_inner);
        let bits = self.0.iter().map(|level| u32::from(high(level)));
        bits.rev().fold(0, |bits, bit| bits << 1 | bit)
    }

    /// Takes the levels for what they are in the driver, which has them from elsewhere.
    pub(super) fn adopt(&self, levels: u32) {
        for (gsi, level) in self.0.iter().enumerate() {
            *level.lock().unwrap_or_else(PoisonError::into_inner) = levels >> gsi & 1 != 0;
        }
    }

    /// Held lines rise again: `VM_REINIT` forgets all levels.
    pub(super) fn raise_again(&self, node: &Node) -> Result<()> {
        for (gsi, level) in self.0.iter().enumerate() {
            let level = level.lock().unwrap_or_else(PoisonError::into_inner);
            if *level {
                apply(gsi, true, |pin, high| request(node, pin, high))?;
            }
        }
        Ok(())
    }

    fn drive(
        &self,
        gsi: u32,
        high: bool,
        request: impl FnMut(Pin, bool) -> io::Result<()>,
    ) -> Result<()> {
        let gsi = gsi as usize;
        let level = self
            .0
            .get(gsi)
            .with_context(|| format!("There is no interrupt line {gsi}"))?;
        // Held meanwhile, so that requests come in the order of the levels.
        let mut level = level.lock().unwrap_or_else(PoisonError::into_inner);
        if *level == high {
            return Ok(());
        }
        *level = high;
        apply(gsi, high, request)
    }
}

/// Asks each chip, also if the other refuses.
fn apply(
    gsi: usize,
    high: bool,
    mut request: impl FnMut(Pin, bool) -> io::Result<()>,
) -> Result<()> {
    let results = pins(gsi).map(|pin| pin.map_or(Ok(()), |pin| request(pin, high)));
    for result in results {
        match result {
            Err(error) if error.raw_os_error() == Some(libc::ERANGE) => {}
            other => other.with_context(|| format!("bhyve refused interrupt line {gsi}"))?,
        }
    }
    Ok(())
}

fn request(node: &Node, pin: Pin, high: bool) -> io::Result<()> {
    let result = match pin {
        Pin::Pic(irq) => {
            let mut argument = VmIsaIrq {
                atpic_irq: irq,
                ioapic_irq: NO_PIN,
            };
            let request = match high {
                true => &node::ISA_ASSERT,
                false => &node::ISA_DEASSERT,
            };
            node.request(request, &mut argument)
        }
        Pin::Ioapic(irq) => {
            let request = match high {
                true => &node::IOAPIC_ASSERT,
                false => &node::IOAPIC_DEASSERT,
            };
            node.request(request, &mut VmIoapicIrq { irq })
        }
    };
    result.map(drop)
}

/// Makes the 8259s take `levels` as levels and their other inputs as edges.
pub(super) fn set_triggers(node: &Node, levels: u16) -> Result<()> {
    for irq in (0..16).filter(|irq| EDGES & 1 << irq == 0) {
        let mut argument = VmIsaIrqTrigger {
            atpic_irq: irq,
            trigger: i32::from(levels >> irq & 1),
        };
        node.request(&node::ISA_SET_TRIGGER, &mut argument)
            .with_context(|| format!("bhyve refused the trigger mode of interrupt {irq}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_reach_the_pins_of_a_pc() {
        assert_eq!(pins(0), [Some(Pin::Pic(0)), Some(Pin::Ioapic(2))]);
        assert_eq!(pins(2), [Some(Pin::Pic(2)), None]);
        assert_eq!(pins(9), [Some(Pin::Pic(9)), Some(Pin::Ioapic(9))]);
        assert_eq!(pins(16), [None, Some(Pin::Ioapic(16))]);
    }

    #[test]
    fn only_changes_reach_the_driver() {
        let lines = Lines::default();
        let mut seen = Vec::new();
        for high in [false, true, true, false, false] {
            let record = |pin, high| {
                seen.push((pin, high));
                Ok(())
            };
            lines.drive(5, high, record).unwrap();
        }
        let (pic, ioapic) = (Pin::Pic(5), Pin::Ioapic(5));
        assert_eq!(
            seen,
            [(pic, true), (ioapic, true), (pic, false), (ioapic, false)]
        );
        let none = lines.drive(24, true, |_, _| Ok(())).unwrap_err();
        assert!(
            none.to_string().contains("no interrupt line 24"),
            "{none:#}"
        );
    }

    #[test]
    fn levels_that_were_taken_over_reach_the_driver_when_they_change() {
        let lines = Lines::default();
        lines.drive(3, true, |_, _| Ok(())).unwrap();
        lines.drive(20, true, |_, _| Ok(())).unwrap();
        let other = Lines::default();
        other.adopt(lines.levels());
        assert_eq!(other.levels(), 1 << 3 | 1 << 20);
        other.drive(3, true, |_, _| panic!("it is high")).unwrap();
        let mut seen = 0;
        let count = |_, high: bool| {
            seen += 1;
            assert!(!high);
            Ok(())
        };
        other.drive(20, false, count).unwrap();
        assert_eq!((seen, other.levels()), (1, 1 << 3));
    }

    /// The 8259 was not programmed yet when the line rose.
    #[test]
    fn a_pin_falls_although_the_8259_did_not_see_it_rise() {
        let lines = Lines::default();
        let mut ioapic = 0;
        for high in [true, false] {
            let driver = |pin, high| match (pin, high) {
                (Pin::Pic(_), true) => Ok(()),
                (Pin::Pic(_), false) => Err(io::Error::from_raw_os_error(libc::ERANGE)),
                (Pin::Ioapic(_), true) => {
                    ioapic += 1;
                    Ok(())
                }
                (Pin::Ioapic(_), false) => {
                    ioapic -= 1;
                    Ok(())
                }
            };
            lines.drive(4, high, driver).unwrap();
        }
        assert_eq!(ioapic, 0);
    }

    #[test]
    fn other_errors_are_told_and_both_chips_are_asked() {
        let mut asked = 0;
        let refuse = |_, _| {
            asked += 1;
            Err(io::Error::from_raw_os_error(libc::EINVAL))
        };
        let error = Lines::default().drive(4, true, refuse).unwrap_err();
        assert!(error.to_string().contains("interrupt line 4"), "{error:#}");
        assert_eq!(asked, 2);
    }
}

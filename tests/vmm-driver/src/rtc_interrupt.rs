//! The CMOS clock's interrupts: line 8, for as long as register C says that one is there.

use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::clocks::{Alarms, REGISTER_C};
use crate::lines::{IOAPIC_LINES, PIC_LINES};
use crate::machine::Machine;

const LINE: u32 = 8;
/// How often it is looked what has come due: while something may, and while nothing can.
const BUSY: Duration = Duration::from_micros(500);
const IDLE: Duration = Duration::from_millis(10);

/// Watches a VM's clock for as long as there is the VM.
pub fn watch(machine: &Arc<Machine>) -> std::io::Result<()> {
    let machine = Arc::downgrade(machine);
    let thread = std::thread::Builder::new().name("vmm-rtc".into());
    thread.spawn(move || look(&machine)).map(drop)
}

fn look(machine: &Weak<Machine>) {
    let mut alarms = Alarms::default();
    while let Some(vm) = machine.upgrade() {
        let (enabled, high) = vm.clocks.look(&mut alarms);
        if high {
            vm.set_clock_line(true);
        }
        drop(vm);
        std::thread::sleep(if enabled { BUSY } else { IDLE });
    }
}

impl Machine {
    fn set_clock_line(&self, high: bool) {
        for line in [PIC_LINES + LINE, IOAPIC_LINES + LINE] {
            if let Err(error) = self.fd.set_irq_line(line, high) {
                crate::violation(
                    &self.name,
                    &format!("KVM refuses the clock's line: {error}"),
                );
            }
        }
    }

    /// After the guest has read this register of the clock.
    pub fn clock_register_read(&self, index: usize) {
        if index == REGISTER_C {
            self.set_clock_line(false);
        }
    }
}

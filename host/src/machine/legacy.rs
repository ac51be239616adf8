//! The chipset's devices at fixed ports: power management, clock, PS/2, system control, latches, debug port.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::isa::{self, IsaRegion};
use super::latches::{self, Latches};
use super::pm::{self, Pm};
use super::power::EventSender;
use super::ps2::{self, Ps2};
use super::reset::{self, ControlPortA, ResetPulse};
use super::rtc::{self, Rtc};
use super::{Board, DebugPort, debug_port};
use crate::bus::{Buses, Registers};
use crate::hypervisor::Vm;
use crate::memory::GuestMemory;
use crate::pci::{IrqLines, IrqPin};

/// Where the ACPI PM timer is, whoever makes it.
const PM_TIMER_PORT: u16 = pm::PM_BASE + pm::PM_TIMER;

/// All of them.
pub(super) struct Legacy<V: Vm> {
    pub pm: Arc<Pm<V>>,
    /// None if the hypervisor has a CMOS clock.
    rtc: Option<Arc<Rtc<V>>>,
    /// What the CMOS memory holds at power-on.
    memory_sizes: [(u8, u8); 11],
    latches: Arc<Latches>,
    ps2: Option<Arc<Ps2<V>>>,
}

impl<V: Vm> Legacy<V> {
    /// Puts those that `board` has on the buses, at power-on.
    ///
    /// # Errors
    /// A port is taken.
    pub fn new(
        vm: &V,
        buses: &Buses,
        lines: &Arc<IrqLines<V>>,
        memory: &GuestMemory,
        board: Board,
        debug_port: Arc<DebugPort>,
        events: &EventSender,
    ) -> Result<Self> {
        let pin = |irq: u8| -> Result<IrqPin<V>> {
            lines
                .pin(u32::from(irq))
                .with_context(|| format!("the board has no interrupt line {irq}"))
        };
        let claim = |owner: &str, regions: &[IsaRegion], target: Arc<dyn Registers>| {
            isa::claim(buses, owner, regions, &target)
        };
        let ports = IsaRegion::ports_at;

        let pm = Arc::new(Pm::new(pin(pm::SCI)?, Arc::clone(events)));
        let blocks = [
            ports(pm::REGION_PM, pm::PM_BASE, pm::PM_LEN),
            ports(pm::REGION_GPE0, pm::GPE0_BASE, u16::from(pm::GPE0_LEN)),
        ];
        claim("power management", &blocks, pm.clone())?;

        let memory_sizes = rtc::memory_sizes(memory);
        let owner = "the CMOS clock";
        let rtc = if vm.start_clocks(PM_TIMER_PORT, &memory_sizes)? {
            buses.pio.reserve(owner, rtc::RTC_PORT.into(), 2)?;
            None
        } else {
            let rtc = Arc::new(Rtc::new(pin(rtc::RTC_IRQ)?, memory_sizes));
            claim(owner, &[ports(0, rtc::RTC_PORT, 2)], rtc.clone())?;
            Some(rtc)
        };

        let control = Arc::new(ControlPortA::new(Arc::clone(events)));
        let region = [ports(0, reset::CONTROL_PORT_A, 1)];
        claim("system control port A", &region, control)?;

        let latches = Arc::new(Latches::default());
        let regions = [
            ports(
                latches::REGION_PAGE,
                latches::PAGE_PORTS,
                latches::PAGE_PORTS_LEN,
            ),
            ports(
                latches::REGION_APM,
                latches::APM_PORTS,
                latches::APM_PORTS_LEN,
            ),
        ];
        claim("POST code and APM ports", &regions, latches.clone())?;

        let region = [ports(0, debug_port::DEBUG_PORT, 1)];
        claim("the debug port", &region, debug_port)?;

        let regions = [
            ports(ps2::REGION_DATA, ps2::DATA_PORT, 1),
            ports(ps2::REGION_COMMAND, ps2::COMMAND_PORT, 1),
        ];
        let ps2 = if board.ps2 {
            let (keyboard, mouse) = (pin(ps2::KEYBOARD_IRQ)?, pin(ps2::MOUSE_IRQ)?);
            let ps2 = Arc::new(Ps2::new(keyboard, mouse, Arc::clone(events)));
            claim("the PS/2 controller", &regions, ps2.clone())?;
            Some(ps2)
        } else {
            let pulse = Arc::new(ResetPulse::new(Arc::clone(events)));
            claim("the reset pulse", &regions, pulse)?;
            None
        };
        Ok(Self {
            pm,
            rtc,
            memory_sizes,
            latches,
            ps2,
        })
    }

    /// Whether there is a PS/2 controller.
    pub fn has_ps2(&self) -> bool {
        self.ps2.is_some()
    }

    /// What in the board has this interrupt line for itself.
    pub fn irq_holder(&self, irq: u8) -> Option<&'static str> {
        match irq {
            0 => Some("timer"),
            ps2::KEYBOARD_IRQ if self.has_ps2() => Some("keyboard"),
            2 => Some("interrupt controllers"),
            rtc::RTC_IRQ => Some("clock"),
            ps2::MOUSE_IRQ if self.has_ps2() => Some("mouse"),
            13 => Some("coprocessor"),
            _ => None,
        }
    }

    /// Power-on state, as far as the reset line reaches.
    pub fn reset(&self) {
        self.pm.reset();
        if let Some(rtc) = &self.rtc {
            rtc.reset();
        }
        self.latches.reset();
        if let Some(ps2) = &self.ps2 {
            ps2.reset();
        }
    }

    /// Starts the hypervisor's clocks again, if it has them.
    ///
    /// # Errors
    /// The hypervisor refused.
    pub fn restart_clocks(&self, vm: &V) -> Result<()> {
        vm.start_clocks(PM_TIMER_PORT, &self.memory_sizes).map(drop)
    }
}

//! The port on the PC's bus: registers, interrupt pin, and the character backend at the other end of the line.

use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use vmm_plugin_api::{
    CharDevice, Counter, Description, Device, Events, Host, Options, Pin, Region, Trigger,
};

use crate::fifo::DEPTH;
use crate::registers::Registers;
use crate::state;

/// Token of the watch on the backend's descriptor and of the timer that looks for more input.
const INPUT: u64 = 0;
/// Token of the timer that raises a "transmitter empty" interrupt that was put off.
const OUTPUT: u64 = 1;

/// How long "transmitter empty" is put off when a guest's interrupt handler does not come to an end.
const REST_NS: u64 = 1_000_000;
/// Limits of the pause between two FIFOs full of input; see [`Line::pause`].
const PAUSE_NS: std::ops::RangeInclusive<u64> = 50_000..=2_000_000;

/// Where input stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Input {
    /// No backend, or the device is not running.
    Off,
    /// The backend's descriptor is watched.
    Watched,
    /// The receiver has no room: what comes stays in the backend until the guest has read.
    Full,
    /// The guest has read everything; the timer will look for more.
    Pausing,
}

/// All that changes, under one lock that vCPUs and the I/O thread hold for a few instructions.
struct Line {
    registers: Registers,
    /// Level of the interrupt pin as the host knows it.
    pin: bool,
    input: Input,
    /// When the receiver was last filled.
    filled: u64,
    rest_timer: bool,
}

/// `lpc-uart`: one serial port.
pub struct Uart {
    host: Host,
    address: u64,
    irq: u32,
    backend: Option<CharDevice>,
    line: Mutex<Line>,
    sent: Counter,
    received: Counter,
    dropped: Counter,
}

impl Device for Uart {
    const STATE_VERSION: Option<u32> = Some(state::VERSION);

    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let (address, irq) = match options.str("port")? {
            "com1" => (0x3f8, 4),
            "com2" => (0x2f8, 3),
            "com3" => (0x3e8, 4),
            "com4" => (0x2e8, 3),
            other => bail!("option `port` is `{other}`; it can be com1, com2, com3 or com4"),
        };
        Ok(Self {
            address,
            irq,
            backend: options.maybe_char("char_dev")?,
            line: Mutex::new(Line {
                registers: Registers::default(),
                pin: false,
                input: Input::Off,
                filled: 0,
                rest_timer: false,
            }),
            sent: host.counter("sent_bytes"),
            received: host.counter("received_bytes"),
            dropped: host.counter("dropped_bytes"),
            host: host.clone(),
        })
    }

    fn describe(&self) -> Description {
        Description {
            regions: vec![Region::pio(0, self.address, 8)],
            // ISA interrupts are edges; ports that share one take turns.
            pins: vec![Pin {
                irq: self.irq,
                trigger: Trigger::Edge,
            }],
            acpi_hid: Some("PNP0501".into()),
            pci: None,
        }
    }

    /// The chip is 8 bits wide: a wider access is one access for each byte, in order, as the bus does it.
    fn read(&self, _region: u32, offset: u64, width: u32) -> u64 {
        let mut line = self.lock();
        let value = (0..u64::from(width.min(8))).fold(0, |value, i| {
            value | u64::from(line.registers.read(register(offset + i))) << (8 * i)
        });
        self.settle(&mut line);
        value
    }

    fn write(&self, _region: u32, offset: u64, width: u32, value: u64) {
        let mut line = self.lock();
        for i in 0..u64::from(width.min(8)) {
            let byte = (value >> (8 * i)) as u8;
            if let Some(out) = line.registers.write(register(offset + i), byte) {
                self.send(out);
            }
        }
        self.settle(&mut line);
    }

    fn start(&self) -> Result<()> {
        self.run()
    }

    fn pause(&self) -> Result<()> {
        self.halt();
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        self.run()
    }

    fn reset(&self) -> Result<()> {
        let mut line = self.lock();
        line.registers = Registers::default();
        self.drive(&mut line);
        Ok(())
    }

    fn stop(&self) {
        self.halt();
    }

    fn ready(&self, token: u64, events: Events) {
        let mut line = self.lock();
        match token {
            // Input that is off was so since this call was on its way: it comes again after resume.
            INPUT
                if line.input != Input::Off && (events.timer() || line.input == Input::Watched) =>
            {
                if let Err(error) = self.fill(&mut line) {
                    self.host
                        .log(log::Level::Error, format_args!("no more input: {error:#}"));
                }
            }
            OUTPUT if line.rest_timer => {
                line.rest_timer = false;
                line.registers.transmitter_rested();
            }
            _ => return,
        }
        self.settle(&mut line);
    }

    fn save(&self) -> Result<Vec<u8>> {
        Ok(self.lock().registers.encode())
    }

    fn load(&self, version: u32, state: &[u8]) -> Result<()> {
        if version != state::VERSION {
            bail!(
                "this serial port loads state of version {}, not {version}",
                state::VERSION
            );
        }
        self.lock().registers = Registers::decode(state)?;
        Ok(())
    }
}

/// The register at `offset`; beyond the last one is one that the chip doesn't have.
fn register(offset: u64) -> u8 {
    u8::try_from(offset).unwrap_or(u8::MAX)
}

impl Uart {
    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, byte: u8) {
        self.sent.add(1);
        if let Some(backend) = &self.backend
            && backend.write(&[byte]) == 0
        {
            self.dropped.add(1);
        }
    }

    /// Brings the outside in line with the registers: interrupt pin, timers, input.
    fn settle(&self, line: &mut Line) {
        self.drive(line);
        if line.registers.resting() && !line.rest_timer && line.input != Input::Off {
            line.rest_timer = self.timer(OUTPUT, REST_NS);
        }
        if line.input == Input::Full
            && line.registers.drained()
            && self.timer(INPUT, line.pause(self.host.clock()))
        {
            line.input = Input::Pausing;
        }
    }

    fn drive(&self, line: &mut Line) {
        let high = line.registers.interrupting();
        if high != line.pin {
            line.pin = high;
            self.host.set_pin(0, high);
        }
    }

    fn timer(&self, token: u64, after: u64) -> bool {
        let set = self
            .host
            .timer(token, Some(self.host.clock().saturating_add(after)));
        if let Err(error) = &set {
            self.host.fault("timer", &format!("{error:#}"));
        }
        set.is_ok()
    }

    /// Moves what the backend has into the receiver. A receiver that is full then is left alone until the guest has read.
    fn fill(&self, line: &mut Line) -> Result<()> {
        let Some(backend) = &self.backend else {
            return Ok(());
        };
        let mut bytes = [0; DEPTH];
        let room = line.registers.room();
        if room > 0 {
            let got = backend.read(&mut bytes[..room]).unwrap_or(0);
            line.registers.receive(&bytes[..got]);
            line.filled = self.host.clock();
            self.received.add(got as u64);
        }
        if line.registers.room() == 0 {
            if line.input == Input::Watched {
                self.host.unwatch(INPUT);
            }
            line.input = Input::Full;
        } else if line.input != Input::Watched {
            self.watch(line)?;
        }
        Ok(())
    }

    fn watch(&self, line: &mut Line) -> Result<()> {
        if let Some(fd) = self.backend.as_ref().and_then(CharDevice::fd) {
            self.host
                .watch(fd, Events::READ, INPUT)
                .context("can't watch the character backend")?;
        }
        line.input = Input::Watched;
        Ok(())
    }

    fn run(&self) -> Result<()> {
        let mut line = self.lock();
        self.watch(&mut line)?;
        // Registers may have been loaded since the host last heard of the pin.
        line.pin = line.registers.interrupting();
        self.host.set_pin(0, line.pin);
        self.settle(&mut line);
        Ok(())
    }

    fn halt(&self) {
        let mut line = self.lock();
        line.input = Input::Off;
        line.rest_timer = false;
        self.host.unwatch(INPUT);
        for token in [INPUT, OUTPUT] {
            // Without timers there is none to cancel.
            let _ = self.host.timer(token, None);
        }
    }
}

impl Line {
    /// How long the guest gets for other work after it has emptied the receiver: four times what emptying took. A receiver that
    /// is full again at once keeps a slow guest in its interrupt handler, where it can't process what it has read and
    /// drops it (Linux: "input overrun").
    fn pause(&self, now: u64) -> u64 {
        now.saturating_sub(self.filled)
            .saturating_mul(4)
            .clamp(*PAUSE_NS.start(), *PAUSE_NS.end())
    }
}

//! `driver = "qemu-pvpanic"`: a port by which a guest says that its kernel has panicked.
//!
//! The device is QEMU's (docs/specs/pvpanic.rst there), as an ISA device at its usual port.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use anyhow::bail;
use log::Level;
use vmm_plugin_api::{Counter, Description, Device, Host, Options, Region, Result};

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: { "qemu-pvpanic" => PvPanic },
    blocks: {},
    chars: {},
}

const PORT: u64 = 0x505;
/// Events: the guest has panicked; it has panicked and goes on into a crash kernel. Reads tell which of them are known.
const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;
const KNOWN: u8 = PANICKED | CRASH_LOADED;

/// Lines in the log in the life of a VM: a guest may panic and reset all the time.
const LOGGED: u32 = 100;

/// What follows a panic besides a line in the log.
#[derive(Clone, Copy)]
enum OnPanic {
    Log,
    Stop,
    Reset,
}

/// The device.
pub struct PvPanic {
    host: Host,
    enabled: bool,
    on_panic: OnPanic,
    /// Events that the guest has reported since its last reset: each is logged once.
    seen: AtomicU8,
    logged: AtomicU32,
    panics: Counter,
    crash_kernels: Counter,
}

impl Device for PvPanic {
    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let on_panic = match options.str("on_panic")? {
            "log" => OnPanic::Log,
            "stop" => OnPanic::Stop,
            "reset" => OnPanic::Reset,
            other => bail!("option `on_panic` is `{other}`; it can be log, stop or reset"),
        };
        Ok(Self {
            enabled: options.bool("enable_isa")?,
            on_panic,
            seen: AtomicU8::new(0),
            logged: AtomicU32::new(0),
            panics: host.counter("panics"),
            crash_kernels: host.counter("crash_kernels"),
            host: host.clone(),
        })
    }

    fn describe(&self) -> Description {
        if !self.enabled {
            return Description::default();
        }
        Description {
            regions: vec![Region::pio(0, PORT, 1)],
            acpi_hid: Some("QEMU0001".into()),
            ..Description::default()
        }
    }

    fn read(&self, _region: u32, _offset: u64, _width: u32) -> u64 {
        KNOWN.into()
    }

    fn write(&self, _region: u32, _offset: u64, _width: u32, value: u64) {
        let events = value as u8 & KNOWN;
        let new = events & !self.seen.fetch_or(events, Ordering::AcqRel);
        if events & CRASH_LOADED != 0 {
            self.crash_kernels.add(1);
        }
        if new & CRASH_LOADED != 0 {
            self.warn("the guest has panicked and goes on into its crash kernel");
        }
        if events & PANICKED != 0 {
            self.panics.add(1);
        }
        if new & PANICKED != 0 {
            self.warn("the guest has panicked");
            match self.on_panic {
                OnPanic::Log => {}
                OnPanic::Stop => self.host.request_failure("the guest has panicked"),
                OnPanic::Reset => self.host.request_reset("reset after the guest's panic"),
            }
        }
    }

    fn reset(&self) -> Result<()> {
        self.seen.store(0, Ordering::Release);
        Ok(())
    }
}

impl PvPanic {
    fn warn(&self, what: &str) {
        if self.logged.load(Ordering::Relaxed) >= LOGGED {
            return;
        }
        match self.logged.fetch_add(1, Ordering::Relaxed) + 1 {
            ..LOGGED => self.host.log(Level::Warn, format_args!("{what}")),
            LOGGED => {
                let last = format_args!("{what}; from now on that is only counted");
                self.host.log(Level::Warn, last);
            }
            _ => {}
        }
    }
}

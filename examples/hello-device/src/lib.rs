//! A device with one I/O port: each byte that the guest reads is the next letter of a text, and 0 at its end; whatever
//! the guest writes starts over.
//!
//! ```toml
//! [dev.greeter]
//! driver = "hello"
//! port = 0x500
//! text = "Good morning\n"
//! ```

use std::sync::atomic::{AtomicUsize, Ordering};

use vmm_plugin_api::{Description, Device, Host, Options, Region, Result};

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: { "hello" => Hello },
    blocks: {},
    chars: {},
}

/// The device. The host calls it from several vCPU threads at once, hence the atomic.
pub struct Hello {
    port: u64,
    text: Vec<u8>,
    next: AtomicUsize,
}

impl Device for Hello {
    const STATE_VERSION: Option<u32> = Some(1);

    /// The host has checked the options against `plugin.toml` and filled in its defaults.
    fn create(options: &Options<'_>, _host: &Host) -> Result<Self> {
        Ok(Self {
            port: options.u64("port")?,
            text: options.str("text")?.into(),
            next: AtomicUsize::new(0),
        })
    }

    fn describe(&self) -> Description {
        Description {
            regions: vec![Region::pio(0, self.port, 1)],
            ..Description::default()
        }
    }

    fn read(&self, _region: u32, _offset: u64, _width: u32) -> u64 {
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        self.text.get(at).copied().unwrap_or(0).into()
    }

    fn write(&self, _region: u32, _offset: u64, _width: u32, _value: u64) {
        self.next.store(0, Ordering::Relaxed);
    }

    fn reset(&self) -> Result<()> {
        self.next.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// State is explicit bytes of a fixed size, so that it means the same on any machine.
    fn save(&self) -> Result<Vec<u8>> {
        let next = self.next.load(Ordering::Relaxed) as u64;
        Ok(next.to_le_bytes().into())
    }

    fn load(&self, _version: u32, state: &[u8]) -> Result<()> {
        let next = u64::from_le_bytes(state.try_into()?);
        self.next.store(usize::try_from(next)?, Ordering::Relaxed);
        Ok(())
    }
}

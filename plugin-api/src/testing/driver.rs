//! The guest driver's side of virtio-pci (virtio 1.2 sections 2.7, 3.1 and 4.1), to test any virtio device without a guest.

mod ring;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::{FakeDevice, FakeHost};
use crate::{GuestMemory, Result};
pub use ring::{Buffer, DriverQueue};

const F_VERSION_1: u64 = 1 << 32;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// A register of the device: region and offset.
#[derive(Clone, Copy, Debug)]
struct Place {
    region: u32,
    offset: u64,
}

/// Which register layout the driver uses.
enum Layout {
    Modern {
        common: Place,
        notify: Place,
        multiplier: u64,
        isr: Place,
        config: Place,
    },
    Legacy {
        region: u32,
    },
}

/// The guest driver's side of any virtio-pci device.
///
/// ```no_run
/// use std::time::Duration;
/// use vmm_plugin_api::testing::{Buffer, FakeDevice, FakeHost, VirtioDriver};
///
/// fn test(host: &FakeHost, device: &FakeDevice) -> vmm_plugin_api::Result<()> {
///     let mut driver = VirtioDriver::modern(host, device)?;
///     let features = driver.negotiate(u64::MAX)?;
///     let mut queue = driver.queue(0, 64, 0)?; // queue 0 with 64 entries and MSI-X vector 0
///     driver.ready()?;
///     let (header, data) = (driver.allocate(16, 16), driver.allocate(512, 512));
///     queue.add(&[Buffer::readable(header, 16), Buffer::writable(data, 512)]);
///     queue.kick(device);
///     let (head, written) = queue.wait(Duration::from_secs(5)).expect("the device answers");
///     assert_eq!(device.interrupts(0), 1);
///     Ok(())
/// }
/// ```
///
/// Everything that a driver may do wrong can be done: [`DriverQueue::set_descriptor`] and [`DriverQueue::publish`] write
/// whatever they are given. Rings and buffers come from the fake host's RAM, from guest address 64 KiB up.
pub struct VirtioDriver<'a> {
    device: &'a FakeDevice,
    memory: GuestMemory,
    layout: Layout,
    features: u64,
    next_free: u64,
    status: u8,
}

impl<'a> VirtioDriver<'a> {
    /// A driver that finds the structures through the vendor capabilities. It resets the device and announces itself.
    ///
    /// # Errors
    /// A capability is missing, or points at no BAR of the device.
    pub fn modern(host: &FakeHost, device: &'a FakeDevice) -> Result<Self> {
        let (mut places, mut multiplier) = (BTreeMap::new(), 0);
        for (id, body) in device.capabilities() {
            if id != 0x09 || body.len() < 14 {
                continue;
            }
            let word = |at: usize| {
                let bytes = body.get(at..at + 4).and_then(|b| b.try_into().ok());
                u32::from_le_bytes(bytes.unwrap_or_default())
            };
            // A driver takes the first of each type that it can use.
            if places.contains_key(&body[1]) {
                continue;
            }
            let bar = u32::from(body[2]);
            let region = device
                .regions()
                .iter()
                .find(|r| r.kind >= 3 && r.bar == bar);
            if let (Some(region), kind @ 1..=4) = (region, body[1]) {
                let end = u64::from(word(6)) + u64::from(word(10));
                ensure!(end <= region.size, "structure {kind} ends behind its BAR");
                let offset = word(6).into();
                let region = region.id;
                places.insert(kind, Place { region, offset });
                if kind == 2 {
                    multiplier = word(14).into();
                }
            }
        }
        let place = |kind: u8, name: &str| {
            let place = places.get(&kind).copied();
            place.with_context(|| format!("the device has no capability for its {name}"))
        };
        let layout = Layout::Modern {
            common: place(1, "common configuration")?,
            notify: place(2, "notifications")?,
            multiplier,
            isr: place(3, "ISR status")?,
            config: place(4, "device configuration")?,
        };
        Self::probe(host, device, layout)
    }

    /// A driver that uses the legacy I/O BAR, as those for virtio 0.9.5 do.
    ///
    /// # Errors
    /// The device has no I/O BAR 0.
    pub fn legacy(host: &FakeHost, device: &'a FakeDevice) -> Result<Self> {
        let bar = device
            .regions()
            .iter()
            .find(|r| r.kind == vmm_abi::device::REGION_BAR_IO && r.bar == 0);
        let region = bar.context("the device has no legacy BAR")?.id;
        Self::probe(host, device, Layout::Legacy { region })
    }

    fn probe(host: &FakeHost, device: &'a FakeDevice, layout: Layout) -> Result<Self> {
        let mut driver = Self {
            device,
            memory: host.memory(),
            layout,
            features: 0,
            next_free: 0x1_0000,
            status: 0,
        };
        driver.reset(Duration::from_secs(10))?;
        driver.add_status(ACKNOWLEDGE | DRIVER);
        Ok(driver)
    }

    /// Guest RAM.
    #[must_use]
    pub fn memory(&self) -> GuestMemory {
        self.memory
    }

    /// Takes `bytes` of guest RAM, zeroed, aligned to `align`. Nothing is ever given back.
    ///
    /// # Panics
    /// There is no more RAM: the test needs a larger fake host.
    #[must_use]
    #[allow(clippy::expect_used)] // a test can't go on
    pub fn allocate(&mut self, bytes: u64, align: u64) -> u64 {
        let address = self.next_free.next_multiple_of(align);
        self.next_free = address + bytes;
        let slice = self.memory.readable(address, bytes);
        slice.expect("the fake host has RAM left").fill(0);
        address
    }

    fn common(&self, modern: u64, legacy: u64) -> Place {
        match self.layout {
            Layout::Modern { common, .. } => Place {
                region: common.region,
                offset: common.offset + modern,
            },
            Layout::Legacy { region } => Place {
                region,
                offset: legacy,
            },
        }
    }

    fn get(&self, place: Place, width: u32) -> u64 {
        self.device.read(place.region, place.offset, width)
    }

    fn set(&self, place: Place, width: u32, value: u64) {
        self.device.write(place.region, place.offset, width, value);
    }

    /// The device status byte.
    #[must_use]
    pub fn status(&self) -> u8 {
        self.get(self.common(20, 18), 1) as u8
    }

    /// Sets bits of the device status.
    pub fn add_status(&mut self, bits: u8) {
        self.status |= bits;
        self.set(self.common(20, 18), 1, self.status.into());
    }

    /// Writes 0 to the device status and does not wait.
    pub fn begin_reset(&mut self) {
        self.status = 0;
        self.features = 0;
        self.set(self.common(20, 18), 1, 0);
    }

    /// Resets the device and waits until its status reads 0.
    ///
    /// # Errors
    /// It does not within `timeout`.
    pub fn reset(&mut self, timeout: Duration) -> Result<()> {
        self.begin_reset();
        let end = Instant::now() + timeout;
        while self.status() != 0 {
            ensure!(
                Instant::now() < end,
                "the device's status stays {:#x}",
                self.status()
            );
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Feature bits that the device offers.
    #[must_use]
    pub fn offered(&self) -> u64 {
        let Layout::Modern { .. } = self.layout else {
            return self.get(self.common(0, 0), 4);
        };
        let half = |n: u64| {
            self.set(self.common(0, 0), 4, n);
            self.get(self.common(4, 0), 4)
        };
        half(0) | half(1) << 32
    }

    /// Takes those of `wanted` that are offered, and tells the device; returns them. A modern driver takes `VERSION_1` always.
    ///
    /// # Errors
    /// The device does not keep FEATURES_OK.
    pub fn negotiate(&mut self, wanted: u64) -> Result<u64> {
        let features = self.offered() & (wanted | F_VERSION_1);
        self.accept(features)?;
        Ok(features)
    }

    /// Tells the device that the driver takes exactly `features`, offered or not.
    ///
    /// # Errors
    /// The device does not keep FEATURES_OK.
    pub fn accept(&mut self, features: u64) -> Result<()> {
        self.features = features;
        if let Layout::Legacy { .. } = self.layout {
            self.set(self.common(0, 4), 4, features & 0xffff_ffff);
            return Ok(());
        }
        for half in 0..2 {
            self.set(self.common(8, 0), 4, half);
            self.set(self.common(12, 0), 4, features >> (32 * half) & 0xffff_ffff);
        }
        self.add_status(FEATURES_OK);
        if self.status() & FEATURES_OK == 0 {
            bail!("the device refuses features {features:#x}");
        }
        Ok(())
    }

    /// How many queues there are; modern layout only, else 0.
    #[must_use]
    pub fn queue_count(&self) -> u16 {
        match self.layout {
            Layout::Modern { .. } => self.get(self.common(18, 0), 2) as u16,
            Layout::Legacy { .. } => 0,
        }
    }

    /// The largest size of queue `index`; 0: there is no such queue.
    #[must_use]
    pub fn queue_max(&self, index: u16) -> u16 {
        self.set(self.common(22, 14), 2, index.into());
        self.get(self.common(24, 12), 2) as u16
    }

    /// The number that changes with the device configuration; modern layout only, else 0.
    #[must_use]
    pub fn config_generation(&self) -> u8 {
        match self.layout {
            Layout::Modern { .. } => self.get(self.common(21, 0), 1) as u8,
            Layout::Legacy { .. } => 0,
        }
    }

    /// Has configuration changes interrupt by MSI-X vector `vector`; returns the vector that reads back.
    #[must_use]
    pub fn config_vector(&self, vector: u16) -> u16 {
        let place = self.common(16, 20);
        self.set(place, 2, vector.into());
        self.get(place, 2) as u16
    }

    /// Sets queue `index` up with `size` entries and MSI-X vector `vector`. A legacy driver can't choose the size:
    /// it takes the device's.
    ///
    /// # Errors
    /// There is no such queue, or the device does not take the vector.
    pub fn queue(&mut self, index: u16, size: u16, vector: u16) -> Result<DriverQueue> {
        let max = self.queue_max(index);
        ensure!(max != 0, "the device has no queue {index}");
        let legacy = matches!(self.layout, Layout::Legacy { .. });
        let size = if legacy { max } else { size };
        let place = self.common(26, 22);
        self.set(place, 2, vector.into());
        ensure!(
            self.get(place, 2) == u64::from(vector) || !self.device_uses_msix(),
            "the device refuses MSI-X vector {vector}"
        );
        let entries = u64::from(size);
        // One block, laid out as the legacy interface wants it (section 2.7.2); as good as any for the modern one.
        let used_offset = (16 * entries + 6 + 2 * entries).next_multiple_of(4096);
        let base = self.allocate(used_offset + 6 + 8 * entries, 4096);
        let queue = DriverQueue::new(
            self.memory,
            self.notify_place(index),
            [base, base + 16 * entries, base + used_offset],
            (index, size),
            self.features,
        )?;
        if legacy {
            self.set(self.common(0, 8), 4, base / 4096);
            return Ok(queue);
        }
        self.set(self.common(24, 0), 2, size.into());
        for (offset, address) in [
            (32, queue.descriptors),
            (40, queue.available),
            (48, queue.used),
        ] {
            self.set(self.common(offset, 0), 4, address & 0xffff_ffff);
            self.set(self.common(offset + 4, 0), 4, address >> 32);
        }
        self.set(self.common(28, 0), 2, 1);
        Ok(queue)
    }

    fn device_uses_msix(&self) -> bool {
        self.device.msix_enabled()
    }

    fn notify_place(&self, index: u16) -> (u32, u64) {
        match self.layout {
            Layout::Modern {
                notify, multiplier, ..
            } => {
                self.set(self.common(22, 0), 2, index.into());
                let unit = self.get(self.common(30, 0), 2);
                (notify.region, notify.offset + unit * multiplier)
            }
            Layout::Legacy { region } => (region, 16),
        }
    }

    /// Sets DRIVER_OK.
    ///
    /// # Errors
    /// The device does not keep it.
    pub fn ready(&mut self) -> Result<()> {
        self.add_status(DRIVER_OK);
        ensure!(self.status() & DRIVER_OK != 0, "the device is not ready");
        Ok(())
    }

    /// Reads `width` bytes of the device configuration.
    #[must_use]
    pub fn config(&self, offset: u64, width: u32) -> u64 {
        let place = match self.layout {
            Layout::Modern { config, .. } => config,
            Layout::Legacy { region } => Place {
                region,
                offset: if self.device_uses_msix() { 24 } else { 20 },
            },
        };
        self.device.read(place.region, place.offset + offset, width)
    }

    /// Reads the ISR status, which clears it.
    #[must_use]
    pub fn isr(&self) -> u8 {
        let place = match self.layout {
            Layout::Modern { isr, .. } => isr,
            Layout::Legacy { region } => Place { region, offset: 19 },
        };
        self.get(place, 1) as u8
    }
}

//! The guest driver's side of virtio-pci (virtio 1.2 sections 2.7, 3.1 and 4.1), to test any virtio device without a guest.
//!
//! ```ignore
//! let mut driver = VirtioDriver::modern(&host, &dev)?;
//! let features = driver.negotiate(u64::MAX)?;
//! let mut queue = driver.queue(0, 64, 0)?;          // queue 0, 64 entries, MSI-X vector 0
//! driver.ready()?;
//! let data = driver.allocate(512, 512);
//! queue.add(&[Buffer::readable(header, 16), Buffer::writable(data, 512), Buffer::writable(status, 1)]);
//! queue.kick(&dev);
//! let (head, written) = queue.wait(Duration::from_secs(5)).expect("the device answers");
//! ```
//!
//! Everything a driver may do wrong can be done: [`DriverQueue::set_descriptor`] and [`DriverQueue::publish`] write
//! whatever they are given. Rings and buffers come from the low part of the fake host's RAM, from 64 KiB on.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::{FakeDevice, FakeHost};
use crate::{GuestMemory, GuestSlice, Result};

const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;

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

/// A driver that has found its device.
pub struct VirtioDriver<'a> {
    device: &'a FakeDevice,
    memory: GuestMemory,
    layout: Layout,
    features: u64,
    next_free: u64,
    status: u8,
}

/// A piece of guest memory in a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// The device writes it; otherwise it reads it.
    pub writable: bool,
}

impl Buffer {
    /// For the device to read.
    #[must_use]
    pub const fn readable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            writable: false,
        }
    }

    /// For the device to write.
    #[must_use]
    pub const fn writable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            writable: true,
        }
    }
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
                places.entry(kind).or_insert(Place { region, offset });
            }
            if body[1] == 2 {
                multiplier = word(14).into();
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

/// A split virtqueue as the driver uses it.
pub struct DriverQueue {
    memory: GuestMemory,
    notify: (u32, u64),
    index: u16,
    size: u16,
    features: u64,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    available_ring: GuestSlice,
    used_ring: GuestSlice,
    next_available: u16,
    /// `avail.idx` at the last notification.
    notified: u16,
    next_used: u16,
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
}

impl DriverQueue {
    fn new(
        memory: GuestMemory,
        notify: (u32, u64),
        [descriptors, available, used]: [u64; 3],
        (index, size): (u16, u16),
        features: u64,
    ) -> Result<Self> {
        let entries = u64::from(size);
        Ok(Self {
            memory,
            notify,
            index,
            size,
            features,
            descriptors,
            available,
            used,
            available_ring: memory.readable(available, 6 + 2 * entries)?,
            used_ring: memory.readable(used, 6 + 8 * entries)?,
            next_available: 0,
            notified: 0,
            next_used: 0,
            free: (0..size).rev().collect(),
            chains: BTreeMap::new(),
        })
    }

    /// A queue of one entry that no device knows, at guest address 0: a stand-in where a test moves queues about.
    ///
    /// # Panics
    /// The fake host has no RAM there.
    #[must_use]
    #[allow(clippy::expect_used)] // a mistake of the test
    pub fn detached(host: &FakeHost) -> Self {
        Self::new(host.memory(), (0, 0), [0, 16, 32], (0, 1), 0).expect("RAM at address 0")
    }

    /// Writes entry `index` of the descriptor table as given, sensible or not.
    ///
    /// # Panics
    /// The table has no such entry.
    #[allow(clippy::expect_used)] // a mistake of the test
    pub fn set_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        assert!(index < self.size, "descriptor {index} of {}", self.size);
        let at = self.descriptors + 16 * u64::from(index);
        let bytes = descriptor(address, len, flags, next);
        self.memory
            .write(at, &bytes)
            .expect("the descriptor table is RAM");
    }

    /// Chains `buffers` in the descriptor table and makes them available; returns the head. The device is not notified.
    ///
    /// # Panics
    /// There are not enough free descriptors: take used chains first.
    #[allow(clippy::expect_used)] // a mistake of the test
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let mut taken: Vec<u16> = Vec::with_capacity(buffers.len());
        for _ in buffers {
            taken.push(self.free.pop().expect("free descriptors"));
        }
        for (i, buffer) in buffers.iter().enumerate() {
            let next = taken.get(i + 1).copied();
            let write = if buffer.writable { DESC_WRITE } else { 0 };
            let chained = if next.is_some() { DESC_NEXT } else { 0 };
            self.set_descriptor(
                taken[i],
                buffer.address,
                buffer.len,
                write | chained,
                next.unwrap_or(0),
            );
        }
        let head = taken.first().copied().expect("at least one buffer");
        self.chains.insert(head, taken);
        self.publish(head);
        head
    }

    /// As [`DriverQueue::add`], with the chain in an indirect table at guest address `table` (16 bytes for each buffer).
    ///
    /// # Panics
    /// There is no free descriptor, or the table is not in RAM.
    #[allow(clippy::expect_used)] // a mistake of the test
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        for (i, buffer) in (0u16..).zip(buffers) {
            let write = if buffer.writable { DESC_WRITE } else { 0 };
            let last = usize::from(i) + 1 == buffers.len();
            let chained = if last { 0 } else { DESC_NEXT };
            let bytes = descriptor(buffer.address, buffer.len, write | chained, i + 1);
            self.memory
                .write(table + 16 * u64::from(i), &bytes)
                .expect("the indirect table is RAM");
        }
        let head = self.free.pop().expect("a free descriptor");
        self.set_descriptor(head, table, 16 * buffers.len() as u32, DESC_INDIRECT, 0);
        self.chains.insert(head, vec![head]);
        self.publish(head);
        head
    }

    /// Puts `head`, whatever it is, into the available ring and shows it to the device.
    pub fn publish(&mut self, head: u16) {
        let slot = usize::from(self.next_available % self.size);
        self.available_ring.store_u16(4 + 2 * slot, head);
        self.next_available = self.next_available.wrapping_add(1);
        self.available_ring.store_u16(2, self.next_available);
    }

    /// Notifies the device if it wants to be (section 2.7.10.1); whether it did.
    pub fn kick(&mut self, device: &FakeDevice) -> bool {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let (new, old) = (self.next_available, self.notified);
        let wanted = if self.features & F_EVENT_IDX != 0 {
            let at = 4 + 8 * usize::from(self.size);
            let event = self.used_ring.load_u16(at).unwrap_or(0);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used_ring.load_u16(0).unwrap_or(0) & 1 == 0
        };
        if wanted {
            self.notify(device);
        }
        wanted
    }

    /// Notifies the device whether it wants to be or not.
    pub fn notify(&mut self, device: &FakeDevice) {
        self.notified = self.next_available;
        device.write(self.notify.0, self.notify.1, 2, self.index.into());
    }

    /// Says when the driver wants an interrupt: with event indexes after the `after`-th used chain from now (0: the next),
    /// without them always or, for `None`, never.
    pub fn want_interrupt(&mut self, after: Option<u16>) {
        if self.features & F_EVENT_IDX != 0 {
            // The index just behind means: not before it has gone round.
            let event = match after {
                Some(n) => self.next_used.wrapping_add(n),
                None => self.next_used.wrapping_sub(1),
            };
            self.available_ring
                .store_u16(4 + 2 * usize::from(self.size), event);
        } else {
            self.available_ring.store_u16(0, u16::from(after.is_none()));
        }
    }

    /// The next chain that the device has given back: its head and how many bytes it wrote.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_ring.load_u16(2)? == self.next_used {
            return None;
        }
        let slot = usize::from(self.next_used % self.size);
        let mut element = [0; 8];
        self.used_ring.read(4 + 8 * slot, &mut element);
        let [h0, h1, _, _, written @ ..] = element;
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::from_le_bytes([h0, h1]);
        self.free
            .extend(self.chains.remove(&head).into_iter().flatten());
        Some((head, u32::from_le_bytes(written)))
    }

    /// Waits for [`DriverQueue::take_used`] by looking at the ring; `None`: nothing within `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Option<(u16, u32)> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(used) = self.take_used() {
                return Some(used);
            }
            if Instant::now() >= end {
                return None;
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Free descriptors.
    #[must_use]
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether indirect tables were negotiated.
    #[must_use]
    pub fn has_indirect(&self) -> bool {
        self.features & F_INDIRECT_DESC != 0
    }
}

/// A descriptor's 16 bytes.
fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let high = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
    (u128::from(address) | u128::from(high) << 64).to_le_bytes()
}

//! A split virtqueue from the driver's side (virtio 1.2 section 2.7).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::testing::{FakeDevice, FakeHost};
use crate::{GuestMemory, GuestSlice, Result};

const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;

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
    pub(super) fn new(
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

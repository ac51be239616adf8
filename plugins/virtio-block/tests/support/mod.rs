//! A disk whose behaviour the test controls, and the driver's side of virtio-blk.

#![allow(dead_code)] // each test file uses its part
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod disk;

use std::sync::Arc;
use std::time::Duration;

use vmm_plugin_api::testing::{Buffer, DriverQueue, FakeDevice, FakeHost, Value, VirtioDriver};
use vmm_plugin_virtio_block::VMM_PLUGIN;

pub use disk::{Control, Shape};

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub const S_OK: u8 = 0;
pub const S_IOERR: u8 = 1;
pub const S_UNSUPP: u8 = 2;
/// What the status byte holds before the device writes it.
pub const S_NONE: u8 = 0xee;

pub const WAIT: Duration = Duration::from_secs(20);

/// A virtio disk on a test backend.
pub struct Setup {
    pub host: FakeHost,
    pub device: FakeDevice,
    pub control: Arc<Control>,
}

impl Setup {
    pub fn new(shape: Shape) -> Self {
        Self::with(shape, &[])
    }

    pub fn with(shape: Shape, options: &[(&str, Value)]) -> Self {
        let setup = Self::not_started(shape, options);
        setup.device.start().unwrap();
        setup
    }

    pub fn not_started(shape: Shape, options: &[(&str, Value)]) -> Self {
        let host = FakeHost::new(32 << 20);
        let (control, id) = Control::new(shape);
        let disk = host
            .block(&disk::ROOT, "test-disk", &[("control", id.into())])
            .unwrap();
        let mut all = vec![("block_dev", Value::from(&disk))];
        all.extend_from_slice(options);
        let device = host.device(&VMM_PLUGIN, "pci-virtio-block", &all).unwrap();
        Self {
            host,
            device,
            control,
        }
    }

    /// A device that has another backend than the test's own.
    pub fn on(host: FakeHost, device: FakeDevice) -> Self {
        let (control, _) = Control::new(Shape::default());
        Self {
            host,
            device,
            control,
        }
    }

    /// A modern driver with queue 0 of 64 entries and all features.
    pub fn disk(&self) -> Disk<'_> {
        self.disk_with(u64::MAX, 64)
    }

    pub fn disk_with(&self, features: u64, size: u16) -> Disk<'_> {
        let mut driver = VirtioDriver::modern(&self.host, &self.device).unwrap();
        driver.negotiate(features).unwrap();
        let queue = driver.queue(0, size, 0).unwrap();
        driver.ready().unwrap();
        Disk {
            device: &self.device,
            driver,
            queue,
        }
    }

    pub fn legacy_disk(&self, features: u64) -> Disk<'_> {
        let mut driver = VirtioDriver::legacy(&self.host, &self.device).unwrap();
        driver.negotiate(features).unwrap();
        let queue = driver.queue(0, 0, 0).unwrap();
        driver.ready().unwrap();
        Disk {
            device: &self.device,
            driver,
            queue,
        }
    }
}

/// A driver with one queue.
pub struct Disk<'a> {
    pub device: &'a FakeDevice,
    pub driver: VirtioDriver<'a>,
    pub queue: DriverQueue,
}

/// A request that was added.
pub struct Pending {
    pub head: u16,
    pub status: u64,
    pub data: u64,
    pub len: u32,
}

impl Disk<'_> {
    pub fn header(&mut self, kind: u32, sector: u64) -> u64 {
        let at = self.driver.allocate(16, 16);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.memory().write(at, &header).unwrap();
        at
    }

    pub fn bytes(&self, at: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.driver.memory().read(at, &mut bytes).unwrap();
        bytes
    }

    /// Adds a request with `out` for the device to read and room for `len` bytes in return.
    pub fn add(&mut self, kind: u32, sector: u64, out: &[u8], len: u32) -> Pending {
        let header = self.header(kind, sector);
        let status = self.driver.allocate(1, 1);
        self.driver.memory().write(status, &[S_NONE]).unwrap();
        let mut chain = vec![Buffer::readable(header, 16)];
        if !out.is_empty() {
            let at = self.driver.allocate(out.len() as u64, 512);
            self.driver.memory().write(at, out).unwrap();
            chain.push(Buffer::readable(at, out.len() as u32));
        }
        let data = self.driver.allocate(u64::from(len).max(1), 512);
        if len > 0 {
            chain.push(Buffer::writable(data, len));
        }
        chain.push(Buffer::writable(status, 1));
        let head = if self.queue.has_indirect() {
            let table = self.driver.allocate(16 * chain.len() as u64, 16);
            self.queue.add_indirect(table, &chain)
        } else {
            self.queue.add(&chain)
        };
        Pending {
            head,
            status,
            data,
            len,
        }
    }

    pub fn status(&self, pending: &Pending) -> u8 {
        self.bytes(pending.status, 1)[0]
    }

    /// Notifies the device and waits for the one chain in flight: status, data, bytes written.
    pub fn finish(&mut self, pending: &Pending) -> (u8, Vec<u8>, u32) {
        self.queue.kick(self.device);
        let (head, written) = self.queue.wait(WAIT).expect("the request completes");
        assert_eq!(head, pending.head);
        let data = self.bytes(pending.data, pending.len);
        (self.status(pending), data, written)
    }

    pub fn request(&mut self, kind: u32, sector: u64, out: &[u8], len: u32) -> (u8, Vec<u8>) {
        let pending = self.add(kind, sector, out, len);
        let (status, data, _) = self.finish(&pending);
        (status, data)
    }

    pub fn read(&mut self, sector: u64, len: u32) -> Vec<u8> {
        let (status, data) = self.request(T_IN, sector, &[], len);
        assert_eq!(status, S_OK, "read of {len} bytes at sector {sector}");
        data
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) {
        let (status, _) = self.request(T_OUT, sector, data, 0);
        assert_eq!(
            status,
            S_OK,
            "write of {} bytes at sector {sector}",
            data.len()
        );
    }
}

/// Bytes that tell where they belong.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| ((seed + 1) * 31 + i * 7 + (i >> 9)) as u8)
        .collect()
}

/// A range of a discard or write-zeroes request.
pub fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend_from_slice(&sectors.to_le_bytes());
    range.extend_from_slice(&flags.to_le_bytes());
    range
}

/// What create says to an option.
pub fn options_error(control: u64, key: &str, value: Value) -> String {
    let host = FakeHost::new(1 << 20);
    let disk = host
        .block(&disk::ROOT, "test-disk", &[("control", control.into())])
        .unwrap();
    let options = [("block_dev", Value::from(&disk)), (key, value)];
    let made = host.device(&VMM_PLUGIN, "pci-virtio-block", &options);
    made.err().expect("create refuses the option").to_string()
}

//! A disk whose behaviour the test controls, and an NVMe controller on it; `driver` is the guest's side.

#![allow(dead_code)] // each test file uses its part
#![allow(unused_imports)]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

// The same test backend as for virtio-block.
#[path = "../../../virtio-block/tests/support/disk.rs"]
mod disk;
mod driver;

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_plugin_api::testing::{FakeDevice, FakeHost, Value};
use vmm_plugin_nvme::VMM_PLUGIN;

pub use disk::{Control, Shape};
pub use driver::*;

pub const WAIT: Duration = Duration::from_secs(20);

/// An NVMe controller on a test backend.
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
        let host = FakeHost::new(64 << 20);
        let (control, id) = Control::new(shape);
        let disk = host
            .block(&disk::ROOT, "test-disk", &[("control", id.into())])
            .unwrap();
        let mut all = vec![("block_dev", Value::from(&disk))];
        all.extend_from_slice(options);
        let device = host.device(&VMM_PLUGIN, "pci-nvme", &all).unwrap();
        Self {
            host,
            device,
            control,
        }
    }

    /// A controller that has another backend than the test's own.
    pub fn on(host: FakeHost, device: FakeDevice) -> Self {
        let (control, _) = Control::new(Shape::default());
        Self {
            host,
            device,
            control,
        }
    }

    /// A driver that has enabled the controller.
    pub fn driver(&self) -> Driver<'_> {
        let mut driver = Driver::new(&self.host, &self.device);
        driver.enable();
        driver
    }

    /// The same with one pair of I/O queues of 64 entries, vector 1.
    pub fn disk(&self) -> (Driver<'_>, Pair) {
        let mut driver = self.driver();
        let pair = driver.pair(1, 64, 1);
        (driver, pair)
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        // A test that fails while the disk is held would wait for it for ever.
        self.control.hold(false);
    }
}

/// A disk that completes requests on a thread of its own.
pub fn threaded() -> Shape {
    Shape {
        threaded: true,
        ..Shape::default()
    }
}

pub fn eventually(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + WAIT;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Bytes that tell where they belong.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| ((seed + 1) * 31 + i * 7 + (i >> 9)) as u8)
        .collect()
}

/// A small generator: the test's sequence is the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// What create says to an option.
pub fn options_error(key: &str, value: Value) -> String {
    let host = FakeHost::new(1 << 20);
    let (_, id) = Control::new(Shape::default());
    let disk = host
        .block(&disk::ROOT, "test-disk", &[("control", id.into())])
        .unwrap();
    let options = [("block_dev", Value::from(&disk)), (key, value)];
    let made = host.device(&VMM_PLUGIN, "pci-nvme", &options);
    made.err().expect("create refuses the option").to_string()
}

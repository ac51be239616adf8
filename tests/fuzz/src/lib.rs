//! Disks driven by arbitrary bytes: each byte string is a guest that does what it likes with rings, registers, commands and memory.
//! Whatever it did, the device must have no fault, be brought back by a reset, and serve the next driver.
//!
//! The fuzzers in `fuzz/` make up the bytes; `tests/replay.rs` runs those that have been kept.

pub mod input;
pub mod nvme;
pub mod virtio_block;

// The same test backend as for the devices' own tests.
#[path = "../../../plugins/virtio-block/tests/support/disk.rs"]
#[allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used)]
mod disk;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vmm_plugin_api::abi::Root;
use vmm_plugin_api::testing::{FakeDevice, FakeHost, Value};
use vmm_plugin_api::{BlockOp, Result};

use disk::{Control, Shape};
use input::Input;

/// How long a device may take for what it must do.
const WAIT: Duration = Duration::from_secs(20);

/// A device with the disk below it, for one input after the other: what one leaves, the next has to cope with.
struct Subject {
    host: FakeHost,
    device: FakeDevice,
    control: Arc<Control>,
}

impl Subject {
    /// With a disk that completes requests on a thread of its own, or in submit.
    fn new(root: &'static Root, driver: &str, threaded: bool) -> Result<Self> {
        let mut shape = Shape {
            threaded,
            ..Shape::default()
        };
        // One that wants its buffers aligned, and takes discards in small pieces.
        shape.info.alignment = if threaded { 512 } else { 1 };
        shape.info.max_discard = if threaded { 4096 } else { 1 << 20 };
        let host = FakeHost::new(32 << 20);
        let (control, id) = Control::new(shape);
        let disk = host.block(&disk::ROOT, "test-disk", &[("control", id.into())])?;
        let device = host.device(root, driver, &[("block_dev", Value::from(&disk))])?;
        device.start()?;
        Ok(Self {
            host,
            device,
            control,
        })
    }

    /// Both kinds.
    fn pair(root: &'static Root, driver: &str) -> Result<[Self; 2]> {
        Ok([
            Self::new(root, driver, false)?,
            Self::new(root, driver, true)?,
        ])
    }

    /// A byte of the disk fails, or it takes few requests at once.
    fn hinder(&self, input: &mut Input<'_>) {
        let bad = match input.below(3) {
            0 => u64::MAX,
            _ => u64::from(input.half()) * 64,
        };
        self.control.bad.store(bad, Ordering::Relaxed);
        let room = match input.below(3) {
            0 => usize::MAX,
            n => n as usize,
        };
        self.control.room.store(room, Ordering::Relaxed);
    }

    fn unhinder(&self) {
        self.control.bad.store(u64::MAX, Ordering::Relaxed);
        self.control.room.store(usize::MAX, Ordering::Relaxed);
    }

    /// The VM is paused, perhaps reset, and goes on.
    fn pause(&self, reset: bool) -> Result<()> {
        self.device.pause()?;
        if reset {
            self.device.reset()?;
        }
        self.device.resume()
    }

    /// What must hold after every input.
    fn verify(&self) {
        let faults = self.host.faults();
        assert!(faults.is_empty(), "{faults:?}");
        let mut log = self
            .control
            .log
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        for (op, offset, len, _) in log.drain(..) {
            let inside = offset.checked_add(len).is_some_and(|end| end <= BYTES);
            assert!(inside, "{op:?} at {offset} of {len} bytes leaves the disk");
            let whole = offset.is_multiple_of(512) && len.is_multiple_of(512);
            assert!(
                whole || op == BlockOp::Flush,
                "{op:?} at {offset} of {len} bytes"
            );
        }
    }
}

/// Bytes of the disk.
const BYTES: u64 = 4 << 20;

/// Bytes that tell where they belong.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| ((seed + 1) * 31 + i * 7 + (i >> 9)) as u8)
        .collect()
}

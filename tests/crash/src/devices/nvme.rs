//! An NVMe controller, with the driver of its own tests.

use std::time::Duration;

use anyhow::ensure;
use vmm_plugin_api::Result;
use vmm_plugin_api::testing::{Backend, FakeHost, load};

use super::Guest;
use driver::{Cmd, Driver, FLUSH, OK, Pair, WRITE};

/// It ends the process when the controller does not do what it must.
#[path = "../../../../plugins/nvme/tests/support/driver.rs"]
#[allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used)]
mod driver;

/// How long an answer may take, for the driver.
const WAIT: Duration = super::PATIENCE;

/// In dword 12 of a write: answered when it is durable (NVMe 1.4, figure 415).
const FUA: u32 = 1 << 30;
/// Bytes of a write: what two PRP entries reach.
const ROOM: u64 = 8192;
/// Writes at once.
const DEPTH: u64 = 32;

struct Nvme<'a> {
    driver: Driver<'a>,
    queue: Pair,
    fua: bool,
    /// The controller has a volatile write cache.
    cached: bool,
    /// Guest memory for data.
    room: u64,
}

/// See [`super::Run`]. With `fua` every write is durable by itself.
pub fn run(
    host: &FakeHost,
    disk: &Backend,
    body: &mut dyn FnMut(&mut dyn Guest) -> Result<()>,
    fua: bool,
) -> Result<()> {
    let options = [("block_dev", disk.into())];
    let device = host.device(load("vmm-plugin-nvme")?, "pci-nvme", &options)?;
    device.start()?;
    let mut driver = Driver::new(host, &device);
    driver.enable();
    let controller = driver.identify(1, 0);
    let queue = driver.pair(1, 64, 1);
    let room = driver.allocate(DEPTH * ROOM, 4096);
    body(&mut Nvme {
        driver,
        queue,
        fua,
        // VWC (figure 251).
        cached: controller.is_ok_and(|bytes| bytes[525] & 1 != 0),
        room,
    })
}

impl Guest for Nvme<'_> {
    fn write(&mut self, writes: &[(u64, Vec<u8>)]) -> Result<()> {
        ensure!(writes.len() as u64 <= DEPTH, "too many writes at once");
        for (at, (sector, bytes)) in (self.room..).step_by(ROOM as usize).zip(writes) {
            ensure!(bytes.len() as u64 <= ROOM, "too large a write");
            self.driver.memory.write(at, bytes)?;
            let mut cmd = Cmd::rw(WRITE, *sector, (bytes.len() / 512) as u32);
            cmd.0[12] |= if self.fua { FUA } else { 0 };
            self.driver.add(&mut self.queue, cmd.prp(at, at + 4096));
        }
        self.driver.ring(&mut self.queue);
        for _ in writes {
            let cqe = self.driver.wait(&mut self.queue);
            ensure!(cqe.status == OK, "a write: {cqe:?}");
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if self.cached && !self.fua {
            let cqe = self.driver.run(&mut self.queue, Cmd::new(FLUSH).nsid(1));
            ensure!(cqe.status == OK, "a flush: {cqe:?}");
        }
        Ok(())
    }
}

//! The devices that are tried, each with the driver that the test plays.

mod nvme;

use std::time::Duration;

use anyhow::{Context, ensure};
use vmm_plugin_api::Result;
use vmm_plugin_api::testing::{
    Backend, Buffer, DriverQueue, FakeDevice, FakeHost, VirtioDriver, load,
};

/// A guest's way to a disk.
pub trait Guest {
    /// Writes all of these at once: sector and bytes of each. Returns when the device has answered.
    ///
    /// # Errors
    /// The device has failed, or does not answer.
    fn write(&mut self, writes: &[(u64, Vec<u8>)]) -> Result<()>;

    /// Makes what was written durable. A device without a volatile cache, as it tells the guest, has done so already.
    ///
    /// # Errors
    /// As [`Guest::write`].
    fn flush(&mut self) -> Result<()>;
}

/// Runs a guest with a device on a backend for as long as that runs.
pub type Run = fn(&FakeHost, &Backend, &mut dyn FnMut(&mut dyn Guest) -> Result<()>) -> Result<()>;

/// Name, and how it is driven.
pub const DEVICES: &[(&str, Run)] = &[
    ("virtio-block", |host, disk, body| {
        virtio(host, disk, body, u64::MAX)
    }),
    // A driver that does not flush gets every write durable.
    ("virtio-block-write-through", |host, disk, body| {
        virtio(host, disk, body, !F_FLUSH)
    }),
    ("nvme", |host, disk, body| {
        nvme::run(host, disk, body, false)
    }),
    // Every write with FUA, and no flush.
    ("nvme-fua", |host, disk, body| {
        nvme::run(host, disk, body, true)
    }),
];

/// Most bytes that a guest writes at once.
const ROOM: u64 = 1 << 20;
/// How long an answer may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// `VIRTIO_BLK_F_FLUSH` (virtio 1.2, 5.2.3).
const F_FLUSH: u64 = 1 << 9;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;

struct VirtioBlock<'a> {
    device: &'a FakeDevice,
    driver: VirtioDriver<'a>,
    queue: DriverQueue,
    flushes: bool,
    /// Guest memory for headers, status bytes and data.
    room: u64,
}

fn virtio(
    host: &FakeHost,
    disk: &Backend,
    body: &mut dyn FnMut(&mut dyn Guest) -> Result<()>,
    features: u64,
) -> Result<()> {
    let options = [("block_dev", disk.into()), ("queues", 1u64.into())];
    let device = host.device(
        load("vmm-plugin-virtio-block")?,
        "pci-virtio-block",
        &options,
    )?;
    device.start()?;
    let mut driver = VirtioDriver::modern(host, &device)?;
    let agreed = driver.negotiate(features)?;
    let queue = driver.queue(0, 64, 0)?;
    driver.ready()?;
    let room = driver.allocate(ROOM + 64 * 32, 4096);
    body(&mut VirtioBlock {
        device: &device,
        driver,
        queue,
        flushes: agreed & F_FLUSH != 0,
        room,
    })
}

impl VirtioBlock<'_> {
    fn requests(&mut self, kind: u32, requests: &[(u64, Vec<u8>)]) -> Result<()> {
        let memory = self.driver.memory();
        let (mut data, mut header) = (self.room + 64 * 32, self.room);
        for (sector, bytes) in requests {
            let mut head = [0; 16];
            head[..4].copy_from_slice(&kind.to_le_bytes());
            head[8..].copy_from_slice(&sector.to_le_bytes());
            memory.write(header, &head)?;
            memory.write(header + 16, &[0xee])?;
            memory.write(data, bytes)?;
            let len = u32::try_from(bytes.len())?;
            let all = [
                Buffer::readable(header, 16),
                Buffer::readable(data, len),
                Buffer::writable(header + 16, 1),
            ];
            if len > 0 {
                self.queue.add(&all);
            } else {
                self.queue.add(&[all[0], all[2]]);
            }
            data += u64::from(len);
            header += 32;
        }
        self.queue.kick(self.device);
        for _ in requests {
            self.queue
                .wait(PATIENCE)
                .context("no answer of the device")?;
        }
        for i in 0..requests.len() as u64 {
            let mut status = [0];
            memory.read(self.room + i * 32 + 16, &mut status)?;
            ensure!(
                status == [0],
                "request {i} of kind {kind} has status {}",
                status[0]
            );
        }
        Ok(())
    }
}

impl Guest for VirtioBlock<'_> {
    fn write(&mut self, writes: &[(u64, Vec<u8>)]) -> Result<()> {
        self.requests(T_OUT, writes)
    }

    fn flush(&mut self) -> Result<()> {
        if self.flushes {
            self.requests(T_FLUSH, &[(0, Vec::new())])?;
        }
        Ok(())
    }
}

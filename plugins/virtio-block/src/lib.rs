//! virtio block device (virtio 1.2 section 5.2) on any block backend.

mod config;
mod request;
mod worker;

use anyhow::{Context, ensure};
use vmm_plugin_api::abi::block::BLOCK_VOLATILE_CACHE;
use vmm_plugin_api::{BlockDevice, BlockInfo, DiskSize, Host, Options, Result};
use vmm_virtio::{Pci, VirtioDevice};

use worker::{BlockWorker, Counters};

/// Bytes of the serial number (section 5.2.6, `VIRTIO_BLK_T_GET_ID`).
const SERIAL_BYTES: usize = 20;

/// The device proper.
struct Block {
    backend: BlockDevice,
    info: BlockInfo,
    /// How large the disk is by now.
    size: DiskSize,
    serial: [u8; SERIAL_BYTES],
    queues: u16,
    queue_size: u16,
    modern_only: bool,
    counters: Counters,
}

/// The serial number: as given, or as much of the backend's name as fits.
fn serial(given: Option<&str>, backend: &str) -> Result<[u8; SERIAL_BYTES]> {
    if let Some(text) = given {
        ensure!(
            text.len() <= SERIAL_BYTES,
            "serial = {text:?} has {} bytes; a virtio serial number has at most {SERIAL_BYTES}",
            text.len()
        );
    }
    let mut serial = [0; SERIAL_BYTES];
    for (to, from) in serial.iter_mut().zip(given.unwrap_or(backend).bytes()) {
        *to = from;
    }
    Ok(serial)
}

impl VirtioDevice for Block {
    const TYPE: u16 = 2;
    const TRANSITIONAL_ID: u16 = 0x1001;
    const CLASS: u32 = 0x01_00_00;
    const NAME: &'static str = "virtio-blk";
    const FOLLOWS_RESIZE: bool = true;
    type Worker = BlockWorker;

    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let backend = options.block("block_dev")?;
        let info = backend.info()?;
        let queues = options.maybe_u64("queues")?.unwrap_or(1);
        let queues = u16::try_from(queues).ok().filter(|n| (1..=16).contains(n));
        let queues = queues.context("queues has to be 1 to 16")?;
        let queue_size = options.maybe_u64("queue_size")?.unwrap_or(256);
        let queue_size = u16::try_from(queue_size)
            .ok()
            .filter(|n| n.is_power_of_two() && (4..=1024).contains(n))
            .with_context(|| {
                format!("queue_size = {queue_size} is not a power of two from 4 to 1024")
            })?;
        Ok(Self {
            serial: serial(options.maybe_str("serial")?, backend.name())?,
            modern_only: options.bool("modern_only")?,
            counters: Counters::new(host),
            size: DiskSize::new(backend.bytes(info.bytes)),
            backend,
            info,
            queues,
            queue_size,
        })
    }

    fn modern_only(&self) -> bool {
        self.modern_only
    }

    fn features(&self) -> u64 {
        config::features(&self.info, self.queues)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; self.queues.into()]
    }

    fn config(&self) -> Vec<u8> {
        let info = BlockInfo {
            bytes: self.size.bytes(),
            ..self.info
        };
        config::space(&info, self.queues, self.queue_size)
    }

    fn resized(&self) {
        // The queues first: a driver that reads the new capacity may use it at once.
        self.size.grow(self.backend.bytes(self.info.bytes));
    }

    fn worker(&self, index: u16) -> Result<BlockWorker> {
        let queue = self.backend.open_queue(self.queue_size.into());
        let queue =
            queue.with_context(|| format!("can't open a backend queue for queue {index}"))?;
        BlockWorker::new(
            queue,
            self.info,
            self.size.clone(),
            self.serial,
            self.queue_size,
            self.counters,
        )
    }
}

/// Whether completed writes may be lost until a flush.
fn volatile_cache(info: &BlockInfo) -> bool {
    info.features & BLOCK_VOLATILE_CACHE != 0
}

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: { "pci-virtio-block" => Pci<Block> },
    blocks: {},
    chars: {},
}

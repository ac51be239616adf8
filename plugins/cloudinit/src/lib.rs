//! `type = "cloudinit"`: a disk from which cloud-init in the guest takes its data, by its datasource NoCloud.
//!
//! What the VM file's `[cloudinit]` gives is read once, when the disk is created, and laid out as a FAT volume in memory. From
//! then on a request is one copy out of that memory, complete when submit returns; queues share the volume and no lock.

mod seed;
mod volume;

use std::sync::Arc;

use anyhow::ensure;
use vmm_plugin_api::abi::block::BLOCK_READ_ONLY;
use vmm_plugin_api::{
    BlockBackend, BlockInfo, BlockOp, BlockRequest, Host, Immediate, ImmediateQueue, Options,
    Result,
};

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: {},
    blocks: { "cloudinit" => SeedDisk },
    chars: {},
}

/// A disk with cloud-init's data.
pub struct SeedDisk {
    volume: Arc<Volume>,
    info: BlockInfo,
}

/// The bytes of the disk.
pub struct Volume(Vec<u8>);

impl BlockBackend for SeedDisk {
    type Queue = ImmediateQueue<Volume>;

    fn create(options: &Options<'_>, _host: &Host) -> Result<Self> {
        let block = options.u32("block_size")?;
        ensure!(
            block.is_power_of_two() && (512..=4096).contains(&block),
            "`block_size` is {block}; use 512, 1024, 2048 or 4096"
        );
        if !options.bool("read_only")? {
            log::warn!("`read_only = false` has no effect: the volume can't be written");
        }
        let volume = volume::make(seed::read(options)?, block)?;
        let info = BlockInfo {
            bytes: volume.len() as u64,
            logical: block,
            physical: block,
            features: BLOCK_READ_ONLY,
            max_segments: 1024,
            alignment: 1,
            max_discard: 0,
        };
        Ok(Self {
            volume: Arc::new(Volume(volume)),
            info,
        })
    }

    fn info(&self) -> BlockInfo {
        self.info
    }

    fn open_queue(&self, depth: u32) -> Result<Self::Queue> {
        Ok(ImmediateQueue::new(self.volume.clone(), self.info, depth))
    }
}

impl Immediate for Volume {
    fn perform(&self, op: BlockOp, request: &BlockRequest) -> i32 {
        if op != BlockOp::Read {
            return 0;
        }
        // Offset and lengths have been compared with the volume's.
        let mut rest = self.0.get(request.offset() as usize..).unwrap_or_default();
        for segment in request.segments() {
            let copied = segment.write(0, rest);
            rest = &rest[copied..];
        }
        0
    }
}

//! `type = "cloudinit"`: a disk from which cloud-init in the guest takes its data, by its datasource NoCloud.
//!
//! What the VM file's `[cloudinit]` gives is read once, when the disk is created, and laid out as a FAT volume in memory. From
//! then on a request is one copy out of that memory, complete when submit returns; queues share the volume and no lock.

mod seed;
mod volume;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use anyhow::ensure;
use vmm_plugin_api::abi::block::BLOCK_READ_ONLY;
use vmm_plugin_api::{
    BlockBackend, BlockDone, BlockInfo, BlockOp, BlockQueue, BlockRequest, Host, Options, Result,
};

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: {},
    blocks: { "cloudinit" => SeedDisk },
    chars: {},
}

/// A disk with cloud-init's data.
pub struct SeedDisk {
    volume: Arc<Vec<u8>>,
    info: BlockInfo,
}

impl BlockBackend for SeedDisk {
    type Queue = SeedQueue;

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
            volume: Arc::new(volume),
            info,
        })
    }

    fn info(&self) -> BlockInfo {
        self.info
    }

    fn open_queue(&self, depth: u32) -> Result<SeedQueue> {
        let depth = depth.max(1) as usize;
        Ok(SeedQueue {
            volume: self.volume.clone(),
            info: self.info,
            depth,
            done: VecDeque::with_capacity(depth),
        })
    }
}

/// A queue: holds completions until they are reaped.
pub struct SeedQueue {
    volume: Arc<Vec<u8>>,
    info: BlockInfo,
    depth: usize,
    done: VecDeque<BlockDone>,
}

impl SeedQueue {
    /// Does a request; 0 or `-errno`.
    fn run(&self, request: &BlockRequest) -> i32 {
        let code = request.check(&self.info);
        if code != 0 || request.op() != Some(BlockOp::Read) {
            return code;
        }
        // `check` has compared offset and lengths with the volume's.
        let mut rest = self
            .volume
            .get(request.offset() as usize..)
            .unwrap_or_default();
        for segment in request.segments() {
            let copied = segment.write(0, rest);
            rest = &rest[copied..];
        }
        0
    }
}

impl BlockQueue for SeedQueue {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        let taken = batch.len().min(self.depth - self.done.len());
        for request in &batch[..taken] {
            let done = request.done(self.run(request));
            self.done.push_back(done);
        }
        taken
    }

    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let count = done.len().min(self.done.len());
        for (slot, completion) in done.iter_mut().zip(self.done.drain(..count)) {
            *slot = completion;
        }
        count
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

//! `type = "mem-async"`: a disk in the host's memory.
//!
//! Every request is complete when submit returns: a copy to or from memory is shorter than handing it to another thread.
//! Queues share the memory and no lock. Two requests under way for the same block at once may mix, as on any disk.

mod ram;

use std::sync::Arc;

use anyhow::{Context, ensure};
use vmm_plugin_api::abi::block::{BLOCK_DISCARD, BLOCK_READ_ONLY, BLOCK_WRITE_ZEROES};
use vmm_plugin_api::{
    BlockBackend, BlockInfo, BlockOp, BlockRequest, Host, Immediate, ImmediateQueue, Options,
    Result,
};

pub use ram::Ram;

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: {},
    blocks: { "mem-async" => MemoryDisk },
    chars: {},
}

/// A disk in memory.
pub struct MemoryDisk {
    ram: Arc<Ram>,
    info: BlockInfo,
}

impl BlockBackend for MemoryDisk {
    type Queue = ImmediateQueue<Ram>;

    fn create(options: &Options<'_>, _host: &Host) -> Result<Self> {
        let (size, block) = (options.u64("size")?, options.u32("block_size")?);
        ensure!(
            block.is_power_of_two() && (512..=65536).contains(&block),
            "`block_size` is {block}; use a power of two from 512 to 65536"
        );
        ensure!(
            size > 0 && size.is_multiple_of(block.into()),
            "`size` is {size} bytes; use a multiple of `block_size` ({block}) above 0"
        );
        let machine = ram::machine_bytes();
        ensure!(
            size <= machine,
            "`size` is {} MiB, but this machine has {} MiB of memory",
            size >> 20,
            machine >> 20
        );
        let ram = Ram::new(size)
            .with_context(|| format!("cannot map {} MiB for the disk", size >> 20))?;
        let features = if options.bool("read_only")? {
            BLOCK_READ_ONLY
        } else {
            BLOCK_DISCARD | BLOCK_WRITE_ZEROES
        };
        let info = BlockInfo {
            bytes: size,
            logical: block,
            physical: block.max(4096),
            features,
            max_segments: 1024,
            alignment: 1,
            max_discard: if features & BLOCK_DISCARD == 0 {
                0
            } else {
                !(block - 1)
            },
        };
        Ok(Self {
            ram: Arc::new(ram),
            info,
        })
    }

    fn info(&self) -> BlockInfo {
        self.info
    }

    fn open_queue(&self, depth: u32) -> Result<Self::Queue> {
        Ok(ImmediateQueue::new(self.ram.clone(), self.info, depth))
    }
}

impl Immediate for Ram {
    fn perform(&self, op: BlockOp, request: &BlockRequest) -> i32 {
        let mut at = request.offset();
        match op {
            BlockOp::Read => {
                for segment in request.segments() {
                    self.read(at, segment);
                    at += segment.len() as u64;
                }
            }
            BlockOp::Write { .. } => {
                for segment in request.segments() {
                    self.write(at, segment);
                    at += segment.len() as u64;
                }
            }
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => self.clear(at, request.len()),
            BlockOp::Flush => {}
        }
        0
    }
}

//! `type = "mem-async"`: a disk in the host's memory.
//!
//! Every request is complete when submit returns: a copy to or from memory is shorter than handing it to another thread.
//! Queues share the memory and no lock. Two requests under way for the same block at once may mix, as on any disk.

mod ram;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use anyhow::{Context, ensure};
use vmm_plugin_api::abi::block::{BLOCK_DISCARD, BLOCK_READ_ONLY, BLOCK_WRITE_ZEROES};
use vmm_plugin_api::{
    BlockBackend, BlockDone, BlockInfo, BlockOp, BlockQueue, BlockRequest, Host, Options, Result,
};

use ram::Ram;

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
    type Queue = MemoryQueue;

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

    fn open_queue(&self, depth: u32) -> Result<MemoryQueue> {
        let depth = depth.max(1) as usize;
        Ok(MemoryQueue {
            ram: self.ram.clone(),
            info: self.info,
            depth,
            done: VecDeque::with_capacity(depth),
        })
    }
}

/// A queue: holds completions until they are reaped.
pub struct MemoryQueue {
    ram: Arc<Ram>,
    info: BlockInfo,
    depth: usize,
    done: VecDeque<BlockDone>,
}

impl MemoryQueue {
    fn run(&self, request: &BlockRequest) -> i32 {
        let code = request.check(&self.info);
        if code != 0 {
            return code;
        }
        let mut at = request.offset();
        match request.op() {
            Some(BlockOp::Read) => {
                for segment in request.segments() {
                    self.ram.read(at, segment);
                    at += segment.len() as u64;
                }
            }
            Some(BlockOp::Write { .. }) => {
                for segment in request.segments() {
                    self.ram.write(at, segment);
                    at += segment.len() as u64;
                }
            }
            Some(BlockOp::Discard | BlockOp::WriteZeroes { .. }) => {
                self.ram.clear(at, request.len())
            }
            Some(BlockOp::Flush) | None => {}
        }
        0
    }
}

impl BlockQueue for MemoryQueue {
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

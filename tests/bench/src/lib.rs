//! The cheapest device and the cheapest disk: what is measured with them is the way there. The bench loads this as a
//! plugin, and uses the same register in process for comparison.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_plugin_api::{
    BlockBackend, BlockDone, BlockInfo, BlockQueue, BlockRequest, Description, Device, Host,
    Options, Region, Result,
};

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: { "bench-register" => Register },
    blocks: { "bench-null" => Null },
    chars: {},
}

/// A register that keeps what is written.
#[derive(Default)]
pub struct Register(AtomicU64);

/// What a device model without a plugin boundary would call.
pub trait Direct {
    /// As [`Device::read`].
    fn read(&self, region: u32, offset: u64, width: u32) -> u64;
    /// As [`Device::write`].
    fn write(&self, region: u32, offset: u64, width: u32, value: u64);
}

impl Direct for Register {
    fn read(&self, region: u32, offset: u64, width: u32) -> u64 {
        Device::read(self, region, offset, width)
    }

    fn write(&self, region: u32, offset: u64, width: u32, value: u64) {
        Device::write(self, region, offset, width, value);
    }
}

impl Device for Register {
    fn create(_options: &Options<'_>, _host: &Host) -> Result<Self> {
        Ok(Self::default())
    }

    fn describe(&self) -> Description {
        Description {
            regions: vec![Region::pio(0, 0x540, 4)],
            ..Description::default()
        }
    }

    fn read(&self, _region: u32, offset: u64, _width: u32) -> u64 {
        self.0.load(Ordering::Relaxed) + offset
    }

    fn write(&self, _region: u32, _offset: u64, _width: u32, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    fn reset(&self) -> Result<()> {
        Ok(())
    }
}

/// A disk that does nothing.
pub struct Null;

impl BlockBackend for Null {
    type Queue = NullQueue;

    fn create(_options: &Options<'_>, _host: &Host) -> Result<Self> {
        Ok(Self)
    }

    fn info(&self) -> BlockInfo {
        BlockInfo {
            bytes: 1 << 30,
            logical: 512,
            physical: 512,
            features: 0,
            max_segments: 128,
            alignment: 1,
            max_discard: 0,
        }
    }

    fn open_queue(&self, depth: u32) -> Result<NullQueue> {
        Ok(NullQueue(VecDeque::with_capacity(depth as usize)))
    }
}

/// Its queue.
pub struct NullQueue(VecDeque<BlockDone>);

impl BlockQueue for NullQueue {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        let taken = batch.len().min(self.0.capacity() - self.0.len());
        self.0
            .extend(batch[..taken].iter().map(|request| request.done(0)));
        taken
    }

    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let count = done.len().min(self.0.len());
        for (slot, completion) in done.iter_mut().zip(self.0.drain(..count)) {
            *slot = completion;
        }
        count
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

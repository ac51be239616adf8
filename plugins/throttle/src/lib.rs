//! `type = "throttle"`: another disk, at a limited rate.
//!
//! Each request takes tokens when it arrives and goes when they have come; requests keep their order. Nothing is dropped and
//! nothing spins: a timer wakes the queue's owner.

mod bucket;
mod queue;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use vmm_plugin_api::abi::block::BLOCK_READ_ONLY;
use vmm_plugin_api::{BlockBackend, BlockDevice, BlockInfo, DiskSize, Host, Options, Result};

use bucket::Bucket;
pub use queue::ThrottleQueue;

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: {},
    blocks: { "throttle" => Throttle },
    chars: {},
}

/// Fewest bytes per second that make sense: a page each second.
const LEAST: u64 = 4096;

/// What all queues of a disk share.
pub struct Limits {
    bytes: Option<Bucket>,
    ops: Option<Bucket>,
    /// When the time was [`EPOCH`].
    epoch: Instant,
}

/// The first time in nanoseconds: far enough from 0 for the longest burst to lie before it, so that buckets start full.
const EPOCH: u64 = 1 << 62;

impl Limits {
    fn now(&self) -> u64 {
        let elapsed = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(EPOCH);
        EPOCH + elapsed
    }

    /// The moment of a time, or one decades away.
    fn instant(&self, time: u64) -> Instant {
        let after = Duration::from_nanos(time.saturating_sub(EPOCH));
        self.epoch.checked_add(after).unwrap_or(self.epoch)
    }

    /// Takes what a request of `bytes` costs; returns when it may go.
    fn take(&self, bytes: u64, now: u64) -> u64 {
        let of_bytes = self.bytes.as_ref().map_or(0, |b| b.take(bytes, now));
        let of_ops = self.ops.as_ref().map_or(0, |b| b.take(1, now));
        of_bytes.max(of_ops)
    }
}

/// A disk with limits.
pub struct Throttle {
    lower: BlockDevice,
    info: BlockInfo,
    /// That of the disk below, when it was looked at last.
    size: DiskSize,
    limits: Arc<Limits>,
}

impl BlockBackend for Throttle {
    type Queue = ThrottleQueue;

    const RESIZABLE: bool = true;

    fn create(options: &Options<'_>, _host: &Host) -> Result<Self> {
        let lower = options.block("backing")?;
        let mut info = lower.info()?;
        if options.bool("read_only")? {
            info.features |= BLOCK_READ_ONLY;
        }
        let bytes = bucket(options, "bytes_per_second", "burst_bytes")?;
        let ops = bucket(options, "ops_per_second", "burst_ops")?;
        ensure!(
            bytes.is_some() || ops.is_some(),
            "a throttle without a limit; give `bytes_per_second`, `ops_per_second` or both"
        );
        if let Some(rate) = options.maybe_u64("bytes_per_second")? {
            ensure!(
                rate >= LEAST,
                "`bytes_per_second` is {rate}; a disk needs at least {LEAST}"
            );
        }
        Ok(Self {
            size: DiskSize::new(lower.bytes(info.bytes)),
            lower,
            info,
            limits: Arc::new(Limits {
                bytes,
                ops,
                epoch: Instant::now(),
            }),
        })
    }

    fn info(&self) -> BlockInfo {
        self.info
    }

    fn look_again(&self) -> Result<u64> {
        self.size.grow(self.lower.bytes(self.info.bytes));
        Ok(self.size.bytes())
    }

    fn bytes(&self) -> u64 {
        self.size.bytes()
    }

    fn open_queue(&self, depth: u32) -> Result<ThrottleQueue> {
        let lower = self.lower.open_queue(depth)?;
        let depth = depth.max(1) as usize;
        ThrottleQueue::new(
            self.limits.clone(),
            self.info,
            self.size.clone(),
            lower,
            depth,
        )
    }
}

/// The bucket of a rate, if there is a limit.
fn bucket(options: &Options<'_>, rate: &str, burst: &str) -> Result<Option<Bucket>> {
    let (per_second, at_once) = (options.maybe_u64(rate)?, options.maybe_u64(burst)?);
    let Some(per_second) = per_second else {
        ensure!(
            at_once.is_none(),
            "`{burst}` has no effect without `{rate}`; give both or neither"
        );
        return Ok(None);
    };
    ensure!(at_once != Some(0), "`{burst}` is 0; give at least 1");
    let at_once = at_once.unwrap_or_else(|| (per_second / 10).max(1));
    Ok(Some(Bucket::new(per_second, at_once)))
}

//! `type = "fault"`: another disk, with errors, delays and torn writes where rules ask for them.
//!
//! Rules count requests, over all queues, so that a guest that does the same meets the same.

mod queue;
mod rules;

use std::sync::Arc;

use vmm_plugin_api::abi::block::BLOCK_READ_ONLY;
use vmm_plugin_api::{BlockBackend, BlockDevice, BlockInfo, DiskSize, Host, Options, Result};

pub use queue::FaultQueue;
use rules::Rule;

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: {},
    blocks: { "fault" => Fault },
    chars: {},
}

/// A disk that fails by rules.
pub struct Fault {
    lower: BlockDevice,
    info: BlockInfo,
    /// That of the disk below, when it was looked at last.
    size: DiskSize,
    rules: Arc<Vec<Rule>>,
}

impl BlockBackend for Fault {
    type Queue = FaultQueue;

    const RESIZABLE: bool = true;

    fn create(options: &Options<'_>, _host: &Host) -> Result<Self> {
        let lower = options.block("backing")?;
        let mut info = lower.info()?;
        if options.bool("read_only")? {
            info.features |= BLOCK_READ_ONLY;
        }
        let rules = rules::parse(options.str("rules")?, info.logical)?;
        log::warn!(
            "[block_dev.{}] is behind a fault layer: requests will fail on purpose",
            lower.name()
        );
        Ok(Self {
            size: DiskSize::new(lower.bytes(info.bytes)),
            lower,
            info,
            rules: Arc::new(rules),
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

    fn open_queue(&self, depth: u32) -> Result<FaultQueue> {
        let lower = self.lower.open_queue(depth)?;
        let depth = depth.max(1) as usize;
        FaultQueue::new(
            self.rules.clone(),
            self.info,
            self.size.clone(),
            lower,
            depth,
        )
    }
}

//! `type = "file"`: a disk in a raw image file or on a block device.
//!
//! The work is done by `vmm-block-file`; here it gets its options.

use std::sync::Arc;

use anyhow::ensure;
use vmm_block_file::{FileQueue, Image, Pinned, Settings};
use vmm_plugin_api::{BlockBackend, BlockInfo, Host, Options, Result};

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: {},
    blocks: { "file" => FileDisk },
    chars: {},
}

/// A disk in a file.
pub struct FileDisk {
    image: Arc<Image>,
    workers: u32,
    /// Guest memory, if rings are to register it.
    pinned: Option<Arc<Pinned>>,
}

impl BlockBackend for FileDisk {
    type Queue = FileQueue;

    const RESIZABLE: bool = true;

    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let settings = Settings {
            path: options.str("path")?.into(),
            read_only: options.bool("read_only")?,
            block_size: options.u32("block_size")?,
            size: options.maybe_u64("size")?,
            skip_flush: options.bool("skip_flush")?,
            direct: options.bool("direct")?,
            discard: options.bool("discard")?,
        };
        let pins = options.bool("pin_memory")?;
        ensure!(
            settings.direct || !pins,
            "`pin_memory` is of no use without direct I/O; add `direct = true`, or remove it"
        );
        let pinned = match pins {
            true => Some(Arc::new(Pinned::new(host.memory()?))),
            false => None,
        };
        Ok(Self {
            pinned,
            image: Arc::new(Image::open(&settings)?),
            workers: options.u32("workers")?,
        })
    }

    fn info(&self) -> BlockInfo {
        self.image.info()
    }

    fn look_again(&self) -> Result<u64> {
        self.image.look_again()
    }

    fn bytes(&self) -> u64 {
        self.image.extent().bytes()
    }

    fn open_queue(&self, depth: u32) -> Result<FileQueue> {
        FileQueue::open(
            self.image.clone(),
            depth,
            self.workers,
            self.pinned.as_ref(),
        )
    }
}

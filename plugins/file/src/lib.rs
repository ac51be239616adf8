//! `type = "file"`: a disk in a raw image file or on a block device.
//!
//! A request reaches the file in one of three ways. Where the file lives in memory (tmpfs) nothing ever waits, so submit
//! does the transfer itself. Elsewhere on Linux it goes through io_uring, a whole batch with one system call; only what is in the
//! page cache already, or goes there, is copied at once. Where there is no io_uring, each queue has threads.

mod image;
mod lock;
mod pool;
mod queue;
mod transfer;

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
mod uring;
#[cfg(target_os = "linux")]
use linux as system;

#[cfg(not(target_os = "linux"))]
mod portable;
#[cfg(not(target_os = "linux"))]
use portable as system;

use std::sync::Arc;

use vmm_plugin_api::{BlockBackend, BlockInfo, Host, Options, Result};

use image::{Image, Settings};
pub use queue::FileQueue;

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
}

impl BlockBackend for FileDisk {
    type Queue = FileQueue;

    fn create(options: &Options<'_>, _host: &Host) -> Result<Self> {
        let settings = Settings {
            path: options.str("path")?.into(),
            read_only: options.bool("read_only")?,
            block_size: options.u32("block_size")?,
            skip_flush: options.bool("skip_flush")?,
            direct: options.bool("direct")?,
            discard: options.bool("discard")?,
        };
        Ok(Self {
            image: Arc::new(Image::open(&settings)?),
            workers: options.u32("workers")?,
        })
    }

    fn info(&self) -> BlockInfo {
        self.image.info()
    }

    fn open_queue(&self, depth: u32) -> Result<FileQueue> {
        FileQueue::open(self.image.clone(), depth, self.workers)
    }
}

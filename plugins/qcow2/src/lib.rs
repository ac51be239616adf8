//! `type = "qcow2"`: a disk in a qcow2 image, with its backing files.
//!
//! `header.rs`, `layout.rs` and `open.rs` know the format and refuse what is not safe to use. `image.rs` looks clusters up and reads;
//! `write.rs` and `clear.rs` change tables in memory; `commit.rs` brings them to the file in an order that survives a crash at any
//! point. A request whose clusters are there and whose bytes are in the page cache is done by the queue's own thread, all others
//! by threads of the queue.

mod clear;
mod commit;
mod compressed;
mod damage;
mod disk;
mod file;
mod header;
mod image;
mod layout;
mod open;
mod queue;
mod refcounts;
mod scratch;
mod slices;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trace;
mod write;

use std::sync::Arc;

use vmm_plugin_api::{BlockBackend, BlockInfo, Host, Options, Result};

use disk::Disk;
use header::Format;
use open::Settings;
pub use queue::Qcow2Queue;

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: {},
    blocks: { "qcow2" => Qcow2Disk },
    chars: {},
}

/// A disk in a qcow2 image.
pub struct Qcow2Disk {
    disk: Arc<Disk>,
    workers: u32,
}

impl BlockBackend for Qcow2Disk {
    type Queue = Qcow2Queue;

    fn create(options: &Options<'_>, _host: &Host) -> Result<Self> {
        let settings = Settings {
            path: options.str("path")?.into(),
            read_only: options.bool("read_only")?,
            skip_flush: options.bool("skip_flush")?,
            discard: options.bool("discard")?,
            backing_format: options
                .maybe_str("backing_format")?
                .map(Format::parse)
                .transpose()?,
        };
        Ok(Self {
            disk: Arc::new(Disk::open(&settings, options.u32("block_size")?)?),
            workers: options.u32("workers")?,
        })
    }

    fn info(&self) -> BlockInfo {
        self.disk.info()
    }

    fn open_queue(&self, depth: u32) -> Result<Qcow2Queue> {
        Qcow2Queue::open(self.disk.clone(), depth, self.workers)
    }
}

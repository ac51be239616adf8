//! `type = "overlay"`: a disk that takes its contents from another, which stays as it is, and keeps what is written in a file.
//!
//! A read goes to the base or to the file by the guest's own scatter list; one that needs both is split. A block that was
//! written stands in the file at its own place, so that there is no table to allocate from, nothing is copied up, and
//! neighbours stay neighbours; a map with a bit for each block says which are there. The file's layout is described in
//! `docs/durability.md`.

pub mod blocking;
pub mod commit;
pub mod file;
pub mod identity;
pub mod layout;
pub mod map;
pub mod overlay;
pub mod queue;
pub mod upper;

use std::path::Path;

use anyhow::ensure;
use vmm_block_file::FileQueue;
use vmm_plugin_api::{BlockBackend, BlockInfo, Host, Options, Result};

use file::Use;
use layout::Layout;
use overlay::{Base, Overlay, Writes};
use queue::OverlayQueue;
use upper::FileUpper;

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: {},
    blocks: { "overlay" => FileOverlay },
    chars: {},
}

/// An overlay with a file.
pub struct FileOverlay(Overlay<FileUpper>);

impl BlockBackend for FileOverlay {
    type Queue = OverlayQueue<FileQueue>;

    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let (keep, read_only) = (options.bool("keep")?, options.bool("read_only")?);
        ensure!(
            keep || !read_only,
            "`keep = false` starts with an empty overlay, which `read_only = true` would leave empty; remove one of the two"
        );
        let (usage, writes) = match (keep, read_only) {
            (_, true) => (Use::Read, Writes::Refused),
            (true, false) => (Use::Keep, Writes::Kept),
            (false, false) => (Use::ThrowAway, Writes::Lost),
        };
        let base = Base::new(options.block("backing")?)?;
        let layout = Layout::new(&base.info);
        let image = file::open(
            Path::new(options.str("path")?),
            usage,
            &layout,
            base.identity,
        )?;
        let upper = FileUpper {
            image,
            workers: options.u32("workers")?,
        };
        Ok(Self(Overlay::open(host, base, upper, writes)?))
    }

    fn info(&self) -> BlockInfo {
        self.0.info()
    }

    fn open_queue(&self, depth: u32) -> Result<Self::Queue> {
        self.0.open_queue(depth)
    }
}

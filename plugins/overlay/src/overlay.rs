//! An overlay: a base, a store for what was written, and the map that says which block is where.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use vmm_block_file::{MAX_DISCARD, MAX_SEGMENTS};
use vmm_plugin_api::abi::block::{
    BLOCK_DISCARD, BLOCK_READ_ONLY, BLOCK_VOLATILE_CACHE, BLOCK_WRITE_ZEROES,
};
use vmm_plugin_api::{BlockDevice, BlockInfo, GuestSlice, Host};

use crate::blocking::{BUFFER, Blocking};
use crate::commit::Committer;
use crate::identity;
use crate::layout::Layout;
use crate::map::{Map, PAGE_BYTES};
use crate::queue::OverlayQueue;
use crate::upper::Upper;

/// The disk below, checked.
pub struct Base {
    /// The backend.
    pub device: BlockDevice,
    /// What it is.
    pub info: BlockInfo,
    /// What the overlay's file remembers of it.
    pub identity: u64,
    /// For the overlay's own requests, of [`BUFFER`] bytes or one block.
    buffer: GuestSlice,
}

impl Base {
    /// Looks at the base.
    ///
    /// # Errors
    /// It can be written to, or is of no use otherwise.
    pub fn new(device: BlockDevice) -> Result<Self> {
        let (info, name) = (device.info()?, device.name());
        ensure!(
            info.features & BLOCK_READ_ONLY != 0,
            "`backing`: [block_dev.{name}] can be written to, which would show through the overlay; set `read_only = true` in [block_dev.{name}]"
        );
        ensure!(
            info.bytes > 0 && info.alignment <= info.logical,
            "`backing`: [block_dev.{name}] has {} bytes and wants buffers aligned to {}, more than a block ({}): it can't be the base of an overlay",
            info.bytes,
            info.alignment,
            info.logical
        );
        let len = BUFFER.max(info.logical as usize);
        let buffer = GuestSlice::leak(len, len.next_power_of_two())
            .context("no memory for the overlay's buffer")?;
        let queue = device.open_queue(1)?;
        let identity = identity::of(queue, &info, buffer)
            .with_context(|| format!("`backing`: [block_dev.{name}] can't be read"))?;
        Ok(Self {
            device,
            info,
            identity,
            buffer,
        })
    }
}

/// What an overlay does with writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// Refuses them.
    Refused,
    /// Takes them, for as long as the overlay lives: flushes do nothing.
    Lost,
    /// Takes them for good.
    Kept,
}

/// What the queues share.
pub struct Shared {
    /// Which blocks the store has.
    pub map: Arc<Map>,
    /// Where they are in it.
    pub layout: Layout,
    /// What the guest's disk is.
    pub info: BlockInfo,
    /// Makes the map durable, if writes are kept.
    pub committer: Option<Committer>,
}

/// An overlay.
pub struct Overlay<U> {
    base: BlockDevice,
    upper: U,
    shared: Arc<Shared>,
}

impl<U: Upper> Overlay<U> {
    /// Opens an overlay over `base` with a store that fits [`Layout::new`] of it.
    ///
    /// # Errors
    /// The store can't be read; out of threads.
    pub fn open(host: &Host, base: Base, upper: U, writes: Writes) -> Result<Self> {
        let layout = Layout::new(&base.info);
        let map = Arc::new(Map::new(layout.blocks()));
        let mut queue = Blocking::new(upper.open_queue(1)?, base.buffer);
        if writes != Writes::Lost {
            load(&map, &layout, &mut queue).context("cannot read the overlay's map")?;
        }
        let writable = writes != Writes::Refused;
        let mut features = 0;
        for (bit, on) in [
            (BLOCK_READ_ONLY, !writable),
            (BLOCK_WRITE_ZEROES, writable),
            (BLOCK_DISCARD, writable && upper.frees()),
            (BLOCK_VOLATILE_CACHE, writes == Writes::Kept),
        ] {
            features |= if on { bit } else { 0 };
        }
        let info = BlockInfo {
            features,
            max_segments: base.info.max_segments.min(MAX_SEGMENTS),
            max_discard: if writable { MAX_DISCARD } else { 0 },
            ..base.info
        };
        let committer = if writes == Writes::Kept {
            Some(Committer::new(host, map.clone(), layout, queue)?)
        } else {
            None
        };
        Ok(Self {
            base: base.device,
            upper,
            shared: Arc::new(Shared {
                map,
                layout,
                info,
                committer,
            }),
        })
    }

    /// Size, units, features.
    pub fn info(&self) -> BlockInfo {
        self.shared.info
    }

    /// Opens a queue.
    ///
    /// # Errors
    /// Out of resources, here or below.
    pub fn open_queue(&self, depth: u32) -> Result<OverlayQueue<U::Queue>> {
        let depth = depth.max(1);
        let base = self.base.open_queue(depth)?;
        OverlayQueue::new(
            self.shared.clone(),
            base,
            self.upper.open_queue(depth)?,
            depth as usize,
        )
    }
}

fn load<Q: vmm_plugin_api::Lower>(
    map: &Map,
    layout: &Layout,
    queue: &mut Blocking<Q>,
) -> Result<()> {
    let mut piece = vec![0; BUFFER];
    let pages = piece.len() / PAGE_BYTES;
    for first in (0..map.pages()).step_by(pages) {
        let count = pages.min(map.pages() - first);
        let piece = &mut piece[..count * PAGE_BYTES];
        queue.read(layout.map + (first * PAGE_BYTES) as u64, piece)?;
        for (page, bytes) in (first..).zip(piece.chunks_exact(PAGE_BYTES)) {
            map.load(page, bytes);
        }
    }
    Ok(())
}

//! Where an overlay keeps what was written: any store with queues, in practice its file.

use std::sync::Arc;

use vmm_block_file::{FileQueue, Image};
use vmm_plugin_api::abi::block::BLOCK_DISCARD;
use vmm_plugin_api::{Lower, Result};

/// A store of [`crate::layout::Layout::file_bytes`] bytes that reads as zeroes at first.
pub trait Upper: Clone + Send + Sync + 'static {
    /// Its queues.
    type Queue: Lower + 'static;

    /// Opens a queue for at most `depth` requests in flight.
    ///
    /// # Errors
    /// Out of resources.
    fn open_queue(&self, depth: u32) -> Result<Self::Queue>;

    /// Whether zeroed ranges are given back to whoever lends the space.
    fn frees(&self) -> bool;
}

/// A file.
#[derive(Clone)]
pub struct FileUpper {
    /// The file, open and locked.
    pub image: Arc<Image>,
    /// Threads that may wait for it, for each queue.
    pub workers: u32,
}

impl Upper for FileUpper {
    type Queue = FileQueue;

    fn open_queue(&self, depth: u32) -> Result<FileQueue> {
        FileQueue::open(self.image.clone(), depth, self.workers, None)
    }

    fn frees(&self) -> bool {
        self.image.info().features & BLOCK_DISCARD != 0
    }
}

//! The size of a disk that may grow while it is used.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a disk, shared by whoever serves it: clones are the same number. It only ever gets larger.
#[derive(Clone, Debug)]
pub struct DiskSize(Arc<AtomicU64>);

impl DiskSize {
    /// Of a disk that is `bytes` large at first.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes)))
    }

    /// The present size. Any thread; one load of a cache line that hardly ever changes.
    #[inline]
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// The disk is `bytes` large now; true if that is more than before. A smaller size changes nothing.
    pub fn grow(&self, bytes: u64) -> bool {
        self.0.fetch_max(bytes, Ordering::AcqRel) < bytes
    }
}

//! The queue of a backend that never waits.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::{BlockDone, BlockInfo, BlockOp, BlockQueue, BlockRequest};

/// A disk of which every request is done by the thread that asks, at once: one in memory, or one that is computed.
///
/// ```
/// use std::sync::Arc;
/// use vmm_plugin_api::{
///     BlockBackend, BlockInfo, BlockOp, BlockRequest, Host, Immediate, ImmediateQueue, Options, Result,
/// };
///
/// struct Ones;
///
/// impl Immediate for Ones {
///     fn perform(&self, _op: BlockOp, request: &BlockRequest) -> i32 {
///         request.segments().iter().for_each(|segment| segment.fill(1));
///         0
///     }
/// }
///
/// struct Disk(BlockInfo);
///
/// impl BlockBackend for Disk {
///     type Queue = ImmediateQueue<Ones>;
///     fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
///         # let _ = (options, host);
///         # let info = BlockInfo { bytes: 512, logical: 512, physical: 512, features: 1, max_segments: 8, alignment: 1, max_discard: 0 };
///         // ...
///         Ok(Self(info))
///     }
///     fn info(&self) -> BlockInfo {
///         self.0
///     }
///     fn open_queue(&self, depth: u32) -> Result<Self::Queue> {
///         Ok(ImmediateQueue::new(Arc::new(Ones), self.0, depth))
///     }
/// }
/// ```
pub trait Immediate: Send + Sync + 'static {
    /// Does a request that has passed [`BlockRequest::check`]: its range lies in the disk and has whole blocks, and a disk that is
    /// read-only is only read. Returns 0 or `-errno`. Allocates nothing and waits for nothing. On any thread, several at once.
    fn perform(&self, op: BlockOp, request: &BlockRequest) -> i32;
}

/// A queue on such a disk: checks and does requests in submit, and holds their completions until they are reaped.
pub struct ImmediateQueue<D> {
    disk: Arc<D>,
    info: BlockInfo,
    depth: usize,
    done: VecDeque<BlockDone>,
}

impl<D: Immediate> ImmediateQueue<D> {
    /// For `depth` requests that have not been reaped; 0 is taken as 1. `info` is the backend's.
    #[must_use]
    pub fn new(disk: Arc<D>, info: BlockInfo, depth: u32) -> Self {
        let depth = depth.max(1) as usize;
        Self {
            disk,
            info,
            depth,
            done: VecDeque::with_capacity(depth),
        }
    }

    fn perform(&self, request: &BlockRequest) -> i32 {
        match (request.check(&self.info), request.op()) {
            (0, Some(op)) => self.disk.perform(op, request),
            (code, _) => code,
        }
    }
}

impl<D: Immediate> BlockQueue for ImmediateQueue<D> {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        let taken = batch.len().min(self.depth - self.done.len());
        for request in &batch[..taken] {
            let done = request.done(self.perform(request));
            self.done.push_back(done);
        }
        taken
    }

    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let count = done.len().min(self.done.len());
        for (slot, completion) in done.iter_mut().zip(self.done.drain(..count)) {
            *slot = completion;
        }
        count
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

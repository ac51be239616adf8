//! A queue that holds requests until their tokens have come, in their order.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use anyhow::{Context, Result};
use vmm_plugin_api::{
    Alarm, BlockDone, BlockInfo, BlockOp, BlockQueue, BlockQueueHandle, BlockRequest, DiskSize,
    JoinedFd, LowerQueue,
};

use crate::Limits;

/// The queue.
pub struct ThrottleQueue {
    limits: Arc<Limits>,
    info: BlockInfo,
    /// What `info.bytes` follows.
    size: DiskSize,
    /// Its batch holds what waits for tokens or for room below.
    lower: LowerQueue<BlockQueueHandle>,
    /// When each request of the batch may go, in its order: these times never go backwards.
    starts: VecDeque<u64>,
    depth: usize,
    alarm: Alarm,
    fd: JoinedFd,
    refused: VecDeque<BlockDone>,
    /// Nothing has been reaped since the last submit.
    submitted: bool,
}

impl ThrottleQueue {
    /// Before a queue of the disk below.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(
        limits: Arc<Limits>,
        info: BlockInfo,
        size: DiskSize,
        lower: BlockQueueHandle,
        depth: usize,
    ) -> Result<Self> {
        let full = "no descriptor left for a disk queue";
        let alarm = Alarm::new().context(full)?;
        let fd = JoinedFd::new(&[lower.fd(), Some(alarm.as_fd())])
            .context(full)?
            .context(full)?;
        Ok(Self {
            limits,
            info,
            size,
            lower: LowerQueue::new(lower, depth),
            starts: VecDeque::with_capacity(depth),
            depth,
            alarm,
            fd,
            refused: VecDeque::with_capacity(depth),
            submitted: false,
        })
    }

    /// Hands on what may go now, and sets the timer for what may not.
    fn release(&mut self) -> usize {
        if self.starts.is_empty() {
            return 0;
        }
        let now = self.limits.now();
        let ready = self
            .starts
            .iter()
            .take_while(|start| **start <= now)
            .count();
        let taken = self.lower.submit(ready);
        self.starts.drain(..taken);
        match self.starts.front() {
            // Due, but there is no room below: a completion makes some.
            Some(start) if *start > now => self.alarm.set(self.limits.instant(*start)),
            _ => {}
        }
        taken
    }

    /// Bytes that count.
    fn bytes(request: &BlockRequest) -> u64 {
        match request.op() {
            Some(BlockOp::Read | BlockOp::Write { .. }) => request.len(),
            _ => 0,
        }
    }
}

impl BlockQueue for ThrottleQueue {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        if self.lower.is_dead() {
            return 0;
        }
        let used = self.starts.len() + self.lower.in_flight() + self.refused.len();
        let taken = batch.len().min(self.depth.saturating_sub(used));
        let now = self.limits.now();
        self.info.bytes = self.size.bytes();
        for request in &batch[..taken] {
            let code = request.check(&self.info);
            let (0, Some(op)) = (code, request.op()) else {
                self.refused.push_back(request.done(code));
                continue;
            };
            let start = self.limits.take(Self::bytes(request), now);
            self.starts.push_back(start);
            let (token, offset) = (request.token(), request.offset());
            if matches!(op, BlockOp::Read | BlockOp::Write { .. }) {
                let list = request.segments();
                self.lower.batch.transfer(token, op, offset, list);
            } else {
                self.lower.batch.control(token, op, offset, request.len());
            }
        }
        self.release();
        self.submitted = true;
        taken
    }

    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let woken = !std::mem::take(&mut self.submitted);
        let mut count = done.len().min(self.refused.len());
        for (slot, completion) in done.iter_mut().zip(self.refused.drain(..count)) {
            *slot = completion;
        }
        self.alarm.quiet();
        loop {
            let more = self.lower.reap(&mut done[count..]);
            count += more;
            // What goes now may be complete at once.
            let released = self.release();
            if count == done.len() || more + released == 0 {
                break;
            }
        }
        if count == 0 && woken && self.lower.quiet() {
            count = self.lower.reap(done);
            self.release();
        }
        count
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        (!self.lower.is_dead()).then(|| self.fd.as_fd())
    }
}

/// What waits goes at once: the device has been told that it was taken.
impl Drop for ThrottleQueue {
    fn drop(&mut self) {
        self.lower.finish(drop);
    }
}

//! A queue that looks at each request by the rules before it hands it on.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmm_plugin_api::{
    Alarm, Batch, BlockDone, BlockInfo, BlockOp, BlockQueue, BlockQueueHandle, BlockRequest,
    DiskSize, GuestSlice, JoinedFd, LowerQueue,
};

use crate::rules::{Action, Rule};

/// A request with what is to become of it. Reused, with the memory of its scatter list.
struct Held {
    due: Instant,
    token: u64,
    op: BlockOp,
    offset: u64,
    len: u64,
    list: Vec<GuestSlice>,
    /// What to answer, whatever comes of it below.
    answer: Option<i32>,
    /// Whether it goes below at all.
    goes: bool,
}

/// The queue.
pub struct FaultQueue {
    rules: Arc<Vec<Rule>>,
    info: BlockInfo,
    /// What `info.bytes` follows.
    size: DiskSize,
    lower: LowerQueue<BlockQueueHandle>,
    /// Requests under way, by their token below, and room for more.
    held: Vec<Held>,
    free: Vec<usize>,
    /// Those that wait for their time.
    delayed: Vec<usize>,
    done: VecDeque<BlockDone>,
    parts: [BlockDone; 64],
    alarm: Alarm,
    fd: JoinedFd,
    /// Nothing has been reaped since the last submit.
    submitted: bool,
}

impl FaultQueue {
    /// Before a queue of the disk below.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(
        rules: Arc<Vec<Rule>>,
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
        let now = Instant::now();
        let held = || Held {
            due: now,
            token: 0,
            op: BlockOp::Flush,
            offset: 0,
            len: 0,
            list: Vec::with_capacity(8),
            answer: None,
            goes: false,
        };
        Ok(Self {
            rules,
            info,
            size,
            lower: LowerQueue::new(lower, depth),
            held: std::iter::repeat_with(held).take(depth).collect(),
            free: (0..depth).rev().collect(),
            delayed: Vec::with_capacity(depth),
            done: VecDeque::with_capacity(depth),
            parts: [BlockDone::default(); 64],
            alarm,
            fd,
            submitted: false,
        })
    }

    fn start(&mut self, request: &BlockRequest) -> bool {
        if self.done.len() + self.held.len() - self.free.len() >= self.held.len() {
            return false;
        }
        let code = request.check(&self.info);
        let (0, Some(op)) = (code, request.op()) else {
            self.done.push_back(request.done(code));
            return true;
        };
        let Some(index) = self.free.pop() else {
            return false;
        };
        let held = &mut self.held[index];
        (held.token, held.op) = (request.token(), op);
        (held.offset, held.len) = (request.offset(), request.len());
        (held.answer, held.goes) = (None, true);
        held.list.clear();
        held.list.extend_from_slice(request.segments());
        let mut delay = Duration::ZERO;
        for rule in self.rules.iter() {
            match rule.apply(op, request.offset(), request.len()) {
                Some(Action::Delay(more)) => delay += more,
                // The first rule that spoils it is the one that counts.
                Some(Action::Error(code)) if held.answer.is_none() => {
                    (held.answer, held.goes) = (Some(-code), false);
                }
                Some(Action::Torn(bytes)) if held.answer.is_none() && bytes < held.len => {
                    (held.answer, held.goes) = (Some(-libc::EIO), bytes > 0);
                    cut(held, bytes);
                }
                _ => {}
            }
        }
        if delay.is_zero() {
            self.go(index);
        } else {
            self.held[index].due = Instant::now() + delay;
            self.delayed.push(index);
        }
        true
    }

    /// Does what is to be done with a request whose time has come.
    fn go(&mut self, index: usize) {
        let (held, token) = (&self.held[index], index as u64);
        let batch: &mut Batch = &mut self.lower.batch;
        if !held.goes {
            self.finish(index, 0);
        } else if matches!(held.op, BlockOp::Read | BlockOp::Write { .. }) {
            batch.transfer(token, held.op, held.offset, &held.list);
        } else {
            batch.control(token, held.op, held.offset, held.len);
        }
    }

    fn finish(&mut self, index: usize, result: i32) {
        let held = &self.held[index];
        self.done.push_back(BlockDone {
            token: held.token,
            result: held.answer.unwrap_or(result),
            reserved: 0,
        });
        self.free.push(index);
    }

    /// Sends those whose time has come, and sets the alarm for the next.
    fn release(&mut self, all: bool) -> usize {
        if !self.delayed.is_empty() {
            let now = Instant::now();
            let mut i = 0;
            while let Some(&index) = self.delayed.get(i) {
                if all || self.held[index].due <= now {
                    // Those that are due together keep their order.
                    self.delayed.remove(i);
                    self.go(index);
                } else {
                    i += 1;
                }
            }
            if let Some(next) = self.delayed.iter().map(|i| self.held[*i].due).min() {
                self.alarm.set(next);
            }
        }
        self.lower.submit(usize::MAX)
    }

    fn collect(&mut self) {
        loop {
            let count = self.lower.reap(&mut self.parts);
            for i in 0..count {
                let BlockDone { token, result, .. } = self.parts[i];
                if (token as usize) < self.held.len() {
                    self.finish(token as usize, result);
                }
            }
            if count + self.release(false) == 0 {
                return;
            }
        }
    }
}

/// Leaves the first `bytes` of a write.
fn cut(held: &mut Held, bytes: u64) {
    held.len = bytes;
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    for segment in &mut held.list {
        *segment = segment.part(0, left);
        left -= segment.len();
    }
    held.list.retain(|segment| !segment.is_empty());
}

impl BlockQueue for FaultQueue {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        if self.lower.is_dead() {
            return 0;
        }
        self.info.bytes = self.size.bytes();
        let taken = batch
            .iter()
            .take_while(|request| self.start(request))
            .count();
        self.release(false);
        self.submitted = true;
        taken
    }

    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let woken = !std::mem::take(&mut self.submitted);
        self.alarm.quiet();
        self.collect();
        if woken && self.done.is_empty() && self.lower.quiet() {
            self.collect();
        }
        let count = done.len().min(self.done.len());
        for (slot, completion) in done.iter_mut().zip(self.done.drain(..count)) {
            *slot = completion;
        }
        count
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        (!self.lower.is_dead()).then(|| self.fd.as_fd())
    }
}

/// What waits is done at once: the device has been told that it was taken.
impl Drop for FaultQueue {
    fn drop(&mut self) {
        self.release(true);
        self.lower.finish(drop);
    }
}

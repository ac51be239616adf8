//! A queue of an overlay: sends each request, or each part of it, to the base or to the store, by the same scatter list.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use anyhow::{Context, Result};
use vmm_plugin_api::{
    Batch, BlockDone, BlockOp, BlockQueue, BlockQueueHandle, BlockRequest, GuestSlice, JoinedFd,
    Lower, LowerQueue,
};

use crate::commit::Mailbox;
use crate::overlay::Shared;

/// A request under way, in parts.
#[derive(Clone, Copy)]
struct Slot {
    token: u64,
    op: BlockOp,
    offset: u64,
    len: u64,
    /// Parts that have not completed.
    left: usize,
    /// The first error of a part.
    error: i32,
}

/// The queue.
pub struct OverlayQueue<Q: Lower> {
    shared: Arc<Shared>,
    base: LowerQueue<BlockQueueHandle>,
    upper: LowerQueue<Q>,
    mailbox: Arc<Mailbox>,
    /// Requests that the committer has.
    committing: usize,
    /// `None` when all is complete after submit.
    fd: Option<JoinedFd>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    done: VecDeque<BlockDone>,
    /// A part of a scatter list.
    part: Vec<GuestSlice>,
    parts: [BlockDone; 64],
    /// Nothing has been reaped since the last submit.
    submitted: bool,
}

impl<Q: Lower> OverlayQueue<Q> {
    /// On a queue of the base and one of the store.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(
        shared: Arc<Shared>,
        base: BlockQueueHandle,
        upper: Q,
        depth: usize,
    ) -> Result<Self> {
        let mailbox = Arc::new(Mailbox::new(depth)?);
        let (base, upper) = (LowerQueue::new(base, depth), LowerQueue::new(upper, depth));
        let commits = shared.committer.is_some().then(|| mailbox.fd());
        let fd = JoinedFd::new(&[base.fd(), upper.fd(), commits])
            .context("no descriptor left for a disk queue")?;
        let idle = Slot {
            token: 0,
            op: BlockOp::Flush,
            offset: 0,
            len: 0,
            left: 0,
            error: 0,
        };
        Ok(Self {
            part: Vec::with_capacity(shared.info.max_segments as usize),
            shared,
            base,
            upper,
            mailbox,
            committing: 0,
            fd,
            slots: vec![idle; depth],
            free: (0..depth).rev().collect(),
            done: VecDeque::with_capacity(depth),
            parts: [BlockDone::default(); 64],
            submitted: false,
        })
    }

    /// Starts a request; false when there is no room.
    fn start(&mut self, request: &BlockRequest) -> bool {
        if self.done.len() + self.slots.len() - self.free.len() >= self.slots.len() {
            return false;
        }
        let code = self.check(request);
        let (0, Some(op)) = (code, request.op()) else {
            self.done.push_back(request.done(code));
            return true;
        };
        let Some(index) = self.free.pop() else {
            return false;
        };
        let (offset, len) = (request.offset(), request.len());
        let mut slot = Slot {
            token: request.token(),
            op,
            offset,
            len,
            left: 1,
            error: 0,
        };
        let (token, there) = (index as u64, self.shared.layout.data + offset);
        let kept = self.shared.committer.is_some();
        let settled = matches!(op, BlockOp::Write { fua: true }) && self.is_settled(offset, len);
        let batch = &mut self.upper.batch;
        match op {
            _ if op != BlockOp::Flush && len == 0 => slot.left = 0,
            BlockOp::Read => slot.left = self.read(token, request),
            BlockOp::Write { fua } => {
                // What is not in the map for sure takes a commit, which flushes; a write that was durable alone is no help.
                let fua = fua && kept && settled;
                batch.transfer(token, BlockOp::Write { fua }, there, request.segments());
            }
            BlockOp::Flush if !kept => slot.left = 0,
            BlockOp::Flush if self.shared.map.is_settled() => batch.control(token, op, 0, 0),
            BlockOp::Flush => {
                slot.left = 0;
                self.slots[index] = slot;
                self.commit(index);
                return true;
            }
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => {
                let unmap = !matches!(op, BlockOp::WriteZeroes { unmap: false });
                batch.control(token, BlockOp::WriteZeroes { unmap }, there, len);
            }
        }
        self.slots[index] = slot;
        if slot.left == 0 {
            self.finish(index, 0);
        }
        true
    }

    /// 0, or what to answer at once.
    fn check(&self, request: &BlockRequest) -> i32 {
        let info = &self.shared.info;
        let code = request.check(info);
        if code != 0 {
            return code;
        }
        match request.op() {
            Some(BlockOp::Discard)
                if info.features & vmm_plugin_api::abi::block::BLOCK_DISCARD == 0 =>
            {
                -libc::ENOTSUP
            }
            Some(BlockOp::Read | BlockOp::Write { .. })
                if request.segments().len() > info.max_segments as usize =>
            {
                -libc::EINVAL
            }
            _ => 0,
        }
    }

    /// Sends a read to where its blocks are; returns in how many parts.
    fn read(&mut self, token: u64, request: &BlockRequest) -> usize {
        let layout = &self.shared.layout;
        let block = u64::from(layout.block);
        let (mut at, mut left) = (request.offset() / block, request.len() / block);
        let (present, run) = self.shared.map.run(at, left);
        if run == left {
            let (batch, offset) = match present {
                true => (&mut self.upper.batch, layout.data + request.offset()),
                false => (&mut self.base.batch, request.offset()),
            };
            batch.transfer(token, BlockOp::Read, offset, request.segments());
            return 1;
        }
        let mut cursor = Cursor {
            list: request.segments(),
            skip: 0,
        };
        let (mut parts, mut next) = (0, (present, run));
        while left > 0 {
            let (present, run) = next;
            cursor.take((run * block) as usize, &mut self.part);
            let offset = at * block;
            if present {
                add(
                    &mut self.upper.batch,
                    token,
                    layout.data + offset,
                    &self.part,
                );
            } else {
                add(&mut self.base.batch, token, offset, &self.part);
            }
            (at, left, parts) = (at + run, left - run, parts + 1);
            next = self.shared.map.run(at, left);
        }
        parts
    }

    /// Whether the map in the file tells of all these blocks.
    fn is_settled(&self, offset: u64, len: u64) -> bool {
        let block = u64::from(self.shared.layout.block);
        let run = self.shared.map.run(offset / block, len / block);
        run == (true, len / block) && self.shared.map.is_settled()
    }

    fn commit(&mut self, index: usize) {
        if let Some(committer) = &self.shared.committer {
            self.committing += 1;
            committer.request(&self.mailbox, index);
        }
    }

    /// A part of a request has completed.
    fn part_done(&mut self, done: BlockDone) {
        let index = done.token as usize;
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        if done.result < 0 && slot.error == 0 {
            slot.error = done.result;
        }
        slot.left = slot.left.saturating_sub(1);
        if slot.left > 0 {
            return;
        }
        let slot = *slot;
        if slot.error == 0 && !matches!(slot.op, BlockOp::Read | BlockOp::Flush) {
            let block = u64::from(self.shared.layout.block);
            let new = self.shared.map.mark(slot.offset / block, slot.len / block);
            let fua = slot.op == BlockOp::Write { fua: true };
            if fua && self.shared.committer.is_some() && (new || !self.shared.map.is_settled()) {
                return self.commit(index);
            }
        }
        self.finish(index, slot.error);
    }

    fn finish(&mut self, index: usize, result: i32) {
        self.free.push(index);
        self.done.push_back(BlockDone {
            token: self.slots[index].token,
            result,
            reserved: 0,
        });
    }

    /// Takes what has completed below; whether there was anything.
    fn collect(&mut self) -> bool {
        let before = self.done.len();
        let mut any = false;
        loop {
            let mut count = self.base.reap(&mut self.parts);
            for i in 0..count {
                self.part_done(self.parts[i]);
            }
            let more = self.upper.reap(&mut self.parts);
            for i in 0..more {
                self.part_done(self.parts[i]);
            }
            count += more;
            // Completions make room for parts that wait.
            let taken = self.base.submit(usize::MAX) + self.upper.submit(usize::MAX);
            any |= count > 0;
            if count + taken == 0 {
                break;
            }
        }
        if self.committing > 0 {
            self.mailbox.drain();
            while let Some((index, result)) = self.mailbox.take() {
                self.committing -= 1;
                self.finish(index, result);
            }
        }
        any || self.done.len() > before
    }
}

fn add(batch: &mut Batch, token: u64, offset: u64, part: &[GuestSlice]) {
    batch.transfer(token, BlockOp::Read, offset, part);
}

/// Walks along a scatter list.
struct Cursor<'a> {
    list: &'a [GuestSlice],
    skip: usize,
}

impl Cursor<'_> {
    /// Stores the next `len` bytes in `part`.
    fn take(&mut self, mut len: usize, part: &mut Vec<GuestSlice>) {
        part.clear();
        while len > 0 {
            let Some(first) = self.list.first() else {
                return;
            };
            let piece = first.part(self.skip, len);
            len -= piece.len();
            self.skip += piece.len();
            if self.skip >= first.len() {
                (self.list, self.skip) = (&self.list[1..], 0);
            }
            if !piece.is_empty() {
                part.push(piece);
            }
        }
    }
}

impl<Q: Lower + 'static> BlockQueue for OverlayQueue<Q> {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        if self.base.is_dead() || self.upper.is_dead() {
            return 0;
        }
        let taken = batch
            .iter()
            .take_while(|request| self.start(request))
            .count();
        self.base.submit(usize::MAX);
        self.upper.submit(usize::MAX);
        self.submitted = true;
        taken
    }

    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let woken = !std::mem::take(&mut self.submitted);
        let found = self.done.len() >= done.len() || self.collect();
        if woken && !found && self.done.is_empty() {
            // What woke the owner came too late to be read with its completion.
            let (base, upper) = (self.base.quiet(), self.upper.quiet());
            self.mailbox.drain();
            if base || upper {
                self.collect();
            }
        }
        let count = done.len().min(self.done.len());
        for (slot, completion) in done.iter_mut().zip(self.done.drain(..count)) {
            *slot = completion;
        }
        count
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        let dead = self.base.is_dead() || self.upper.is_dead();
        self.fd.as_ref().filter(|_| !dead).map(AsFd::as_fd)
    }
}

/// Sees what is under way through.
impl<Q: Lower> Drop for OverlayQueue<Q> {
    fn drop(&mut self) {
        while self.free.len() < self.slots.len() && !self.base.is_dead() && !self.upper.is_dead() {
            if self.collect() {
                continue;
            }
            self.base.quiet();
            self.upper.quiet();
            let Some(fd) = &self.fd else { return };
            let moment = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 10_000_000,
            };
            let wait = rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN);
            // An error is a look without need.
            let _ = rustix::event::poll(&mut [wait], Some(&moment));
        }
    }
}

//! Commands on their way through one backend queue. An engine serves one completion queue at a time and is kept for the next.

use vmm_plugin_api::{
    Batch, BlockDevice, BlockDone, BlockOp, BlockQueueHandle, Bounce, DiskSize, GuestMemory,
    GuestSlice, Piece, Progress, Result,
};

use crate::command::Command;
use crate::counters::{Counters, Tally};
use crate::data::{self, Direction, MAX_DESCRIPTORS, PAGE};
use crate::io::{self, Action, Namespace};
use crate::status::Status;
use crate::trim::{TrimPiece, Trims};

/// Most commands of one completion queue that the backend has at once.
pub(crate) const DEPTH: u16 = 256;

/// A command that the backend has, or that waits in the batch or for a buffer.
#[derive(Clone, Copy)]
struct Slot {
    queue: u16,
    command: Command,
    op: BlockOp,
    len: u64,
    compares: bool,
    then_flush: bool,
}

/// A command that is over.
#[derive(Clone, Copy)]
pub(crate) struct Finished {
    /// Submission queue.
    pub(crate) queue: u16,
    pub(crate) command: Command,
    pub(crate) status: Status,
}

/// What has to be known to start a command.
#[derive(Clone, Copy)]
pub(crate) struct Mode {
    /// The backend has a volatile cache.
    pub(crate) cached: bool,
    /// The guest has disabled it.
    pub(crate) write_through: bool,
}

/// Requests of one thread to the backend.
pub(crate) struct Engine {
    pub(crate) backend: BlockQueueHandle,
    memory: GuestMemory,
    namespace: Namespace,
    /// What the namespace's size follows.
    size: DiskSize,
    batch: Batch,
    done: [BlockDone; 64],
    slots: Vec<Option<Slot>>,
    free: Vec<u16>,
    /// Of the command that is being started.
    segments: Vec<GuestSlice>,
    bounce: Bounce,
    trims: Trims,
    /// Commands that are over and have not been taken; drained by whoever calls.
    pub(crate) finished: Vec<Finished>,
    /// The backend has stopped working; every command fails.
    dead: bool,
    tally: Tally,
    counters: Counters,
}

impl Engine {
    pub(crate) fn new(
        backend: &BlockDevice,
        memory: GuestMemory,
        namespace: Namespace,
        size: DiskSize,
        counters: Counters,
    ) -> Result<Self> {
        let depth = usize::from(DEPTH);
        Ok(Self {
            backend: backend.open_queue(DEPTH.into())?,
            memory,
            namespace,
            size,
            batch: Batch::with_capacity(depth, 4 * depth),
            done: [BlockDone::default(); 64],
            slots: vec![None; depth],
            free: (0..DEPTH).rev().collect(),
            segments: Vec::with_capacity(MAX_DESCRIPTORS),
            bounce: Bounce::new(&namespace.info, MAX_DESCRIPTORS)?,
            trims: Trims::new(namespace.max_trim()),
            // All that were in flight, and those of a fetch that complete at once.
            finished: Vec::with_capacity(2 * depth),
            dead: false,
            tally: Tally::default(),
            counters,
        })
    }

    /// Starts a command of submission queue `queue`; there has to be room. It ends up in `finished` now or later.
    pub(crate) fn start(&mut self, queue: u16, command: Command, mode: Mode) {
        if let Err(status) = self.try_start(queue, command, mode) {
            self.finish(queue, command, status);
        }
    }

    fn try_start(&mut self, queue: u16, command: Command, mode: Mode) -> Result<(), Status> {
        if self.dead {
            return Err(Status::INTERNAL_ERROR);
        }
        // After the command was fetched: its driver may have learned of a new size just before.
        self.namespace.info.bytes = self.size.bytes();
        let action = self
            .namespace
            .parse(&command, mode.cached, mode.write_through)?;
        let mut slot = Slot {
            queue,
            command,
            op: BlockOp::Flush,
            len: 0,
            compares: false,
            then_flush: false,
        };
        match action {
            Action::Transfer {
                op,
                data,
                offset,
                len,
                then_flush,
            } => {
                let direction = match op {
                    BlockOp::Read => Direction::ToGuest,
                    _ => Direction::FromGuest,
                };
                data::map(self.memory, data, len, direction, &mut self.segments)?;
                (slot.op, slot.len, slot.then_flush) = (op, len, then_flush);
                let token = self.claim(slot)?;
                if self.bounce.needed(&self.segments) {
                    let piece = self.bounce.add(token, op, offset, len, &self.segments);
                    self.submit_piece(piece);
                } else {
                    self.batch.transfer(token, op, offset, &self.segments);
                }
            }
            Action::Compare {
                data,
                offset,
                len,
                then_flush,
            } => {
                let direction = Direction::FromGuest;
                data::map(self.memory, data, len, direction, &mut self.segments)?;
                (slot.op, slot.compares, slot.then_flush) = (BlockOp::Read, true, then_flush);
                let token = self.claim(slot)?;
                let piece = self.bounce.compare(token, offset, len, &self.segments);
                self.submit_piece(piece);
            }
            Action::Flush => {
                let token = self.claim(slot)?;
                self.batch.control(token, BlockOp::Flush, 0, 0);
            }
            Action::Zero {
                offset,
                len,
                unmap,
                then_flush,
            } => {
                (slot.op, slot.then_flush) = (BlockOp::WriteZeroes { unmap }, then_flush);
                let token = self.claim(slot)?;
                if len <= self.namespace.max_trim() {
                    self.batch.control(token, slot.op, offset, len);
                } else {
                    let ranges = std::iter::once((offset, len));
                    let piece = self.trims.add(token, slot.op, ranges);
                    self.submit_trim(piece);
                }
            }
            Action::Discard { data, ranges } => {
                let mut list = [(0, 0); 256];
                let list = &mut list[..ranges];
                self.discard_ranges(data, list)?;
                // Section 6.7: whether they are deallocated is the controller's choice, and of nothing there is nothing to do.
                if list.iter().all(|(_, len)| *len == 0) {
                    return Err(Status::SUCCESS);
                }
                slot.op = BlockOp::Discard;
                let token = self.claim(slot)?;
                let piece = self.trims.add(token, slot.op, list.iter().copied());
                self.submit_trim(piece);
            }
            Action::Nothing => return Err(Status::SUCCESS),
        }
        Ok(())
    }

    /// Reads the ranges of a dataset management command; all are checked before anything is discarded.
    fn discard_ranges(
        &mut self,
        data: crate::command::DataPointer,
        list: &mut [(u64, u64)],
    ) -> Result<(), Status> {
        let len = 16 * list.len();
        let mut bytes = [0; PAGE as usize];
        let direction = Direction::FromGuest;
        data::map(self.memory, data, len as u64, direction, &mut self.segments)?;
        let mut at = 0;
        for segment in &self.segments {
            at += segment.read(0, &mut bytes[at..len]);
        }
        for (range, bytes) in list.iter_mut().zip(bytes.as_chunks::<16>().0) {
            *range = self.namespace.discard_range(bytes)?;
        }
        Ok(())
    }

    fn claim(&mut self, slot: Slot) -> Result<u64, Status> {
        // The caller has seen that there is room.
        let index = self.free.pop().ok_or(Status::INTERNAL_ERROR)?;
        self.slots[usize::from(index)] = Some(slot);
        Ok(index.into())
    }

    fn submit_piece(&mut self, piece: Option<Piece>) {
        if let Some(p) = piece {
            self.batch.transfer(p.token, p.op, p.offset, &[p.segment]);
        }
    }

    fn submit_trim(&mut self, piece: Option<TrimPiece>) {
        if let Some(p) = piece {
            self.batch.control(p.token, p.op, p.offset, p.len);
        }
    }

    fn finish(&mut self, queue: u16, command: Command, status: Status) {
        if !status.is_success() {
            self.tally.failed();
        }
        self.finished.push(Finished {
            queue,
            command,
            status,
        });
    }

    /// Hands what has been started to the backend.
    pub(crate) fn submit(&mut self) -> usize {
        if self.batch.is_empty() {
            return 0;
        }
        self.backend.submit(&mut self.batch)
    }

    /// Takes what has completed, and submits what follows from it.
    pub(crate) fn complete(&mut self) {
        while self.in_flight() > 0 {
            let reaped = self.reap();
            let taken = self.submit();
            if self.in_flight() == 0 {
                break;
            }
            let waiting = self.batch.len() + self.bounce.waiting() + self.trims.waiting();
            // A backend without a descriptor completes in submit, so what it still has is lost.
            if self.in_flight() == waiting || self.backend.fd().is_none() {
                if reaped == 0 && taken == 0 {
                    self.give_up();
                }
            } else if taken == 0 {
                break;
            }
        }
        self.tally.add_to(&self.counters);
    }

    fn reap(&mut self) -> usize {
        let mut total = 0;
        loop {
            let n = self.backend.reap(&mut self.done);
            for i in 0..n {
                let BlockDone { token, result, .. } = self.done[i];
                self.completed(token, result);
            }
            total += n;
            if n < self.done.len() {
                return total;
            }
        }
    }

    /// A request is complete; its command may not be. A token that the backend made up is ignored.
    fn completed(&mut self, token: u64, result: i32) {
        let index = usize::try_from(token).unwrap_or(usize::MAX);
        let Some(Some(slot)) = self.slots.get(index) else {
            return;
        };
        let mut status = match result {
            0 => Status::SUCCESS,
            _ => io::failure(slot.op, result),
        };
        let (mut piece, mut trim) = (None, None);
        if self.bounce.owns(token) {
            if result == 0 {
                match self.bounce.advance() {
                    Progress::More(piece) => return self.submit_piece(Some(piece)),
                    Progress::Differs => status = Status::COMPARE_FAILURE,
                    Progress::Done => {}
                }
            }
            piece = self.bounce.finish();
        } else if self.trims.owns(token) {
            if result == 0
                && let Some(piece) = self.trims.piece()
            {
                return self.submit_trim(Some(piece));
            }
            trim = self.trims.next();
        }
        self.submit_piece(piece);
        self.submit_trim(trim);
        let Some(Some(slot)) = self.slots.get_mut(index) else {
            return;
        };
        if status.is_success() && std::mem::take(&mut slot.then_flush) {
            self.batch.control(token, BlockOp::Flush, 0, 0);
            return;
        }
        self.retire(index, status);
    }

    fn retire(&mut self, index: usize, status: Status) {
        let Some(slot) = self.slots.get_mut(index).and_then(Option::take) else {
            return;
        };
        self.free.push(index as u16);
        if slot.op == BlockOp::Read
            && !slot.compares
            && self.memory.tracking()
            && let Ok(data) = slot.command.data()
        {
            data::mark(self.memory, data, slot.len);
        }
        if status.is_success() && slot.compares {
            self.tally.compared();
        } else if status.is_success() {
            self.tally.done(slot.op, slot.len);
        }
        self.finish(slot.queue, slot.command, status);
    }

    /// The backend neither takes nor completes anything: nothing will ever come of its requests.
    fn give_up(&mut self) {
        self.dead = true;
        self.batch = Batch::default();
        self.bounce.clear();
        self.trims.clear();
        for index in 0..self.slots.len() {
            self.retire(index, Status::INTERNAL_ERROR);
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether another command can be started.
    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty() && self.bounce.has_room() && self.trims.has_room()
    }
}

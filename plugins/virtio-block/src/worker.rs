//! The data path of one queue: chains in, one batch to the backend, completions out.

use std::os::fd::BorrowedFd;

use vmm_plugin_api::{
    Batch, BlockDone, BlockInfo, BlockOp, BlockQueueHandle, Bounce, Chain, Counter, DiskSize,
    GuestSlice, Host, Piece, Progress, Queue, QueueError, Result,
};
use vmm_virtio::QueueWorker;

use crate::config::F_FLUSH;
use crate::request::{self, Action, S_IOERR, S_OK};
use crate::{SERIAL_BYTES, volatile_cache};

/// The device's counters, shared by its queues.
#[derive(Clone, Copy)]
pub(crate) struct Counters {
    reads: Counter,
    writes: Counter,
    flushes: Counter,
    discards: Counter,
    read_bytes: Counter,
    write_bytes: Counter,
    errors: Counter,
}

impl Counters {
    pub(crate) fn new(host: &Host) -> Self {
        Self {
            reads: host.counter("reads"),
            writes: host.counter("writes"),
            flushes: host.counter("flushes"),
            discards: host.counter("discards"),
            read_bytes: host.counter("read_bytes"),
            write_bytes: host.counter("write_bytes"),
            errors: host.counter("errors"),
        }
    }
}

/// What has been counted since it was last added to the shared counters: queues share no cache line per request.
#[derive(Default)]
struct Tally {
    reads: u64,
    writes: u64,
    flushes: u64,
    discards: u64,
    read_bytes: u64,
    write_bytes: u64,
    errors: u64,
}

impl Tally {
    fn done(&mut self, op: BlockOp, len: u64) {
        match op {
            BlockOp::Read => {
                (self.reads, self.read_bytes) = (self.reads + 1, self.read_bytes + len)
            }
            BlockOp::Write { .. } => {
                (self.writes, self.write_bytes) = (self.writes + 1, self.write_bytes + len);
            }
            BlockOp::Flush => self.flushes += 1,
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => self.discards += 1,
        }
    }

    fn add_to(&mut self, counters: &Counters) {
        let pairs = [
            (&mut self.reads, counters.reads),
            (&mut self.writes, counters.writes),
            (&mut self.flushes, counters.flushes),
            (&mut self.discards, counters.discards),
            (&mut self.read_bytes, counters.read_bytes),
            (&mut self.write_bytes, counters.write_bytes),
            (&mut self.errors, counters.errors),
        ];
        for (tally, counter) in pairs {
            if *tally != 0 {
                counter.add(std::mem::take(tally));
            }
        }
    }
}

/// A request that the backend has, or that waits in the batch or for the bounce buffer.
#[derive(Clone, Copy)]
struct Slot {
    head: u16,
    status: GuestSlice,
    op: BlockOp,
    len: u64,
}

/// Serves one queue.
pub(crate) struct BlockWorker {
    backend: BlockQueueHandle,
    info: BlockInfo,
    /// What `info.bytes` follows.
    disk_size: DiskSize,
    serial: [u8; SERIAL_BYTES],
    /// The driver does not flush, so every write has to be durable when it completes (section 5.2.6.2).
    write_through: bool,
    chain: Chain,
    batch: Batch,
    done: [BlockDone; 64],
    slots: Vec<Option<Slot>>,
    free: Vec<u16>,
    bounce: Option<Bounce>,
    /// The backend has stopped working; every request fails.
    dead: bool,
    tally: Tally,
    counters: Counters,
}

impl BlockWorker {
    pub(crate) fn new(
        backend: BlockQueueHandle,
        info: BlockInfo,
        disk_size: DiskSize,
        serial: [u8; SERIAL_BYTES],
        queue_size: u16,
        counters: Counters,
    ) -> Result<Self> {
        let size = usize::from(queue_size);
        Ok(Self {
            backend,
            info,
            disk_size,
            serial,
            write_through: false,
            chain: Chain::with_capacity(size),
            batch: Batch::with_capacity(size, 4 * size),
            done: [BlockDone::default(); 64],
            slots: vec![None; size],
            free: (0..queue_size).rev().collect(),
            bounce: Bounce::when_needed(&info, size)?,
            dead: false,
            tally: Tally::default(),
            counters,
        })
    }

    /// Starts the request in `self.chain`, or answers it at once. An error is a request with nowhere to put its status: giving
    /// it back unanswered would let the driver take an old status byte for the answer.
    fn accept(&mut self, queue: &mut Queue) -> Result<(), QueueError> {
        let head = self.chain.head();
        let Some(status) = self.chain.take_last() else {
            self.tally.errors += 1;
            return Err(QueueError::Unanswerable(head));
        };
        let action = if self.dead {
            Action::Status(S_IOERR)
        } else {
            // After the request was taken: its driver may have learned of a new size just before.
            self.info.bytes = self.disk_size.bytes();
            request::parse(&self.info, self.write_through, &mut self.chain)
        };
        match action {
            Action::Transfer { op, offset, len } => self.transfer(head, status, op, offset, len),
            Action::Control { op, offset, len } => {
                if let Some(token) = self.claim(head, status, op, len) {
                    self.batch.control(token, op, offset, len);
                }
            }
            Action::Serial => {
                let mut at = 0;
                for segment in self.chain.writable() {
                    at += segment.write(0, &self.serial[at..]);
                }
                answer(queue, head, status, S_OK, at as u32);
            }
            Action::Status(code) => {
                self.tally.errors += u64::from(code != S_OK);
                answer(queue, head, status, code, 0);
            }
        }
        Ok(())
    }

    fn accept_all(&mut self, queue: &mut Queue) -> Result<(), QueueError> {
        while self.has_room() && queue.pop(&mut self.chain)? {
            self.accept(queue)?;
        }
        Ok(())
    }

    fn claim(&mut self, head: u16, status: GuestSlice, op: BlockOp, len: u64) -> Option<u64> {
        let index = self.free.pop()?;
        self.slots[usize::from(index)] = Some(Slot {
            head,
            status,
            op,
            len,
        });
        Some(index.into())
    }

    fn transfer(&mut self, head: u16, status: GuestSlice, op: BlockOp, offset: u64, len: u64) {
        let Some(token) = self.claim(head, status, op, len) else {
            return;
        };
        let segments = match op {
            BlockOp::Read => self.chain.writable(),
            _ => self.chain.readable(),
        };
        match &mut self.bounce {
            Some(bounce) if bounce.needed(segments) => {
                let piece = bounce.add(token, op, offset, len, segments);
                self.submit_piece(piece);
            }
            _ => self.batch.transfer(token, op, offset, segments),
        }
    }

    fn submit_piece(&mut self, piece: Option<Piece>) {
        if let Some(p) = piece {
            self.batch.transfer(p.token, p.op, p.offset, &[p.segment]);
        }
    }

    fn submit(&mut self) -> usize {
        if self.batch.is_empty() {
            return 0;
        }
        self.backend.submit(&mut self.batch)
    }

    /// Takes what has completed; returns how many that were.
    fn reap(&mut self, mut queue: Option<&mut Queue>) -> usize {
        let mut total = 0;
        loop {
            let n = self.backend.reap(&mut self.done);
            for i in 0..n {
                let BlockDone { token, result, .. } = self.done[i];
                self.completed(token, result, queue.as_deref_mut());
            }
            total += n;
            if n < self.done.len() {
                return total;
            }
        }
    }

    fn completed(&mut self, token: u64, result: i32, queue: Option<&mut Queue>) {
        let mut next = None;
        if let Some(bounce) = self.bounce.as_mut().filter(|b| b.owns(token)) {
            if result == 0
                && let Progress::More(piece) = bounce.advance()
            {
                return self.submit_piece(Some(piece));
            }
            next = bounce.finish();
        }
        self.retire(token, result == 0, queue);
        self.submit_piece(next);
    }

    /// Answers the request in slot `token`; a token that the backend made up is ignored.
    fn retire(&mut self, token: u64, ok: bool, queue: Option<&mut Queue>) {
        let index = usize::try_from(token).unwrap_or(usize::MAX);
        let Some(slot) = self.slots.get_mut(index).and_then(Option::take) else {
            return;
        };
        self.free.push(index as u16);
        if ok {
            self.tally.done(slot.op, slot.len);
        } else {
            self.tally.errors += 1;
        }
        let Some(queue) = queue else { return };
        let (code, written) = match (ok, slot.op) {
            (true, BlockOp::Read) => (S_OK, slot.len as u32),
            (true, _) => (S_OK, 0),
            (false, _) => (S_IOERR, 0),
        };
        answer(queue, slot.head, slot.status, code, written);
    }

    /// The backend neither takes nor completes anything: nothing will ever come of its requests.
    fn give_up(&mut self, mut queue: Option<&mut Queue>) {
        self.dead = true;
        self.batch = Batch::default();
        if let Some(bounce) = &mut self.bounce {
            bounce.clear();
        }
        for token in 0..self.slots.len() as u64 {
            self.retire(token, false, queue.as_deref_mut());
        }
    }
}

/// Gives a chain back with its status behind `written` bytes of data.
fn answer(queue: &mut Queue, head: u16, status: GuestSlice, code: u8, written: u32) {
    status.write(0, &[code]);
    queue.push(head, written.saturating_add(1));
}

impl QueueWorker for BlockWorker {
    fn activate(&mut self, features: u64) {
        self.write_through = volatile_cache(&self.info) && features & F_FLUSH == 0;
    }

    fn take(&mut self, queue: &mut Queue) -> Result<(), QueueError> {
        let result = self.accept_all(queue);
        self.submit();
        result
    }

    fn complete(&mut self, mut queue: Option<&mut Queue>) {
        while self.in_flight() > 0 {
            let reaped = self.reap(queue.as_deref_mut());
            let taken = self.submit();
            if self.in_flight() == 0 {
                break;
            }
            let waiting = self.batch.len() + self.bounce.as_ref().map_or(0, Bounce::waiting);
            // A backend without a descriptor completes in submit, so what it still has is lost.
            if self.in_flight() == waiting || self.backend.fd().is_none() {
                if reaped == 0 && taken == 0 {
                    self.give_up(queue.as_deref_mut());
                }
            } else if taken == 0 {
                break;
            }
        }
        self.tally.add_to(&self.counters);
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn has_room(&self) -> bool {
        !self.free.is_empty() && self.bounce.as_ref().is_none_or(Bounce::has_room)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.backend.fd()
    }

    fn acknowledge(&self) {
        self.backend.drain();
    }
}

//! Requests whose buffers a backend can't use as they are: misaligned ones (`O_DIRECT`), or too many of them; and comparisons
//! of what a disk holds with what the guest has.
//!
//! They go through one buffer, made when the queue is opened, a piece at a time and one request after the other.

use anyhow::Context;

use crate::{BlockInfo, BlockOp, GuestSlice, Result};

/// A multiple of the largest block size that a backend may have.
const BYTES: usize = 256 << 10;

/// What a request does with its buffers.
#[derive(Clone, Copy, Default)]
enum Kind {
    /// The disk's data goes to the buffers.
    #[default]
    Read,
    /// The buffers' data goes to the disk.
    Write(BlockOp),
    /// The disk's data and the buffers' are compared; neither changes.
    Compare,
}

/// A request on its way through the buffer.
#[derive(Default)]
struct Job {
    token: u64,
    kind: Kind,
    offset: u64,
    len: u64,
    done: u64,
    /// The guest's buffers.
    segments: Vec<GuestSlice>,
}

/// The buffer and the requests that use it or wait for it. Belongs to one queue's thread.
pub struct Bounce {
    buffer: GuestSlice,
    /// The first is under way.
    jobs: [Job; 2],
    count: usize,
    alignment: usize,
    unit: usize,
    max_segments: usize,
}

/// What to submit for the present request.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// The request's.
    pub token: u64,
    /// Read or write.
    pub op: BlockOp,
    /// Byte offset on the disk.
    pub offset: u64,
    /// A part of the buffer.
    pub segment: GuestSlice,
}

/// How the present request goes on when a piece of it has been done.
#[derive(Clone, Copy, Debug)]
pub enum Progress {
    /// With this piece.
    More(Piece),
    /// It is complete.
    Done,
    /// It compares, and the disk has other data; the rest has not been looked at.
    Differs,
}

impl Bounce {
    /// The buffer for a backend, or `None` when it takes every scatter list of up to `longest` elements.
    ///
    /// # Errors
    /// No memory.
    pub fn when_needed(info: &BlockInfo, longest: usize) -> Result<Option<Self>> {
        let max_segments = info.max_segments.max(1) as usize;
        if info.alignment <= 1 && max_segments >= longest {
            return Ok(None);
        }
        Self::new(info, longest).map(Some)
    }

    /// The buffer for a backend and scatter lists of up to `longest` elements. It is never freed, and takes memory as far as it is used.
    ///
    /// # Errors
    /// No memory.
    pub fn new(info: &BlockInfo, longest: usize) -> Result<Self> {
        let max_segments = info.max_segments.max(1) as usize;
        let alignment = info.alignment.max(1) as usize;
        let buffer = GuestSlice::leak(BYTES, alignment.max(4096)).with_context(|| {
            format!("can't allocate a buffer of {BYTES} bytes aligned to {alignment}")
        })?;
        let job = || Job {
            segments: Vec::with_capacity(longest),
            ..Job::default()
        };
        Ok(Self {
            buffer,
            jobs: [job(), job()],
            count: 0,
            alignment,
            unit: info.logical.max(1) as usize,
            max_segments,
        })
    }

    /// Whether the backend can't use `segments` as they are.
    #[must_use]
    pub fn needed(&self, segments: &[GuestSlice]) -> bool {
        let fits = |s: &GuestSlice| {
            (s.as_ptr() as usize).is_multiple_of(self.alignment)
                && s.len().is_multiple_of(self.unit)
        };
        segments.len() > self.max_segments || !segments.iter().all(fits)
    }

    /// Whether another request can be added.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.count < self.jobs.len()
    }

    /// Requests that wait for their turn.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.count.saturating_sub(1)
    }

    /// Adds a read or write of `segments`, which are `len` bytes in all; its first piece if it is its turn now. There must be room.
    pub fn add(
        &mut self,
        token: u64,
        op: BlockOp,
        offset: u64,
        len: u64,
        segments: &[GuestSlice],
    ) -> Option<Piece> {
        let kind = match op {
            BlockOp::Read => Kind::Read,
            write => Kind::Write(write),
        };
        self.add_job(token, kind, offset, len, segments)
    }

    /// Adds a comparison of the disk's `len` bytes at `offset` with `segments`, as [`Bounce::add`] does a read.
    pub fn compare(
        &mut self,
        token: u64,
        offset: u64,
        len: u64,
        segments: &[GuestSlice],
    ) -> Option<Piece> {
        self.add_job(token, Kind::Compare, offset, len, segments)
    }

    fn add_job(
        &mut self,
        token: u64,
        kind: Kind,
        offset: u64,
        len: u64,
        segments: &[GuestSlice],
    ) -> Option<Piece> {
        let first = self.count == 0;
        let job = self.jobs.get_mut(self.count)?;
        (job.token, job.kind) = (token, kind);
        (job.offset, job.len, job.done) = (offset, len, 0);
        job.segments.clear();
        job.segments.extend_from_slice(segments);
        self.count += 1;
        first.then(|| self.piece())
    }

    /// Whether the present request is `token`.
    #[must_use]
    pub fn owns(&self, token: u64) -> bool {
        self.count > 0 && self.jobs[0].token == token
    }

    /// The present piece has been done.
    pub fn advance(&mut self) -> Progress {
        let len = self.piece_len();
        let job = &mut self.jobs[0];
        let piece = self.buffer.part(0, len);
        match job.kind {
            Kind::Read => each(&job.segments, job.done, piece, scatter),
            Kind::Compare if !each(&job.segments, job.done, piece, same) => {
                return Progress::Differs;
            }
            _ => true,
        };
        job.done += len as u64;
        if job.done < job.len {
            Progress::More(self.piece())
        } else {
            Progress::Done
        }
    }

    /// The present request is over; the first piece of the one that waited.
    pub fn finish(&mut self) -> Option<Piece> {
        self.jobs.swap(0, 1);
        self.count = self.count.saturating_sub(1);
        (self.count > 0).then(|| self.piece())
    }

    /// Forgets all requests.
    pub fn clear(&mut self) {
        self.count = 0;
    }

    fn piece_len(&self) -> usize {
        let left = self.jobs[0].len - self.jobs[0].done;
        usize::try_from(left).unwrap_or(BYTES).min(BYTES)
    }

    fn piece(&self) -> Piece {
        let job = &self.jobs[0];
        let segment = self.buffer.part(0, self.piece_len());
        let op = match job.kind {
            Kind::Write(op) => {
                each(&job.segments, job.done, segment, gather);
                op
            }
            Kind::Read | Kind::Compare => BlockOp::Read,
        };
        Piece {
            token: job.token,
            op,
            offset: job.offset + job.done,
            segment,
        }
    }
}

/// Bytes that are moved or compared at once.
const STEP: usize = 4096;

/// From `from` to `to`, which are equally long and no longer than [`STEP`].
fn transfer(from: GuestSlice, to: GuestSlice) -> bool {
    let mut block = [0; STEP];
    let block = &mut block[..from.len().min(STEP)];
    from.read(0, block);
    to.write(0, block);
    true
}

fn scatter(guest: GuestSlice, buffer: GuestSlice) -> bool {
    transfer(buffer, guest)
}

fn gather(guest: GuestSlice, buffer: GuestSlice) -> bool {
    transfer(guest, buffer)
}

fn same(guest: GuestSlice, buffer: GuestSlice) -> bool {
    let (mut a, mut b) = ([0; STEP], [0; STEP]);
    guest.read(0, &mut a);
    buffer.read(0, &mut b);
    a == b
}

/// Walks the guest's buffers from byte `skip` on, and `buffer`, in step; false as soon as `f` says so of a part of both.
fn each(
    segments: &[GuestSlice],
    skip: u64,
    buffer: GuestSlice,
    f: impl Fn(GuestSlice, GuestSlice) -> bool,
) -> bool {
    let (mut skip, mut at) = (skip, 0);
    for segment in segments {
        let mut from = skip.min(segment.len() as u64) as usize;
        skip -= from as u64;
        while from < segment.len() && at < buffer.len() {
            let n = STEP.min(segment.len() - from).min(buffer.len() - at);
            if !f(segment.part(from, n), buffer.part(at, n)) {
                return false;
            }
            from += n;
            at += n;
        }
    }
    true
}

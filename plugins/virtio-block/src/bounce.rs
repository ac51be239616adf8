//! Requests whose buffers the backend can't use as they are: misaligned ones (`O_DIRECT`), or too many of them.
//!
//! They go through one buffer, made when the queue is opened, a piece at a time and one request after the other.

use anyhow::Context;
use vmm_plugin_api::{BlockInfo, BlockOp, GuestSlice, Result};

/// A multiple of the largest block size that a backend may have.
const BYTES: usize = 256 << 10;

/// A request on its way through the buffer.
#[derive(Default)]
struct Job {
    token: u64,
    write: Option<BlockOp>,
    offset: u64,
    len: u64,
    done: u64,
    /// The guest's buffers.
    segments: Vec<GuestSlice>,
}

/// The buffer and the requests that use it or wait for it.
pub(crate) struct Bounce {
    buffer: GuestSlice,
    /// The first is under way.
    jobs: [Job; 2],
    count: usize,
    alignment: usize,
    unit: usize,
    max_segments: usize,
}

/// What to submit for the present request: `None` when it is finished.
pub(crate) struct Piece {
    pub(crate) token: u64,
    pub(crate) op: BlockOp,
    pub(crate) offset: u64,
    pub(crate) segment: GuestSlice,
}

impl Bounce {
    /// The buffer for a backend, or `None` when it takes every scatter list that a queue of `queue_size` can give.
    pub(crate) fn new(info: &BlockInfo, queue_size: u16) -> Result<Option<Self>> {
        let max_segments = info.max_segments.max(1) as usize;
        if info.alignment <= 1 && max_segments >= usize::from(queue_size) {
            return Ok(None);
        }
        let alignment = info.alignment.max(1) as usize;
        let buffer = GuestSlice::leak(BYTES, alignment.max(4096)).with_context(|| {
            format!("can't allocate a buffer of {BYTES} bytes aligned to {alignment}")
        })?;
        let job = || Job {
            segments: Vec::with_capacity(queue_size.into()),
            ..Job::default()
        };
        Ok(Some(Self {
            buffer,
            jobs: [job(), job()],
            count: 0,
            alignment,
            unit: info.logical.max(1) as usize,
            max_segments,
        }))
    }

    /// Whether the backend can't use `segments` as they are.
    pub(crate) fn needed(&self, segments: &[GuestSlice]) -> bool {
        let fits = |s: &GuestSlice| {
            (s.as_ptr() as usize).is_multiple_of(self.alignment)
                && s.len().is_multiple_of(self.unit)
        };
        segments.len() > self.max_segments || !segments.iter().all(fits)
    }

    /// Whether another request can be added.
    pub(crate) fn has_room(&self) -> bool {
        self.count < self.jobs.len()
    }

    /// Requests that wait for their turn.
    pub(crate) fn waiting(&self) -> usize {
        self.count.saturating_sub(1)
    }

    /// Adds a request; its first piece if it is its turn now.
    pub(crate) fn add(
        &mut self,
        token: u64,
        op: BlockOp,
        offset: u64,
        len: u64,
        segments: &[GuestSlice],
    ) -> Option<Piece> {
        let first = self.count == 0;
        let job = self.jobs.get_mut(self.count)?;
        job.token = token;
        job.write = (op != BlockOp::Read).then_some(op);
        (job.offset, job.len, job.done) = (offset, len, 0);
        job.segments.clear();
        job.segments.extend_from_slice(segments);
        self.count += 1;
        first.then(|| self.piece())
    }

    /// Whether the present request is `token`.
    pub(crate) fn owns(&self, token: u64) -> bool {
        self.count > 0 && self.jobs[0].token == token
    }

    /// The present piece has been done; the next of the same request, or `None` when that was the last.
    pub(crate) fn advance(&mut self) -> Option<Piece> {
        let len = self.piece_len();
        let job = &mut self.jobs[0];
        if job.write.is_none() {
            copy(&job.segments, job.done, self.buffer.part(0, len), false);
        }
        job.done += len as u64;
        (job.done < job.len).then(|| self.piece())
    }

    /// The present request is over; the first piece of the one that waited.
    pub(crate) fn next(&mut self) -> Option<Piece> {
        self.jobs.swap(0, 1);
        self.count = self.count.saturating_sub(1);
        (self.count > 0).then(|| self.piece())
    }

    /// Forgets all requests.
    pub(crate) fn clear(&mut self) {
        self.count = 0;
    }

    fn piece_len(&self) -> usize {
        let left = self.jobs[0].len - self.jobs[0].done;
        usize::try_from(left).unwrap_or(BYTES).min(BYTES)
    }

    fn piece(&self) -> Piece {
        let job = &self.jobs[0];
        let segment = self.buffer.part(0, self.piece_len());
        if job.write.is_some() {
            copy(&job.segments, job.done, segment, true);
        }
        Piece {
            token: job.token,
            op: job.write.unwrap_or(BlockOp::Read),
            offset: job.offset + job.done,
            segment,
        }
    }
}

/// Copies between the guest's buffers, from byte `skip` on, and `buffer`; into it if `gather`.
fn copy(segments: &[GuestSlice], skip: u64, buffer: GuestSlice, gather: bool) {
    let mut block = [0; 4096];
    let (mut skip, mut at) = (skip, 0);
    for segment in segments {
        let len = segment.len() as u64;
        let mut from = skip.min(len) as usize;
        skip -= from as u64;
        while from < segment.len() && at < buffer.len() {
            let n = block.len().min(segment.len() - from).min(buffer.len() - at);
            let block = &mut block[..n];
            if gather {
                segment.read(from, block);
                buffer.write(at, block);
            } else {
                buffer.read(at, block);
                segment.write(from, block);
            }
            from += n;
            at += n;
        }
    }
}

//! Discards and zeroing that are more than one request to the backend: several ranges, or longer ones than it takes at once.
//!
//! One piece follows the other, and one command the other, so that a command of any size takes one place in the backend's queue.

use vmm_plugin_api::BlockOp;

/// Ranges of one command (section 6.7).
const RANGES: usize = 256;

/// A command on its way.
struct Job {
    token: u64,
    op: BlockOp,
    /// Byte offset and length of each range that is left, the next one last.
    ranges: Vec<(u64, u64)>,
}

/// A request to the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TrimPiece {
    pub(crate) token: u64,
    pub(crate) op: BlockOp,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// Commands under way: the first one has a piece at the backend, the second waits.
pub(crate) struct Trims {
    jobs: [Job; 2],
    count: usize,
    /// Most bytes in a piece.
    max: u64,
}

impl Trims {
    pub(crate) fn new(max: u64) -> Self {
        let job = || Job {
            token: 0,
            op: BlockOp::Discard,
            ranges: Vec::with_capacity(RANGES),
        };
        Self {
            jobs: [job(), job()],
            count: 0,
            max: max.max(1),
        }
    }

    pub(crate) fn has_room(&self) -> bool {
        self.count < self.jobs.len()
    }

    /// Commands that wait for their turn.
    pub(crate) fn waiting(&self) -> usize {
        self.count.saturating_sub(1)
    }

    /// Adds a command with at least one range that is not empty; its first piece if it is its turn now. There must be room.
    pub(crate) fn add(
        &mut self,
        token: u64,
        op: BlockOp,
        ranges: impl DoubleEndedIterator<Item = (u64, u64)>,
    ) -> Option<TrimPiece> {
        let first = self.count == 0;
        let job = self.jobs.get_mut(self.count)?;
        (job.token, job.op) = (token, op);
        job.ranges.clear();
        job.ranges.extend(ranges.filter(|(_, len)| *len > 0).rev());
        self.count += 1;
        if first { self.piece() } else { None }
    }

    /// Whether the present command is `token`.
    pub(crate) fn owns(&self, token: u64) -> bool {
        self.count > 0 && self.jobs[0].token == token
    }

    /// The next piece of the present command; `None` when there is no more.
    pub(crate) fn piece(&mut self) -> Option<TrimPiece> {
        let job = &mut self.jobs[0];
        let (offset, left) = job.ranges.pop()?;
        let len = left.min(self.max);
        if left > len {
            job.ranges.push((offset + len, left - len));
        }
        Some(TrimPiece {
            token: job.token,
            op: job.op,
            offset,
            len,
        })
    }

    /// The present command is over; the first piece of the one that waited.
    pub(crate) fn next(&mut self) -> Option<TrimPiece> {
        self.jobs.swap(0, 1);
        self.count = self.count.saturating_sub(1);
        if self.count > 0 { self.piece() } else { None }
    }

    /// Forgets all commands.
    pub(crate) fn clear(&mut self) {
        self.count = 0;
    }
}

//! What the guest writes to doorbells (sections 3.1.24 and 3.1.25), and their shadow in guest memory (section 5.7).
//!
//! A doorbell that is a register is written by a vCPU thread and read by the thread that serves its queue. With the shadow, the
//! guest writes values to memory, and the register only to wake that thread: then the register is an ioeventfd.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

use vmm_plugin_api::{GuestMemory, GuestSlice, MemoryError};

/// Queue pairs, the admin pair included.
pub(crate) const QUEUES: usize = 64;
/// Offset of the first doorbell in BAR 0; `CAP.DSTRD` is 0.
pub(crate) const FIRST: u64 = 0x1000;
const STRIDE: u64 = 4;

/// The doorbell of one queue.
#[derive(Default)]
pub(crate) struct Doorbell {
    /// Entries of the queue; 0: there is none.
    entries: AtomicU32,
    /// What the guest wrote last.
    value: AtomicU32,
    /// For a completion queue, what the controller will fill next.
    tail: AtomicU32,
    /// For a submission queue, the completion queue whose thread serves it. For a completion queue, itself.
    server: AtomicU32,
    /// For a completion queue: it is full, and its thread waits for the next write.
    awaited: AtomicBool,
}

impl Doorbell {
    /// A queue of `entries` begins, served by the thread of completion queue `server`.
    pub(crate) fn open(&self, entries: u32, server: u16) {
        self.value.store(0, Ordering::Relaxed);
        self.tail.store(0, Ordering::Relaxed);
        self.server.store(server.into(), Ordering::Relaxed);
        self.awaited.store(false, Ordering::Relaxed);
        self.entries.store(entries, Ordering::SeqCst);
    }

    /// There is no queue any more.
    pub(crate) fn close(&self) {
        self.entries.store(0, Ordering::SeqCst);
    }

    /// The last value; below the number of entries.
    pub(crate) fn value(&self) -> u32 {
        self.value.load(Ordering::SeqCst)
    }

    /// Notes what a completion queue's shadow says, for [`Doorbell::unread`].
    pub(crate) fn note(&self, value: u32) {
        self.value.store(value, Ordering::SeqCst);
    }

    /// The controller has filled a completion queue up to `tail`.
    pub(crate) fn set_tail(&self, tail: u32) {
        self.tail.store(tail, Ordering::SeqCst);
    }

    /// Whether a completion queue has entries that the guest has not taken.
    pub(crate) fn unread(&self) -> bool {
        self.entries.load(Ordering::SeqCst) != 0
            && self.value.load(Ordering::SeqCst) != self.tail.load(Ordering::SeqCst)
    }

    /// The thread waits for the guest to take entries.
    pub(crate) fn set_awaited(&self) {
        self.awaited.store(true, Ordering::SeqCst);
    }
}

/// A doorbell write against the rules (figure 146).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Misuse {
    /// There is no such queue.
    Register,
    /// The value is not in the queue.
    Value,
}

/// What a doorbell write means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rung {
    /// Completion queue `server`'s thread has commands to fetch.
    Submission { server: u16 },
    /// The guest has taken entries of this completion queue; its thread waits for that if `awaited`.
    Completion { queue: u16, awaited: bool },
    /// Nothing.
    Misused(Misuse),
}

/// All doorbells.
pub(crate) struct Doorbells {
    pub(crate) submission: [Doorbell; QUEUES],
    pub(crate) completion: [Doorbell; QUEUES],
}

impl Doorbells {
    pub(crate) fn new() -> Self {
        Self {
            submission: std::array::from_fn(|_| Doorbell::default()),
            completion: std::array::from_fn(|_| Doorbell::default()),
        }
    }

    /// A write of `value` at `offset` of BAR 0, which is [`FIRST`] or above.
    pub(crate) fn write(&self, offset: u64, value: u32) -> Rung {
        let at = offset - FIRST;
        let queue = usize::try_from(at / (2 * STRIDE)).unwrap_or(usize::MAX);
        let is_completion = at / STRIDE % 2 == 1;
        let all = if is_completion {
            &self.completion
        } else {
            &self.submission
        };
        let Some(bell) = all.get(queue).filter(|_| at.is_multiple_of(STRIDE)) else {
            return Rung::Misused(Misuse::Register);
        };
        let entries = bell.entries.load(Ordering::SeqCst);
        if entries == 0 {
            return Rung::Misused(Misuse::Register);
        }
        if value >= entries {
            return Rung::Misused(Misuse::Value);
        }
        bell.value.store(value, Ordering::SeqCst);
        if is_completion {
            Rung::Completion {
                queue: queue as u16,
                awaited: bell.awaited.swap(false, Ordering::SeqCst),
            }
        } else {
            Rung::Submission {
                server: bell.server.load(Ordering::SeqCst) as u16,
            }
        }
    }

    /// No queues.
    pub(crate) fn close(&self) {
        for bell in self.submission.iter().chain(&self.completion) {
            bell.close();
        }
    }
}

/// Offset in BAR 0 of the doorbell of submission queue `queue`.
pub(crate) fn submission_offset(queue: u16) -> u64 {
    FIRST + u64::from(queue) * 2 * STRIDE
}

/// The shadow doorbells and event indexes that the guest has set up.
#[derive(Clone, Copy)]
pub(crate) struct Shadow {
    memory: GuestMemory,
    doorbells: GuestSlice,
    events: GuestSlice,
    events_address: u64,
}

impl Shadow {
    /// One page each, at the given guest addresses.
    pub(crate) fn new(
        memory: GuestMemory,
        doorbells: u64,
        events: u64,
    ) -> Result<Self, MemoryError> {
        Ok(Self {
            memory,
            doorbells: memory.readable(doorbells, crate::data::PAGE)?,
            events: memory.writable(events, crate::data::PAGE)?,
            events_address: events,
        })
    }

    /// What the guest has written for a submission queue.
    pub(crate) fn tail(&self, queue: u16) -> u32 {
        self.value(2 * usize::from(queue))
    }

    /// What the guest has written for a completion queue.
    pub(crate) fn head(&self, queue: u16) -> u32 {
        self.value(2 * usize::from(queue) + 1)
    }

    /// Asks for a write to the register when the guest moves the tail past `index`. The caller looks at the tail again.
    pub(crate) fn want_tail(&self, queue: u16, index: u32) {
        self.want(2 * usize::from(queue), index);
    }

    /// The same for a completion queue's head.
    pub(crate) fn want_head(&self, queue: u16, index: u32) {
        self.want(2 * usize::from(queue) + 1, index);
    }

    fn value(&self, slot: usize) -> u32 {
        let half = |at| self.doorbells.load_u16(at).map_or(0, u32::from);
        half(slot * STRIDE as usize) | half(slot * STRIDE as usize + 2) << 16
    }

    fn want(&self, slot: usize, index: u32) {
        let at = slot * STRIDE as usize;
        self.events.store_u16(at, index as u16);
        if self.memory.tracking() {
            self.memory
                .mark_written(self.events_address, crate::data::PAGE);
        }
        // The guest writes the doorbell, then reads the event index; here it is the other way round.
        fence(Ordering::SeqCst);
    }
}

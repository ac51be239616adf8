//! The device's side of a split virtqueue (virtio 1.2 section 2.7).
//!
//! The driver is not trusted: ring indexes, descriptors and indirect tables change while they are read, so every field is
//! copied once, checked, and only the copy is used. Nothing is allocated once a [`Chain`] has grown to its usual length.

#![allow(unsafe_code)] // volatile and atomic access to rings whose bounds were checked when the queue was enabled

use std::sync::atomic::{AtomicU16, Ordering, fence};

use crate::{GuestMemory, GuestSlice, MemoryError};

const DESCRIPTOR: u64 = 16;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
/// `avail.flags`: the driver wants no interrupt (section 2.7.7).
const NO_INTERRUPT: u16 = 1;
/// `used.flags`: the device wants no notification (section 2.7.10).
const NO_NOTIFY: u16 = 1;

/// Where a queue lies in guest memory and what was negotiated for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct QueueConfig {
    /// Entries: a power of two, 1 to 32768.
    pub size: u16,
    /// Guest physical address of the descriptor table, aligned to 16.
    pub descriptors: u64,
    /// Guest physical address of the available ring ("driver area"), aligned to 2.
    pub available: u64,
    /// Guest physical address of the used ring ("device area"), aligned to 4.
    pub used: u64,
    /// Longest chain in descriptors, those in an indirect table included; at least `size`.
    pub max_chain: u16,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_index: bool,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
}

/// What a driver did that no driver may do. The device sets `DEVICE_NEEDS_RESET` and leaves the queue alone until reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueError {
    /// The size is 0, not a power of two, or above 32768.
    Size(u16),
    /// A ring is not aligned as section 2.7 requires.
    Misaligned(u64),
    /// Two of the three areas overlap.
    Overlap,
    /// A ring, buffer or indirect table does not lie in RAM.
    Memory(MemoryError),
    /// The available index moved by more entries than the queue has.
    AvailableJump(u16),
    /// A descriptor index is outside of its table.
    Index(u16),
    /// More descriptors than a chain may have; a loop looks like this too.
    TooLong(u16),
    /// A descriptor of no bytes.
    Empty(u16),
    /// A descriptor for the device to read follows one for it to write (section 2.7.4.2).
    Order(u16),
    /// More than 4 GiB in one chain (section 2.7.5.2).
    TooLarge(u64),
    /// An indirect descriptor where none is allowed: not negotiated, inside an indirect table, or with a next descriptor
    /// (section 2.7.5.3.1).
    Indirect(u16),
    /// An indirect table that is no whole number of descriptors, or has none.
    IndirectLength(u32),
    /// The device has to answer the chain with this head, and no byte of it is device-writable. For devices to report: the
    /// queue does not know which chains need an answer.
    Unanswerable(u16),
}

impl std::fmt::Display for QueueError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Size(n) => write!(
                f,
                "queue size {n} is not a power of two from 1 to the device's limit"
            ),
            Self::Misaligned(a) => write!(f, "ring address {a:#x} is misaligned"),
            Self::Overlap => write!(f, "the areas of the queue overlap"),
            Self::Memory(e) => e.fmt(f),
            Self::AvailableJump(n) => write!(f, "the available index moved by {n}"),
            Self::Index(i) => write!(f, "descriptor index {i} is outside of its table"),
            Self::TooLong(n) => write!(
                f,
                "a descriptor chain is a loop or longer than {n} descriptors"
            ),
            Self::Empty(i) => write!(f, "descriptor {i} has no bytes"),
            Self::Order(i) => write!(
                f,
                "descriptor {i} is device-readable after a device-writable one"
            ),
            Self::TooLarge(n) => write!(f, "a descriptor chain of {n} bytes"),
            Self::Indirect(i) => {
                write!(f, "descriptor {i} is indirect where that is not allowed")
            }
            Self::IndirectLength(n) => write!(f, "an indirect table of {n} bytes"),
            Self::Unanswerable(i) => write!(
                f,
                "the request at descriptor {i} has no device-writable byte for its status"
            ),
        }
    }
}

impl std::error::Error for QueueError {}

impl From<MemoryError> for QueueError {
    fn from(e: MemoryError) -> Self {
        Self::Memory(e)
    }
}

/// One request: the buffers that the driver has chained together. Reused from request to request, so it keeps its memory.
#[derive(Debug, Default)]
pub struct Chain {
    segments: Vec<GuestSlice>,
    /// The readable segments are `first..split`, the writable ones `split..`.
    first: usize,
    split: usize,
    head: u16,
}

impl Chain {
    /// Room for `segments` buffers from the start.
    #[must_use]
    pub fn with_capacity(segments: usize) -> Self {
        Self {
            segments: Vec::with_capacity(segments),
            ..Self::default()
        }
    }

    /// What [`Queue::push`] takes to give the chain back.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers for the device to read, in order; what [`Chain::take_front`] took is gone from them.
    #[must_use]
    pub fn readable(&self) -> &[GuestSlice] {
        &self.segments[self.first..self.split]
    }

    /// Buffers for the device to write, in order; what [`Chain::take_last`] took is gone from them.
    #[must_use]
    pub fn writable(&self) -> &[GuestSlice] {
        &self.segments[self.split..]
    }

    /// Copies the first bytes of the readable part into `to` and removes them, however the driver has cut them into
    /// buffers (section 2.7.4.1: framing means nothing). False: there are fewer; then an unspecified part is gone.
    pub fn take_front(&mut self, to: &mut [u8]) -> bool {
        let mut done = 0;
        while done < to.len() && self.first < self.split {
            let segment = self.segments[self.first];
            let n = segment.read(0, &mut to[done..]);
            done += n;
            if n == segment.len() {
                self.first += 1;
            } else {
                self.segments[self.first] = segment.part(n, usize::MAX);
            }
        }
        done == to.len()
    }

    /// Removes the last byte of the writable part and gives it, where a request's status goes; `None` without one.
    pub fn take_last(&mut self) -> Option<GuestSlice> {
        if self.segments.len() == self.split {
            return None;
        }
        let last = self.segments.pop()?;
        let front = last.len() - 1;
        if front > 0 {
            self.segments.push(last.part(0, front));
        }
        Some(last.part(front, 1))
    }

    fn start(&mut self, head: u16) {
        self.segments.clear();
        (self.first, self.split, self.head) = (0, 0, head);
    }
}

/// A split virtqueue as its device uses it. One thread at a time.
pub struct Queue {
    memory: GuestMemory,
    config: QueueConfig,
    descriptors: GuestSlice,
    available: GuestSlice,
    used: GuestSlice,
    next_available: u16,
    /// `avail.idx` as last read.
    seen_available: u16,
    next_used: u16,
    /// `used.idx` as last published.
    published: u16,
    /// For walking a chain once more when pages are tracked.
    scratch: Chain,
}

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Queue {
    /// A queue that starts empty, at index 0 of both rings. Its memory is translated here, once.
    ///
    /// # Errors
    /// The driver has given a size or an address that section 2.7 does not allow.
    pub fn new(memory: GuestMemory, config: QueueConfig) -> Result<Self, QueueError> {
        let size = u64::from(config.size);
        if !config.size.is_power_of_two() || config.size > 32768 {
            return Err(QueueError::Size(config.size));
        }
        // The event index fields at the end of both rings are there whether negotiated or not: drivers allocate them.
        let areas = [
            (config.descriptors, DESCRIPTOR * size, 16),
            (config.available, 6 + 2 * size, 2),
            (config.used, 6 + 8 * size, 4),
        ];
        for (i, &(start, len, align)) in areas.iter().enumerate() {
            if !start.is_multiple_of(align) {
                return Err(QueueError::Misaligned(start));
            }
            let overlaps = |&(other, other_len, _): &(u64, u64, u64)| {
                start < other.saturating_add(other_len) && other < start.saturating_add(len)
            };
            if areas[i + 1..].iter().any(overlaps) {
                return Err(QueueError::Overlap);
            }
        }
        let [descriptors, available, used] =
            areas.map(|(start, len, _)| memory.readable(start, len));
        let queue = Self {
            memory,
            descriptors: descriptors?,
            available: available?,
            used: used?,
            config: QueueConfig {
                max_chain: config.max_chain.max(config.size),
                ..config
            },
            next_available: 0,
            seen_available: 0,
            next_used: 0,
            published: 0,
            scratch: Chain::default(),
        };
        // RAM is mapped page by page, so host addresses are aligned as guest addresses are; the accessors rely on it.
        for (slice, (start, _, align)) in [&queue.descriptors, &queue.available, &queue.used]
            .into_iter()
            .zip(areas)
        {
            if !(slice.as_ptr() as u64).is_multiple_of(align) {
                return Err(QueueError::Misaligned(start));
            }
        }
        Ok(queue)
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.config.size
    }

    /// How many chains have been taken, modulo 65536.
    #[must_use]
    pub fn taken(&self) -> u16 {
        self.next_available
    }

    /// Takes the next chain that the driver has made available into `chain`; false when there is none.
    ///
    /// # Errors
    /// The driver has broken a rule of section 2.7; `chain` holds nothing of use, and the queue is not used any further.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.next_available == self.seen_available && !self.refresh()? {
            return Ok(false);
        }
        let slot = usize::from(self.next_available & (self.config.size - 1));
        // The load of avail.idx has acquired this entry.
        let head = self.load(self.available, 4 + 2 * slot, Ordering::Relaxed);
        self.walk(head, chain)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    /// Gives back a chain, `written` bytes of whose writable part the device has written. The driver sees it at
    /// [`Queue::publish`].
    #[inline]
    pub fn push(&mut self, head: u16, written: u32) {
        if self.memory.tracking() {
            self.mark(head);
        }
        let slot = usize::from(self.next_used & (self.config.size - 1));
        let element = u64::from(head) | u64::from(written) << 32;
        // SAFETY: `slot` is below `size`, so the element lies in the used ring, which `new` has checked. It is aligned to
        // 4 only, hence two stores.
        unsafe {
            let at = self.used.as_ptr().add(4 + 8 * slot).cast::<u32>();
            at.write_volatile((element as u32).to_le());
            at.add(1).write_volatile(((element >> 32) as u32).to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver everything pushed since the last time; true when it wants an interrupt for it
    /// (section 2.7.7.2). Once per batch.
    #[inline]
    #[must_use]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        self.store(self.used, 2, new);
        self.published = new;
        if self.memory.tracking() {
            self.mark_used_ring();
        }
        // The driver writes its wish, then reads used.idx; we write used.idx, then read its wish.
        fence(Ordering::SeqCst);
        if self.config.event_index {
            let at = 4 + 2 * usize::from(self.config.size);
            let event = self.load(self.available, at, Ordering::Relaxed);
            return new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        self.load(self.available, 0, Ordering::Relaxed) & NO_INTERRUPT == 0
    }

    /// Asks the driver not to notify while the device looks at the queue anyway. A hint: notifications may still come.
    #[inline]
    pub fn disable_notify(&mut self) {
        // With event indexes the old avail_event lies behind avail.idx, which has the same effect (section 2.7.10).
        if !self.config.event_index {
            self.store(self.used, 0, NO_NOTIFY);
        }
    }

    /// Asks for a notification of the next chain. True: chains came before the driver could see that, so pop again
    /// instead of sleeping.
    ///
    /// # Errors
    /// As [`Queue::pop`].
    #[inline]
    pub fn enable_notify(&mut self) -> Result<bool, QueueError> {
        if self.config.event_index {
            let at = 4 + 8 * usize::from(self.config.size);
            self.store(self.used, at, self.next_available);
        } else {
            self.store(self.used, 0, 0);
        }
        if self.memory.tracking() {
            self.mark_used_ring();
        }
        // The driver writes avail.idx, then reads our wish; we write our wish, then read avail.idx.
        fence(Ordering::SeqCst);
        self.refresh()
    }

    /// Reads avail.idx; whether there is something to pop.
    #[inline]
    fn refresh(&mut self) -> Result<bool, QueueError> {
        let index = self.load(self.available, 2, Ordering::Acquire);
        let ahead = index.wrapping_sub(self.next_available);
        if ahead > self.config.size {
            return Err(QueueError::AvailableJump(ahead));
        }
        self.seen_available = index;
        Ok(ahead != 0)
    }

    /// Reads the chain that starts at `head`.
    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        chain.start(head);
        let (mut table, mut entries) = (self.descriptors, self.config.size);
        let (mut index, mut left, mut total) = (head, self.config.max_chain, 0u64);
        let mut in_table = false;
        loop {
            if index >= entries {
                return Err(QueueError::Index(index));
            }
            let descriptor = read_descriptor(table, index);
            if descriptor.flags & F_INDIRECT != 0 {
                if !self.config.indirect || in_table || descriptor.flags & F_NEXT != 0 {
                    return Err(QueueError::Indirect(index));
                }
                (table, entries) = self.indirect(&descriptor)?;
                (index, in_table) = (0, true);
                continue;
            }
            left = left
                .checked_sub(1)
                .ok_or(QueueError::TooLong(self.config.max_chain))?;
            total += u64::from(descriptor.len);
            self.add(index, &descriptor, chain)?;
            if descriptor.flags & F_NEXT == 0 {
                break;
            }
            index = descriptor.next;
        }
        if total > u64::from(u32::MAX) {
            return Err(QueueError::TooLarge(total));
        }
        Ok(())
    }

    #[inline]
    fn add(&self, index: u16, d: &Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
        if d.len == 0 {
            return Err(QueueError::Empty(index));
        }
        let slice = if d.flags & F_WRITE != 0 {
            self.memory.writable(d.address, d.len.into())?
        } else {
            if chain.segments.len() != chain.split {
                return Err(QueueError::Order(index));
            }
            chain.split += 1;
            self.memory.readable(d.address, d.len.into())?
        };
        chain.segments.push(slice);
        Ok(())
    }

    /// The table that an indirect descriptor points at. It may have more entries than a chain may use.
    fn indirect(&self, d: &Descriptor) -> Result<(GuestSlice, u16), QueueError> {
        let entries = u16::try_from(u64::from(d.len) / DESCRIPTOR)
            .ok()
            .filter(|n| *n > 0 && u64::from(d.len).is_multiple_of(DESCRIPTOR))
            .ok_or(QueueError::IndirectLength(d.len))?;
        if entries > self.config.max_chain {
            return Err(QueueError::IndirectLength(d.len));
        }
        Ok((self.memory.readable(d.address, d.len.into())?, entries))
    }

    /// Marks a chain's writable buffers once more: the backend wrote to them after they were translated, maybe before
    /// tracking began. A driver that changed the chain meanwhile only harms its own copy.
    #[cold]
    fn mark(&mut self, head: u16) {
        let mut chain = std::mem::take(&mut self.scratch);
        let _ = self.walk(head, &mut chain);
        self.scratch = chain;
    }

    #[cold]
    fn mark_used_ring(&self) {
        self.memory
            .mark_written(self.config.used, self.used.len() as u64);
    }

    /// A 16-bit field of a ring. `at` is even and lies in the ring.
    #[inline]
    fn load(&self, ring: GuestSlice, at: usize, order: Ordering) -> u16 {
        debug_assert!(at + 2 <= ring.len());
        // SAFETY: callers pass offsets of fields that `new` has checked to lie in the ring, whose address is even.
        u16::from_le(unsafe { AtomicU16::from_ptr(ring.as_ptr().add(at).cast()) }.load(order))
    }

    /// Stores a 16-bit field of a ring, with release ordering. `at` is even and lies in the ring.
    #[inline]
    fn store(&self, ring: GuestSlice, at: usize, value: u16) {
        debug_assert!(at + 2 <= ring.len());
        // SAFETY: as in `load`.
        unsafe { AtomicU16::from_ptr(ring.as_ptr().add(at).cast()) }
            .store(value.to_le(), Ordering::Release);
    }
}

/// Copies entry `index` of `table`; the caller has compared it with the number of entries.
#[inline]
fn read_descriptor(table: GuestSlice, index: u16) -> Descriptor {
    let at = DESCRIPTOR as usize * usize::from(index);
    debug_assert!(at + DESCRIPTOR as usize <= table.len());
    let mut words = [0u64; 2];
    // SAFETY: the entry lies in the table. The word loads are only used where they are aligned, which indirect tables
    // need not be; any bytes are valid integers.
    unsafe {
        let entry = table.as_ptr().add(at);
        if (entry as usize).is_multiple_of(8) {
            words[0] = entry.cast::<u64>().read_volatile();
            words[1] = entry.add(8).cast::<u64>().read_volatile();
        } else {
            let mut bytes = [0; 16];
            table.read(at, &mut bytes);
            words = std::mem::transmute::<[u8; 16], [u64; 2]>(bytes);
        }
    }
    let rest = u64::from_le(words[1]);
    Descriptor {
        address: u64::from_le(words[0]),
        len: rest as u32,
        flags: (rest >> 32) as u16,
        next: (rest >> 48) as u16,
    }
}

#[cfg(test)]
#[cfg(feature = "testing")]
mod tests;

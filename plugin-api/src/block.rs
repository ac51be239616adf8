//! Block storage, from both sides: the traits of a backend, and the handle by which a device uses one.

#![allow(unsafe_code)] // calls the backend's table, and gives it pointers to the batch

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use anyhow::{Context, bail};
pub use vmm_abi::block::{BlockDone, BlockInfo};
use vmm_abi::block::{
    BlockReq, BlockResizeTable, BlockTable, OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE,
    OP_WRITE_ZEROES, REQ_FUA, REQ_UNMAP,
};
use vmm_abi::{Obj, Opt};

use crate::export::{ErrorText, text};
use crate::iface::interface;
use crate::{Events, GuestSlice, Host, Options, Result};

/// A kind of block storage: what `type =` in a `[block_dev]` table names.
pub trait BlockBackend: Sized + Send + Sync + 'static {
    /// Its queue.
    type Queue: BlockQueue;

    /// Whether the disk may get larger while it is used; then it has [`BlockBackend::look_again`] and [`BlockBackend::bytes`].
    const RESIZABLE: bool = false;

    /// Makes it from validated options. Control thread.
    ///
    /// # Errors
    /// What the operator can mend: the text names it. The host adds the backend's name.
    fn create(options: &Options<'_>, host: &Host) -> Result<Self>;

    /// Size, units, features. Any thread; never changes.
    fn info(&self) -> BlockInfo;

    /// Opens a queue for at most `depth` requests in flight. What the queue needs from the backend it shares by `Arc`.
    ///
    /// # Errors
    /// Out of resources.
    fn open_queue(&self, depth: u32) -> Result<Self::Queue>;

    /// The operator says that the disk may have grown: looks, and returns the size in bytes, which [`BlockBackend::bytes`] gives
    /// from then on: a multiple of the block size, and never less than before. A layer returns what the disk below it has by now
    /// ([`BlockDevice::bytes`]). Control thread, while queues are in use.
    ///
    /// # Errors
    /// It can't look; the size stays what it was.
    fn look_again(&self) -> Result<u64> {
        Ok(self.bytes())
    }

    /// The size of the last look in bytes. Any thread; does not look.
    fn bytes(&self) -> u64 {
        self.info().bytes
    }

    /// A watched descriptor is ready or a timer has expired. I/O thread.
    fn ready(&self, token: u64, events: Events) {
        let _ = (token, events);
    }
}

/// One queue of a [`BlockBackend`]. Used by one thread at a time; dropping it waits for what is in flight.
pub trait BlockQueue: Send + 'static {
    /// Takes requests from the first on; returns how many. Fewer than all: full. Allocates nothing, may do short I/O itself.
    /// The scatter lists are borrowed for the call; the memory they point at stays.
    fn submit(&mut self, batch: &[BlockRequest]) -> usize;

    /// Stores completions; returns how many. Fewer than there is room for: there are no more now.
    fn reap(&mut self, done: &mut [BlockDone]) -> usize;

    /// Readable when completions have come that were not there at the end of the last submit or reap; its owner reads 8 bytes from
    /// it. `None`: every request is complete when submit returns.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOp {
    /// Fill the scatter list.
    Read,
    /// Store the scatter list.
    Write {
        /// Complete only when the data survives a power failure.
        fua: bool,
    },
    /// Make everything that has completed survive a power failure.
    Flush,
    /// The range is not needed any more.
    Discard,
    /// The range reads as zero from now on.
    WriteZeroes {
        /// Space may be freed.
        unmap: bool,
    },
}

impl BlockOp {
    fn raw(self) -> (u32, u32) {
        match self {
            Self::Read => (OP_READ, 0),
            Self::Write { fua } => (OP_WRITE, if fua { REQ_FUA } else { 0 }),
            Self::Flush => (OP_FLUSH, 0),
            Self::Discard => (OP_DISCARD, 0),
            Self::WriteZeroes { unmap } => (OP_WRITE_ZEROES, if unmap { REQ_UNMAP } else { 0 }),
        }
    }
}

/// One request as a backend sees it.
#[repr(transparent)]
pub struct BlockRequest(BlockReq);

impl BlockRequest {
    /// What to do; `None` for an operation this SDK does not know: complete it with `-ENOTSUP`.
    #[must_use]
    pub fn op(&self) -> Option<BlockOp> {
        Some(match self.0.op {
            OP_READ => BlockOp::Read,
            OP_WRITE => BlockOp::Write {
                fua: self.0.flags & REQ_FUA != 0,
            },
            OP_FLUSH => BlockOp::Flush,
            OP_DISCARD => BlockOp::Discard,
            OP_WRITE_ZEROES => BlockOp::WriteZeroes {
                unmap: self.0.flags & REQ_UNMAP != 0,
            },
            _ => return None,
        })
    }

    /// To come back in [`BlockDone::token`].
    #[must_use]
    pub fn token(&self) -> u64 {
        self.0.token
    }

    /// Byte offset.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.0.offset
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Whether it covers no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// The scatter list; empty except for reads and writes.
    #[must_use]
    pub fn segments(&self) -> &[GuestSlice] {
        if self.0.iov_count == 0 {
            return &[];
        }
        // SAFETY: the ABI promises `iov_count` elements, borrowed for the call of submit that this reference lives in;
        // `GuestSlice` is a transparent `Iov`.
        unsafe { std::slice::from_raw_parts(self.0.iov.cast(), self.0.iov_count) }
    }

    /// The same as completion with `result` (0 or `-errno`).
    #[must_use]
    pub fn done(&self, result: i32) -> BlockDone {
        BlockDone {
            token: self.0.token,
            result,
            reserved: 0,
        }
    }

    /// Whether offset, length and scatter list fit `info`, so that a backend need not check each again: 0 or the `-errno`
    /// to complete it with.
    #[must_use]
    pub fn check(&self, info: &BlockInfo) -> i32 {
        let Some(op) = self.op() else {
            return -libc::ENOTSUP;
        };
        let writes = !matches!(op, BlockOp::Read | BlockOp::Flush);
        if writes && info.features & vmm_abi::block::BLOCK_READ_ONLY != 0 {
            return -libc::EROFS;
        }
        if op == BlockOp::Flush {
            return 0;
        }
        let unit = u64::from(info.logical.max(1));
        let fits = self
            .0
            .offset
            .checked_add(self.0.len)
            .is_some_and(|end| end <= info.bytes);
        if !fits || !self.0.offset.is_multiple_of(unit) || !self.0.len.is_multiple_of(unit) {
            return -libc::EINVAL;
        }
        let moves = matches!(op, BlockOp::Read | BlockOp::Write { .. });
        if moves && self.segments().iter().map(|s| s.len() as u64).sum::<u64>() != self.0.len {
            return -libc::EINVAL;
        }
        0
    }
}

/// A block backend in the hands of a device or of a backend stacked on it. Shared freely.
#[derive(Clone)]
pub struct BlockDevice(Arc<Backend>);

struct Backend {
    obj: Obj,
    table: &'static BlockTable,
    resize: Option<&'static BlockResizeTable>,
    name: String,
}

// SAFETY: the ABI allows `info` on any thread; queues are separate handles. The host releases backends after their users.
unsafe impl Send for Backend {}
// SAFETY: as above.
unsafe impl Sync for Backend {}

impl BlockDevice {
    pub(crate) fn from_object(opt: &Opt) -> Result<Self> {
        let name = text(&opt.text).to_owned();
        let Some(table) = interface(&opt.obj, vmm_abi::block::BLOCK) else {
            bail!("`{name}` is not a block backend");
        };
        Ok(Self(Arc::new(Backend {
            obj: opt.obj,
            table,
            resize: interface(&opt.obj, vmm_abi::block::BLOCK_RESIZE),
            name,
        })))
    }

    /// The backend's name in the VM file.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Size, units, features.
    ///
    /// # Errors
    /// The backend has failed.
    pub fn info(&self) -> Result<BlockInfo> {
        let mut info = BlockInfo::default();
        // SAFETY: a call by the table's contract on a live object.
        let code = unsafe { (self.0.table.info)(self.0.obj.this, &raw mut info) };
        if code < 0 {
            return Err(std::io::Error::from_raw_os_error(-code))
                .with_context(|| format!("block_dev.{} does not say what it is", self.0.name));
        }
        let unit = u64::from(info.logical);
        if !(512..=65536).contains(&unit)
            || !unit.is_power_of_two()
            || !info.bytes.is_multiple_of(unit)
        {
            bail!(
                "block_dev.{} describes itself as {} bytes in blocks of {unit}",
                self.0.name,
                info.bytes
            );
        }
        Ok(info)
    }

    /// The present size in bytes of a disk that [`BlockDevice::info`] said was `at_first` large: more if it has grown, and its
    /// backend follows that. Any thread; asks the backend, which does not look.
    #[must_use]
    pub fn bytes(&self, at_first: u64) -> u64 {
        // SAFETY: a call by the table's contract on a live object.
        let present = self.0.resize.map_or(at_first, |resize| unsafe {
            (resize.bytes)(self.0.obj.this)
        });
        present.max(at_first)
    }

    /// Opens a queue for at most `depth` requests in flight.
    ///
    /// # Errors
    /// The backend is out of resources.
    pub fn open_queue(&self, depth: u32) -> Result<BlockQueueHandle> {
        let mut queue = std::ptr::null_mut();
        let mut error = ErrorText::default();
        let sink = error.sink();
        // SAFETY: a call by the table's contract on a live object.
        let code = unsafe {
            (self.0.table.open_queue)(self.0.obj.this, depth, &raw mut queue, &raw const sink)
        };
        if code < 0 || queue.is_null() {
            bail!("block_dev.{}: {}", self.0.name, error.or_errno(code));
        }
        Ok(BlockQueueHandle {
            queue,
            backend: self.0.clone(),
        })
    }
}

/// A queue of a backend. Owned by one thread at a time.
pub struct BlockQueueHandle {
    queue: *mut std::ffi::c_void,
    backend: Arc<Backend>,
}

// SAFETY: the ABI lets a queue move between threads as long as one uses it at a time, which `&mut self` gives.
unsafe impl Send for BlockQueueHandle {}

impl BlockQueueHandle {
    /// Hands over the batch; what was taken leaves it, from the front. What stays (the queue is full) is submitted again later.
    /// Returns how many were taken.
    pub fn submit(&mut self, batch: &mut Batch) -> usize {
        self.submit_first(batch, usize::MAX)
    }

    /// As [`BlockQueueHandle::submit`], but at most the first `limit` requests.
    pub fn submit_first(&mut self, batch: &mut Batch, limit: usize) -> usize {
        let reqs = batch.prepare(limit);
        if reqs.is_empty() {
            return 0;
        }
        // SAFETY: a call by the table's contract; `prepare` has pointed each request at its part of the batch's list.
        let taken = unsafe { (self.backend.table.submit)(self.queue, reqs.as_ptr(), reqs.len()) };
        batch.remove(taken)
    }

    /// Stores completions; returns how many. Fewer than there is room for: there are no more now.
    pub fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        // SAFETY: a call by the table's contract.
        unsafe { (self.backend.table.reap)(self.queue, done.as_mut_ptr(), done.len()) }
            .min(done.len())
    }

    /// Readable when completions have come that were not there at the end of the last submit or reap: read 8 bytes
    /// ([`BlockQueueHandle::drain`]), then reap. `None`: everything is complete when submit returns.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: a call by the table's contract; the descriptor lives as long as the queue.
        let fd = unsafe { (self.backend.table.fd)(self.queue) };
        // SAFETY: as above.
        (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Takes the readiness from the queue's descriptor.
    pub fn drain(&self) {
        if let Some(fd) = self.fd() {
            crate::eventfd::drain(fd);
        }
    }
}

impl Drop for BlockQueueHandle {
    fn drop(&mut self) {
        // SAFETY: the one release of the queue.
        unsafe { (self.backend.table.close_queue)(self.queue) };
    }
}

/// Requests collected for one submit. Keeps its memory: after the first few batches, filling one allocates nothing.
#[derive(Default)]
pub struct Batch {
    reqs: Vec<BlockReq>,
    segments: Vec<GuestSlice>,
}

// SAFETY: the pointers in `reqs` are set and used within one `submit`; between calls they are dead values.
unsafe impl Send for Batch {}

impl Batch {
    /// Room for `requests` requests with `segments` scatter elements in all.
    #[must_use]
    pub fn with_capacity(requests: usize, segments: usize) -> Self {
        Self {
            reqs: Vec::with_capacity(requests),
            segments: Vec::with_capacity(segments),
        }
    }

    /// Requests in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.reqs.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.reqs.is_empty()
    }

    /// Adds a read or write of the scatter list `segments` at byte `offset`.
    pub fn transfer(&mut self, token: u64, op: BlockOp, offset: u64, segments: &[GuestSlice]) {
        let len = segments.iter().map(|s| s.len() as u64).sum();
        self.segments.extend_from_slice(segments);
        self.add(token, op, offset, len, segments.len());
    }

    /// Adds a flush (`offset` and `len` 0), discard or write-zeroes.
    pub fn control(&mut self, token: u64, op: BlockOp, offset: u64, len: u64) {
        self.add(token, op, offset, len, 0);
    }

    fn add(&mut self, token: u64, op: BlockOp, offset: u64, len: u64, iov_count: usize) {
        let (op, flags) = op.raw();
        self.reqs.push(BlockReq {
            token,
            op,
            flags,
            offset,
            len,
            iov: std::ptr::null(),
            iov_count,
        });
    }

    /// Points the first `limit` requests at their scatter lists, now that the lists no longer move.
    fn prepare(&mut self, limit: usize) -> &[BlockReq] {
        let first = limit.min(self.reqs.len());
        let mut rest: &[GuestSlice] = &self.segments;
        for req in &mut self.reqs[..first] {
            let (own, others) = rest.split_at(req.iov_count);
            req.iov = own.as_ptr().cast();
            rest = others;
        }
        &self.reqs[..first]
    }

    /// Hands at most the first `limit` requests to a queue of the caller's own plugin, which needs no handle. What was taken
    /// leaves the batch. Returns how many.
    pub fn submit_to(&mut self, queue: &mut impl BlockQueue, limit: usize) -> usize {
        let reqs = self.prepare(limit);
        if reqs.is_empty() {
            return 0;
        }
        // SAFETY: `BlockRequest` is a transparent `BlockReq`; `prepare` has pointed each at its part of the batch's list.
        let requests =
            unsafe { std::slice::from_raw_parts(reqs.as_ptr().cast::<BlockRequest>(), reqs.len()) };
        let taken = queue.submit(requests);
        self.remove(taken)
    }

    fn remove(&mut self, taken: usize) -> usize {
        let taken = taken.min(self.reqs.len());
        let segments: usize = self.reqs.drain(..taken).map(|r| r.iov_count).sum();
        self.segments.drain(..segments);
        taken
    }
}

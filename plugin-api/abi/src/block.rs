//! What a block backend offers: queue pairs. The device submits a batch, reaps a batch, and sleeps on one descriptor.

use core::ffi::c_void;

use crate::Sink;

/// Interface name of [`BlockTable`].
pub const BLOCK: &str = "vmm.block/1";
/// Interface name of [`BlockResizeTable`]; offered by backends whose disk may get larger while it is used.
pub const BLOCK_RESIZE: &str = "vmm.block.resize/1";

/// [`BlockInfo::features`]: writes fail with `-EROFS`.
pub const BLOCK_READ_ONLY: u32 = 1;
/// [`BlockInfo::features`]: `OP_DISCARD` frees space; without it, it fails with `-ENOTSUP`.
pub const BLOCK_DISCARD: u32 = 2;
/// [`BlockInfo::features`]: `OP_WRITE_ZEROES` works; without it, it fails with `-ENOTSUP`.
pub const BLOCK_WRITE_ZEROES: u32 = 4;
/// [`BlockInfo::features`]: a write that has completed may still be lost until `OP_FLUSH` completes.
pub const BLOCK_VOLATILE_CACHE: u32 = 8;

/// [`BlockReq::op`]: fill the scatter list from `offset`.
pub const OP_READ: u32 = 0;
/// [`BlockReq::op`]: store the scatter list at `offset`.
pub const OP_WRITE: u32 = 1;
/// [`BlockReq::op`]: when it completes, every write that completed before it was submitted survives a power failure.
pub const OP_FLUSH: u32 = 2;
/// [`BlockReq::op`]: `len` bytes at `offset` are not needed any more; they read as anything.
pub const OP_DISCARD: u32 = 3;
/// [`BlockReq::op`]: `len` bytes at `offset` read as zero from now on.
pub const OP_WRITE_ZEROES: u32 = 4;

/// [`BlockReq::flags`]: for `OP_WRITE`, complete only when the data survives a power failure.
pub const REQ_FUA: u32 = 1;
/// [`BlockReq::flags`]: for `OP_WRITE_ZEROES`, space may be freed.
pub const REQ_UNMAP: u32 = 2;

/// What a backend is when it is created. Never changes while it lives; how large a disk has become since then, it says in
/// [`BlockResizeTable`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct BlockInfo {
    /// Bytes; a multiple of `logical`.
    pub bytes: u64,
    /// Smallest unit that can be read or written, and the alignment of offsets and lengths: a power of two, 512 to 65536.
    pub logical: u32,
    /// Unit that is written without a read before it; a multiple of `logical`.
    pub physical: u32,
    /// `BLOCK_*`.
    pub features: u32,
    /// Most elements in one scatter list.
    pub max_segments: u32,
    /// Alignment that the addresses in a scatter list must have, in bytes; 1 for none.
    pub alignment: u32,
    /// Most bytes in one discard or write-zeroes request; 0 when neither is offered.
    pub max_discard: u32,
}

/// One element of a scatter list. It points into guest memory, which stays mapped for the life of the process, or into
/// memory that the submitter keeps until the request is reaped.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct Iov {
    /// First byte. The guest may change what is there at any time.
    pub host: *mut u8,
    /// Bytes.
    pub len: usize,
}

/// One request.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct BlockReq {
    /// Comes back in [`BlockDone::token`].
    pub token: u64,
    /// `OP_*`.
    pub op: u32,
    /// `REQ_*`.
    pub flags: u32,
    /// Byte offset.
    pub offset: u64,
    /// Bytes; for reads and writes the sum of the scatter list.
    pub len: u64,
    /// Scatter list, for reads and writes. The list itself is borrowed for the call of submit.
    pub iov: *const Iov,
    /// Elements.
    pub iov_count: usize,
}

/// One completion.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct BlockDone {
    /// From [`BlockReq::token`].
    pub token: u64,
    /// 0: all of it was done. `-errno`: not, or not all.
    pub result: i32,
    /// Unused, zero.
    pub reserved: u32,
}

/// `vmm.block/1`. A queue belongs to one thread at a time; different queues run in parallel without a lock between them.
/// Requests of one queue complete in any order; a flush covers what had *completed*, on any queue, before it was submitted.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct BlockTable {
    /// Fills `out`. Any thread. Returns 0 or `-errno`.
    pub info: unsafe extern "C" fn(this: *mut c_void, out: *mut BlockInfo) -> i32,
    /// Opens a queue for at most `depth` requests in flight and stores it in `out`; owned by the caller until
    /// `close_queue`. Control thread or the future owner.
    pub open_queue: unsafe extern "C" fn(
        this: *mut c_void,
        depth: u32,
        out: *mut *mut c_void,
        err: *const Sink,
    ) -> i32,
    /// Hands over `count` requests; returns how many were taken, from the first on. Fewer than `count`: the queue is full, reap first.
    /// Invalid requests are taken and complete with `-EINVAL`. Queue owner; allocates nothing, may do short I/O itself.
    pub submit:
        unsafe extern "C" fn(queue: *mut c_void, reqs: *const BlockReq, count: usize) -> usize,
    /// Stores at most `max` completions; returns how many. Fewer than `max`: there are no more now. Queue owner.
    pub reap: unsafe extern "C" fn(queue: *mut c_void, out: *mut BlockDone, max: usize) -> usize,
    /// A descriptor that gets readable when completions have come that were not there yet at the end of the last
    /// submit or reap. The owner reads 8 bytes from it, then reaps until there are no more. Borrowed until `close_queue`.
    /// -1: every request is complete when submit returns.
    pub fd: unsafe extern "C" fn(queue: *mut c_void) -> i32,
    /// Waits for what is in flight, then ends the queue. Queue owner.
    pub close_queue: unsafe extern "C" fn(queue: *mut c_void),
}

/// `vmm.block.resize/1`: disks that get larger while they are used. A disk never gets smaller: each answer is a multiple of
/// [`BlockInfo::logical`], and at least [`BlockInfo::bytes`] and every answer before it. Requests up to the size that was answered
/// are valid from then on. Who does not know of this table goes on using the first [`BlockInfo::bytes`] bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct BlockResizeTable {
    /// Looks again at how large the disk is, because the operator says that it has grown, and stores the size in bytes in `out`.
    /// A layer answers for what it stands on, which has been asked before it. Control thread; from create until release, also
    /// while queues are in use. Returns 0, or `-errno` with one line in `err`: the size stays what it was.
    pub look_again: unsafe extern "C" fn(this: *mut c_void, out: *mut u64, err: *const Sink) -> i32,
    /// The size of the last `look_again` in bytes; before the first, [`BlockInfo::bytes`]. Any thread; does not look.
    pub bytes: unsafe extern "C" fn(this: *mut c_void) -> u64,
}

//! The thunks behind a block backend's tables.

use std::ffi::c_void;
use std::marker::PhantomData;

use vmm_abi::block::{
    BLOCK, BLOCK_RESIZE, BlockDone, BlockInfo, BlockReq, BlockResizeTable, BlockTable,
};
use vmm_abi::device::{EVENTS, EventsTable};
use vmm_abi::{Base, Iface, Sink, Str};

use super::meter::Meter;
use super::{control, object, release, text};
use crate::iface::offer;
use crate::{BlockBackend, BlockQueue, BlockRequest, Events, Host, guard};

/// A queue behind its guard and its meter.
struct Queue<Q> {
    inner: Q,
    host: Host,
    meter: Meter,
}

/// The tables of block backend type `T`.
pub(super) struct BlockTables<T>(PhantomData<T>);

impl<T: BlockBackend> BlockTables<T> {
    pub(super) const BASE: &'static Base = &Base {
        release: release::<T>,
        interface: Self::interface,
    };
    const BLOCK: &'static BlockTable = &BlockTable {
        info: Self::info,
        open_queue: Self::open_queue,
        submit: Self::submit,
        reap: Self::reap,
        fd: Self::fd,
        close_queue: Self::close_queue,
    };
    const RESIZE: &'static BlockResizeTable = &BlockResizeTable {
        look_again: Self::look_again,
        bytes: Self::bytes,
    };
    const EVENTS: &'static EventsTable = &EventsTable { ready: Self::ready };

    unsafe extern "C" fn interface(_this: *mut c_void, name: Str) -> Iface {
        match text(&name) {
            BLOCK => offer(Self::BLOCK),
            BLOCK_RESIZE if T::RESIZABLE => offer(Self::RESIZE),
            EVENTS => offer(Self::EVENTS),
            _ => Iface::NONE,
        }
    }

    unsafe extern "C" fn info(this: *mut c_void, out: *mut BlockInfo) -> i32 {
        // SAFETY: the caller passes the object that this table came with, and room for one `BlockInfo`.
        unsafe {
            control::<T>(this, "info", std::ptr::null(), |b| {
                out.write(b.info());
                Ok(0)
            })
        }
    }

    unsafe extern "C" fn open_queue(
        this: *mut c_void,
        depth: u32,
        out: *mut *mut c_void,
        err: *const Sink,
    ) -> i32 {
        // SAFETY: as in `info`; `err` is a valid sink, `out` has room for the pointer.
        unsafe {
            let host = object::<T>(this).host.clone();
            control::<T>(this, "open_queue", err, |b| {
                let queue = Queue {
                    inner: b.open_queue(depth)?,
                    meter: Meter::new(&host),
                    host,
                };
                out.write(Box::into_raw(Box::new(queue)).cast());
                Ok(0)
            })
        }
    }

    /// The queue behind the pointer.
    ///
    /// # Safety
    /// `queue` came from `open_queue`, is not closed, and nobody else uses it now.
    unsafe fn queue<'a>(queue: *mut c_void) -> &'a mut Queue<T::Queue> {
        // SAFETY: the caller's promise.
        unsafe { &mut *queue.cast() }
    }

    unsafe extern "C" fn submit(queue: *mut c_void, reqs: *const BlockReq, count: usize) -> usize {
        if count == 0 {
            return 0;
        }
        // SAFETY: the queue's owner calls, with `count` requests; `BlockRequest` is a transparent `BlockReq`.
        let (queue, reqs, batch) = unsafe {
            (
                Self::queue(queue),
                std::slice::from_raw_parts(reqs, count),
                std::slice::from_raw_parts(reqs.cast::<BlockRequest>(), count),
            )
        };
        let begun = queue.meter.begin(reqs);
        let taken = guard::call(&queue.host, "submit", 0, || queue.inner.submit(batch));
        queue.meter.taken(&reqs[..taken.min(count)], begun);
        taken
    }

    unsafe extern "C" fn reap(queue: *mut c_void, out: *mut BlockDone, max: usize) -> usize {
        if max == 0 {
            return 0;
        }
        // SAFETY: the queue's owner calls, with room for `max` completions that hold valid values.
        let (queue, done) =
            unsafe { (Self::queue(queue), std::slice::from_raw_parts_mut(out, max)) };
        let count = guard::call(&queue.host, "reap", 0, || queue.inner.reap(done));
        queue.meter.reaped(&done[..count.min(max)]);
        count
    }

    unsafe extern "C" fn fd(queue: *mut c_void) -> i32 {
        use std::os::fd::AsRawFd;
        // SAFETY: the queue's owner calls.
        let queue = unsafe { Self::queue(queue) };
        guard::call(&queue.host, "fd", -1, || {
            queue.inner.fd().map_or(-1, |fd| fd.as_raw_fd())
        })
    }

    unsafe extern "C" fn close_queue(queue: *mut c_void) {
        // SAFETY: the one release of a queue that `open_queue` has boxed.
        let queue = unsafe { Box::from_raw(queue.cast::<Queue<T::Queue>>()) };
        let Queue { inner, host, .. } = *queue;
        if let Err(text) = guard::catch(move || drop(inner)) {
            host.fault("close_queue", &text);
        }
    }

    unsafe extern "C" fn look_again(this: *mut c_void, out: *mut u64, err: *const Sink) -> i32 {
        // SAFETY: as in `info`; `err` is a valid sink, `out` has room for the number.
        unsafe {
            control::<T>(this, "look_again", err, |b| {
                out.write(b.look_again()?);
                Ok(0)
            })
        }
    }

    unsafe extern "C" fn bytes(this: *mut c_void) -> u64 {
        // SAFETY: as in `info`.
        let object = unsafe { object::<T>(this) };
        // A backend that has failed has no size any more, and nobody makes a disk smaller.
        guard::call(&object.host, "bytes", 0, || object.inner.bytes())
    }

    unsafe extern "C" fn ready(this: *mut c_void, token: u64, events: u32) {
        // SAFETY: as in `info`.
        let object = unsafe { object::<T>(this) };
        guard::call(&object.host, "ready", (), || {
            object.inner.ready(token, Events(events))
        });
    }
}

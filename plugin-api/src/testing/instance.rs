//! The services as one object of the fake host gets them: C functions that record.

#![allow(unsafe_code)] // the C side of the services

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll as poll_fds};
use vmm_abi::device::EVENT_TIMER;
use vmm_abi::host::{
    CONTROL, COUNTER, ControlTable, CounterTable, DOORBELL_END, DOORBELL_MATCH, EVENT, EventTable,
    FAULT, FaultTable, IRQ, IrqTable, LOG, LOG_TRACE, LogTable, MEMORY, MemTable, MemoryTable,
    NAME, NameTable, STARTUP, StartupTable, THREAD, ThreadTable,
};
use vmm_abi::{Iface, Str};

use super::object::Object;
use super::{Shared, lock};
use crate::export::text;
use crate::iface::offer;
use crate::{Doorbell, EventFd};

/// One object's view of the fake host.
pub(super) struct Instance {
    shared: &'static Shared,
    pub(super) object: Mutex<Weak<Object>>,
    pub(super) vectors: Mutex<BTreeMap<u32, EventFd>>,
    pub(super) msix: AtomicBool,
    pub(super) pins: Mutex<BTreeMap<u32, PinRecord>>,
    pub(super) doorbells: Mutex<Vec<(Doorbell, std::os::fd::OwnedFd)>>,
    pub(super) refuse_doorbells: AtomicBool,
    watches: Mutex<BTreeMap<u64, (i32, u32)>>,
    timers: Mutex<BTreeMap<u64, u64>>,
    pub(super) counters: Mutex<BTreeMap<String, &'static AtomicU64>>,
    pub(super) faults: Mutex<Vec<String>>,
    pub(super) logs: Mutex<Vec<String>>,
    pub(super) hold: Mutex<Option<String>>,
    pub(super) requests: Mutex<Vec<(u32, String)>>,
    /// Whether a thread of it has last asked to gather.
    pub(super) gathering: AtomicBool,
}

/// What a pin has done.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PinRecord {
    pub(super) high: bool,
    pub(super) rises: u64,
}

impl Instance {
    pub(super) fn new(shared: &'static Shared) -> Self {
        Self {
            shared,
            object: Mutex::default(),
            vectors: Mutex::default(),
            msix: AtomicBool::new(true),
            pins: Mutex::default(),
            doorbells: Mutex::default(),
            refuse_doorbells: AtomicBool::new(false),
            watches: Mutex::default(),
            timers: Mutex::default(),
            counters: Mutex::default(),
            faults: Mutex::default(),
            logs: Mutex::default(),
            hold: Mutex::default(),
            requests: Mutex::default(),
            gathering: AtomicBool::new(false),
        }
    }

    /// The C struct that the plugin gets.
    pub(super) fn host(&'static self) -> vmm_abi::Host {
        vmm_abi::Host {
            ctx: std::ptr::from_ref(self).cast_mut().cast(),
            service,
        }
    }
}

/// The instance behind `ctx`.
///
/// # Safety
/// `ctx` is that of [`Instance::host`].
unsafe fn instance(ctx: *mut c_void) -> &'static Instance {
    // SAFETY: the caller's promise; instances are leaked.
    unsafe { &*ctx.cast() }
}

unsafe extern "C" fn service(_ctx: *mut c_void, name: Str) -> Iface {
    match text(&name) {
        MEMORY => offer(&MemoryTable { table }),
        IRQ => offer(&IrqTable {
            fd,
            raise,
            level,
            msix_enabled,
        }),
        EVENT => offer(&EventTable {
            doorbell,
            watch,
            unwatch,
            timer,
            clock,
        }),
        LOG => offer(&LogTable { max_level, log }),
        FAULT => offer(&FaultTable { report }),
        COUNTER => offer(&CounterTable { counter }),
        CONTROL => offer(&ControlTable { request }),
        STARTUP => offer(&StartupTable { hold, release }),
        THREAD => offer(&ThreadTable { gather }),
        NAME => offer(&NameTable { name: object_name }),
        _ => Iface::NONE,
    }
}

/// All are called the same.
unsafe extern "C" fn object_name(_: *mut c_void) -> Str {
    Str::new("test")
}

unsafe extern "C" fn gather(ctx: *mut c_void, on: u32) -> i32 {
    // SAFETY: as in `table`.
    let gathering = unsafe { &instance(ctx).gathering };
    gathering.store(on != 0, Ordering::Relaxed);
    0
}

unsafe extern "C" fn table(ctx: *mut c_void) -> *const MemTable {
    // SAFETY: the plugin passes the ctx it was given.
    unsafe { instance(ctx) }.shared.ram.table()
}

unsafe extern "C" fn fd(ctx: *mut c_void, vector: u32) -> i32 {
    // SAFETY: as in `table`.
    let mut vectors = lock(unsafe { &instance(ctx).vectors });
    match EventFd::new() {
        Ok(new) => vectors.entry(vector).or_insert(new).as_fd().as_raw_fd(),
        Err(_) => -libc::EMFILE,
    }
}

unsafe extern "C" fn raise(ctx: *mut c_void, vector: u32) -> i32 {
    // SAFETY: as in `table`.
    let code = unsafe { fd(ctx, vector) };
    if code < 0 {
        return code;
    }
    // SAFETY: as in `table`.
    if let Some(fd) = lock(unsafe { &instance(ctx).vectors }).get(&vector) {
        fd.signal();
    }
    0
}

unsafe extern "C" fn level(ctx: *mut c_void, pin: u32, high: u32) -> i32 {
    // SAFETY: as in `table`.
    let mut pins = lock(unsafe { &instance(ctx).pins });
    let record = pins.entry(pin).or_default();
    if high != 0 && !record.high {
        record.rises += 1;
    }
    record.high = high != 0;
    0
}

unsafe extern "C" fn msix_enabled(ctx: *mut c_void) -> i32 {
    // SAFETY: as in `table`.
    unsafe { instance(ctx) }.msix.load(Ordering::Relaxed).into()
}

unsafe extern "C" fn doorbell(
    ctx: *mut c_void,
    region: u32,
    offset: u64,
    width: u32,
    flags: u32,
    value: u64,
    fd: i32,
) -> i32 {
    // SAFETY: as in `table`.
    let instance = unsafe { instance(ctx) };
    if instance.refuse_doorbells.load(Ordering::Relaxed) {
        return -libc::ENOTSUP;
    }
    let value = (flags & DOORBELL_MATCH != 0).then_some(value);
    if flags & DOORBELL_END != 0 {
        let ended = Doorbell {
            region,
            offset,
            width,
            value,
        };
        let mut doorbells = lock(&instance.doorbells);
        let Some(at) = doorbells.iter().position(|(bell, _)| *bell == ended) else {
            return -libc::ENOENT;
        };
        doorbells.remove(at);
        return 0;
    }
    // SAFETY: the plugin passes an open descriptor.
    match unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned() {
        Ok(fd) => lock(&instance.doorbells).push((
            Doorbell {
                region,
                offset,
                width,
                value,
            },
            fd,
        )),
        Err(_) => return -libc::EBADF,
    }
    0
}

unsafe extern "C" fn watch(ctx: *mut c_void, fd: i32, events: u32, token: u64) -> i32 {
    // SAFETY: as in `table`.
    lock(unsafe { &instance(ctx).watches }).insert(token, (fd, events));
    0
}

unsafe extern "C" fn unwatch(ctx: *mut c_void, token: u64) -> i32 {
    // SAFETY: as in `table`.
    match lock(unsafe { &instance(ctx).watches }).remove(&token) {
        Some(_) => 0,
        None => -libc::ENOENT,
    }
}

unsafe extern "C" fn timer(ctx: *mut c_void, token: u64, deadline: u64) -> i32 {
    // SAFETY: as in `table`.
    let mut timers = lock(unsafe { &instance(ctx).timers });
    if deadline == u64::MAX {
        timers.remove(&token);
    } else {
        timers.insert(token, deadline);
    }
    0
}

unsafe extern "C" fn clock(ctx: *mut c_void) -> u64 {
    // SAFETY: as in `table`.
    now(unsafe { instance(ctx) }.shared.epoch)
}

unsafe extern "C" fn max_level(_ctx: *mut c_void) -> u32 {
    LOG_TRACE
}

unsafe extern "C" fn log(ctx: *mut c_void, level: u32, _target: Str, message: Str) {
    // SAFETY: as in `table`.
    lock(unsafe { &instance(ctx).logs }).push(format!("{level} {}", text(&message)));
}

unsafe extern "C" fn report(ctx: *mut c_void, method: Str, message: Str) {
    // SAFETY: as in `table`.
    lock(unsafe { &instance(ctx).faults }).push(format!("{}: {}", text(&method), text(&message)));
}

unsafe extern "C" fn counter(ctx: *mut c_void, name: Str) -> *mut u64 {
    // SAFETY: as in `table`.
    let mut counters = lock(unsafe { &instance(ctx).counters });
    let cell = counters
        .entry(text(&name).to_owned())
        .or_insert_with(|| Box::leak(Box::default()));
    cell.as_ptr()
}

unsafe extern "C" fn request(ctx: *mut c_void, what: u32, why: Str) -> i32 {
    // SAFETY: as in `table`.
    lock(unsafe { &instance(ctx).requests }).push((what, text(&why).to_owned()));
    0
}

unsafe extern "C" fn hold(ctx: *mut c_void, why: Str) -> i32 {
    // SAFETY: as in `table`.
    *lock(unsafe { &instance(ctx).hold }) = Some(text(&why).to_owned());
    0
}

unsafe extern "C" fn release(ctx: *mut c_void) {
    // SAFETY: as in `table`.
    *lock(unsafe { &instance(ctx).hold }) = None;
}

fn now(epoch: Instant) -> u64 {
    u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// One round of the I/O thread over all objects.
pub(super) fn poll(instances: &[&'static Instance], epoch: Instant, timeout: Duration) -> usize {
    let mut fds = Vec::new();
    let mut owners = Vec::new();
    let mut next = now(epoch).saturating_add(u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX));
    for instance in instances {
        for (&token, &(fd, events)) in lock(&instance.watches).iter() {
            // SAFETY: the object keeps a watched descriptor open.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            // The flags' width differs between systems; all that exist fit into the narrowest.
            let flags = PollFlags::from_bits_truncate(events.try_into().unwrap_or_default());
            fds.push(PollFd::from_borrowed_fd(fd, flags));
            owners.push((*instance, token));
        }
        next = lock(&instance.timers)
            .values()
            .copied()
            .fold(next, u64::min);
    }
    let wait = Duration::from_nanos(next.saturating_sub(now(epoch)));
    let wait = Timespec {
        tv_sec: wait.as_secs().cast_signed(),
        tv_nsec: wait.subsec_nanos().into(),
    };
    let _ = poll_fds(&mut fds, Some(&wait));
    let mut calls = 0;
    for (fd, (instance, token)) in fds.iter().zip(owners) {
        // An earlier call of this round may have ended the watch.
        if !fd.revents().is_empty() && lock(&instance.watches).contains_key(&token) {
            calls += instance.ready(token, fd.revents().bits() as u32);
        }
    }
    for instance in instances {
        let due =
            |timers: &BTreeMap<u64, u64>| timers.iter().find(|t| *t.1 <= now(epoch)).map(|t| *t.0);
        loop {
            let token = {
                let mut timers = lock(&instance.timers);
                let Some(token) = due(&timers) else { break };
                timers.remove(&token);
                token
            };
            calls += instance.ready(token, EVENT_TIMER);
        }
    }
    calls
}

impl Instance {
    fn ready(&self, token: u64, events: u32) -> usize {
        let object = lock(&self.object).upgrade();
        object.map_or(0, |object| object.ready(token, events))
    }

    /// The object is gone: nothing of it is polled any more.
    pub(super) fn forget(&self) {
        lock(&self.watches).clear();
        lock(&self.timers).clear();
        lock(&self.doorbells).clear();
    }
}

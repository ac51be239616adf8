//! The host as one object of a plugin sees it: the services' C functions and the state behind them.
//!
//! An instance lives as long as the process, since threads of its plugin may hold on to it. What it can do to the VM goes
//! through [`Shared`], which all objects have in common.

#![allow(unsafe_code)] // the C side of the services

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use log::Level;
use vmm_abi::device::EventsTable;
use vmm_abi::host::{
    CONTROL, COUNTER, ControlTable, CounterTable, DOORBELL_END, DOORBELL_MATCH, EVENT, EventTable,
    FAULT, FaultTable, IRQ, IrqTable, LOG, LogTable, MEMORY, MemTable, MemoryTable, NAME,
    NameTable, REQUEST_FAILURE, REQUEST_POWER_OFF, REQUEST_RESET, STARTUP, StartupTable, THREAD,
    ThreadTable,
};
use vmm_abi::{Host, Iface, LAYOUT_ABI_STABLE_0_11, Str};

use super::iothread;
use super::memory_table::MemoryRecord;
use super::wiring::SharedWiring;
use crate::config::OnFault;
use crate::hypervisor::gathering;
use crate::machine::power::{EventSender, VmEvent};

/// What all objects of a VM have in common.
pub struct Shared {
    /// Guest RAM.
    pub memory: MemoryRecord,
    /// Watches and timers.
    pub io: Arc<iothread::Shared>,
    /// Where requests and faults go.
    pub events: EventSender,
    /// What keeps the guest from starting.
    pub startup: Startup,
}

/// The holds that objects have on the start of the guest.
pub struct Startup {
    held: Mutex<BTreeMap<u64, String>>,
    /// Called when the last hold ends.
    released: Box<dyn Fn() + Send + Sync>,
}

impl Startup {
    /// No holds; `released` is called whenever the last of some ends, on the thread that ends it.
    pub fn new(released: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            held: Mutex::default(),
            released: Box::new(released),
        }
    }

    /// What the guest's start waits for.
    pub fn reasons(&self) -> Vec<String> {
        self.held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }
}

/// One device or backend.
pub struct Instance {
    number: u64,
    /// `dev.NAME` or `block_dev.NAME`.
    label: String,
    /// `plugin NAME VERSION`.
    plugin: String,
    on_fault: OnFault,
    shared: &'static Shared,
    /// The object's `this` and events table, once it exists.
    events: OnceLock<(usize, Option<&'static EventsTable>)>,
    wiring: OnceLock<SharedWiring>,
    failed: AtomicBool,
    counters: Mutex<BTreeMap<String, &'static AtomicU64>>,
    /// The counter of interrupts: pins that were raised, and vectors by a call of the host.
    interrupts: &'static AtomicU64,
}

impl Instance {
    /// A new one, for the life of the process.
    pub fn new(
        label: String,
        plugin: String,
        on_fault: OnFault,
        shared: &'static Shared,
    ) -> &'static Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let interrupts: &'static AtomicU64 = Box::leak(Box::default());
        let counters = BTreeMap::from([("interrupts".to_owned(), interrupts)]);
        Box::leak(Box::new(Self {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            label,
            plugin,
            on_fault,
            shared,
            events: OnceLock::new(),
            wiring: OnceLock::new(),
            failed: AtomicBool::new(false),
            counters: Mutex::new(counters),
            interrupts,
        }))
    }

    /// What the plugin is given.
    pub fn host(&'static self) -> &'static Host {
        let ctx = std::ptr::from_ref(self).cast_mut().cast();
        Box::leak(Box::new(Host { ctx, service }))
    }

    /// `dev.NAME` or the like.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Whether the object has reported a fault.
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Whether the VM goes on after the fault that the object has reported.
    pub(super) fn goes_on(&self) -> bool {
        self.failed() && matches!(self.on_fault, OnFault::Fail)
    }

    /// The object exists: it can be called from now on.
    pub(super) fn attach(&'static self, this: *mut c_void, events: Option<&'static EventsTable>) {
        let _ = self.events.set((this as usize, events));
        self.shared.io.add(self.number, self);
    }

    /// The device has its place in the machine.
    pub fn connect(&self, wiring: SharedWiring) {
        let _ = self.wiring.set(wiring);
    }

    /// The object is about to be released: it is not called any more.
    pub(super) fn detach(&self) {
        self.shared.io.forget(self.number);
        self.release_start();
    }

    /// Calls the object's `ready`. I/O thread.
    pub(super) fn ready(&self, token: u64, events: u32) {
        if let Some((this, Some(table))) = self.events.get() {
            // SAFETY: a call by the table's contract; the I/O thread never calls an object after `detach`.
            unsafe { (table.ready)(*this as *mut c_void, token, events) };
        }
    }

    /// The counter `name`: the same for the same name, 0 at first.
    pub(super) fn counter(&self, name: &str) -> &'static AtomicU64 {
        let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        counters
            .entry(name.to_owned())
            .or_insert_with(|| Box::leak(Box::default()))
    }

    /// Name and value of each counter of the object, in order of name.
    pub fn counters(&self) -> Vec<(String, u64)> {
        let counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        counters
            .iter()
            .map(|(name, cell)| (name.clone(), cell.load(Ordering::Relaxed)))
            .collect()
    }

    fn fault(&self, method: &str, text: &str) {
        if self.failed.swap(true, Ordering::AcqRel) {
            return;
        }
        // Here and not by whoever stops the VM: while it is created or ended, nobody waits for events.
        log::error!("{}, {}, in {method}: {text}", self.plugin, self.label);
        if self.events.get().is_none() {
            // Creation fails, and reports so itself.
            return;
        }
        match self.on_fault {
            OnFault::Stop => (self.shared.events)(VmEvent::Fault {
                text: format!("{} has failed", self.label),
            }),
            OnFault::Fail => {
                log::warn!(
                    "{} has failed: the guest goes on without it (on_fault = \"fail\")",
                    self.label
                );
                if let Some(wiring) = self.wiring.get() {
                    // A dead device must not hold an interrupt line that others share; one without pins has none to release.
                    let _ = wiring.level(0, false);
                }
            }
        }
        self.release_start();
    }

    fn release_start(&self) {
        let startup = &self.shared.startup;
        let mut held = startup.held.lock().unwrap_or_else(PoisonError::into_inner);
        let last = held.remove(&self.number).is_some() && held.is_empty();
        drop(held);
        if last {
            (startup.released)();
        }
    }

    /// Logs `error` and turns it into `-errno`.
    fn refuse(&self, error: &anyhow::Error) -> i32 {
        log::debug!("{}: {error:#}", self.label);
        -error
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::raw_os_error)
            .unwrap_or(libc::EINVAL)
    }
}

/// The text that `s` borrows; text that is not UTF-8 reads as empty.
pub(super) fn text<'a>(s: &Str) -> &'a str {
    if s.len == 0 || s.ptr.is_null() {
        return "";
    }
    // SAFETY: the ABI promises `len` bytes for the call that this was passed to.
    std::str::from_utf8(unsafe { std::slice::from_raw_parts(s.ptr, s.len) }).unwrap_or("")
}

/// A log level of the ABI.
pub(super) fn level(level: u32) -> Level {
    match level {
        0 | 1 => Level::Error,
        2 => Level::Warn,
        3 => Level::Info,
        4 => Level::Debug,
        _ => Level::Trace,
    }
}

/// `table` as a plugin is told of it, with the record by which the plugin may check it.
pub(super) fn offer<T: abi_stable::StableAbi>(table: &'static T) -> Iface {
    Iface {
        table: std::ptr::from_ref(table).cast(),
        layout: std::ptr::from_ref(T::LAYOUT).cast(),
        layout_kind: LAYOUT_ABI_STABLE_0_11,
    }
}

unsafe extern "C" fn service(_ctx: *mut c_void, name: Str) -> Iface {
    match text(&name) {
        MEMORY => offer(&MemoryTable { table: memory }),
        IRQ => offer(&IrqTable {
            fd: irq_fd,
            raise: irq_raise,
            level: irq_level,
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
        NAME => offer(&NameTable { name: label }),
        _ => Iface::NONE,
    }
}

/// The instance behind `ctx`.
///
/// # Safety
/// `ctx` is that of [`Instance::host`], as the ABI asks of every caller.
unsafe fn instance(ctx: *mut c_void) -> &'static Instance {
    // SAFETY: the caller's promise; instances are never freed.
    unsafe { &*ctx.cast() }
}

unsafe extern "C" fn memory(ctx: *mut c_void) -> *const MemTable {
    // SAFETY: plugins pass the ctx they were given.
    unsafe { instance(ctx) }.shared.memory.table()
}

unsafe extern "C" fn label(ctx: *mut c_void) -> Str {
    // SAFETY: plugins pass the ctx they were given.
    Str::new(unsafe { instance(ctx) }.label())
}

/// Runs `f` with the device's wiring.
///
/// # Safety
/// As [`instance`].
unsafe fn wired(ctx: *mut c_void, f: impl FnOnce(&SharedWiring) -> anyhow::Result<i32>) -> i32 {
    // SAFETY: the caller's promise.
    let instance = unsafe { instance(ctx) };
    match instance.wiring.get() {
        None => -libc::ENODEV,
        Some(wiring) => f(wiring).unwrap_or_else(|error| instance.refuse(&error)),
    }
}

unsafe extern "C" fn gather(_ctx: *mut c_void, on: u32) -> i32 {
    match gathering::set(on != 0) {
        Ok(true) => 0,
        Ok(false) => -libc::ENOTSUP,
        Err(error) => -error.raw_os_error().unwrap_or(libc::EINVAL),
    }
}

unsafe extern "C" fn irq_fd(ctx: *mut c_void, vector: u32) -> i32 {
    // SAFETY: as in `memory`.
    unsafe { wired(ctx, |w| w.msix_fd(vector)) }
}

unsafe extern "C" fn irq_raise(ctx: *mut c_void, vector: u32) -> i32 {
    // SAFETY: as in `memory`.
    unsafe {
        instance(ctx).interrupts.fetch_add(1, Ordering::Relaxed);
        wired(ctx, |w| w.raise(vector).map(|()| 0))
    }
}

unsafe extern "C" fn irq_level(ctx: *mut c_void, pin: u32, high: u32) -> i32 {
    // SAFETY: as in `memory`.
    unsafe {
        let raised = u64::from(high != 0);
        instance(ctx)
            .interrupts
            .fetch_add(raised, Ordering::Relaxed);
        wired(ctx, |w| w.level(pin, high != 0).map(|()| 0))
    }
}

unsafe extern "C" fn msix_enabled(ctx: *mut c_void) -> i32 {
    // SAFETY: as in `memory`.
    unsafe { wired(ctx, |w| Ok(i32::from(w.msix_enabled()))) }
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
    let (Ok(width @ (0 | 1 | 2 | 4 | 8)), true) = (u8::try_from(width), fd >= 0) else {
        return -libc::EINVAL;
    };
    let value = (flags & DOORBELL_MATCH != 0).then_some(value);
    if flags & DOORBELL_END != 0 {
        // SAFETY: as in `memory`.
        return unsafe {
            wired(ctx, |w| {
                w.end_doorbell(region, offset, width, value).map(|()| 0)
            })
        };
    }
    // SAFETY: as in `memory`; the plugin passes a descriptor that is open for this call.
    unsafe {
        let fd = BorrowedFd::borrow_raw(fd);
        wired(ctx, |w| {
            Ok(if w.doorbell(region, offset, width, value, fd)? {
                0
            } else {
                -libc::ENOTSUP
            })
        })
    }
}

unsafe extern "C" fn watch(ctx: *mut c_void, fd: i32, events: u32, token: u64) -> i32 {
    // SAFETY: as in `memory`.
    let instance = unsafe { instance(ctx) };
    if fd < 0 {
        return -libc::EBADF;
    }
    // SAFETY: the plugin passes a descriptor that is open for this call.
    match unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned() {
        Ok(fd) => {
            instance.shared.io.watch(instance.number, token, fd, events);
            0
        }
        Err(error) => -error.raw_os_error().unwrap_or(libc::EBADF),
    }
}

unsafe extern "C" fn unwatch(ctx: *mut c_void, token: u64) -> i32 {
    // SAFETY: as in `memory`.
    let instance = unsafe { instance(ctx) };
    if instance.shared.io.unwatch(instance.number, token) {
        0
    } else {
        -libc::ENOENT
    }
}

unsafe extern "C" fn timer(ctx: *mut c_void, token: u64, deadline: u64) -> i32 {
    // SAFETY: as in `memory`.
    let instance = unsafe { instance(ctx) };
    instance.shared.io.timer(instance.number, token, deadline);
    0
}

unsafe extern "C" fn clock(ctx: *mut c_void) -> u64 {
    // SAFETY: as in `memory`.
    unsafe { instance(ctx) }.shared.io.clock()
}

pub(super) unsafe extern "C" fn max_level(_ctx: *mut c_void) -> u32 {
    log::max_level() as u32
}

unsafe extern "C" fn log(ctx: *mut c_void, severity: u32, _target: Str, message: Str) {
    // SAFETY: as in `memory`.
    let instance = unsafe { instance(ctx) };
    log::log!(level(severity), "{}: {}", instance.label, text(&message));
}

unsafe extern "C" fn report(ctx: *mut c_void, method: Str, message: Str) {
    // SAFETY: as in `memory`.
    unsafe { instance(ctx) }.fault(text(&method), text(&message));
}

unsafe extern "C" fn counter(ctx: *mut c_void, name: Str) -> *mut u64 {
    // SAFETY: as in `memory`.
    unsafe { instance(ctx) }.counter(text(&name)).as_ptr()
}

unsafe extern "C" fn request(ctx: *mut c_void, what: u32, why: Str) -> i32 {
    // SAFETY: as in `memory`.
    let instance = unsafe { instance(ctx) };
    let why = format!("{}: {}", instance.label, text(&why));
    let event = match what {
        REQUEST_RESET => VmEvent::Reset,
        REQUEST_POWER_OFF => VmEvent::PowerOff,
        // Whoever ends the VM says why.
        REQUEST_FAILURE => VmEvent::Failure { text: why.clone() },
        _ => return -libc::ENOTSUP,
    };
    if what != REQUEST_FAILURE {
        log::info!("{why}");
    }
    (instance.shared.events)(event);
    0
}

unsafe extern "C" fn hold(ctx: *mut c_void, why: Str) -> i32 {
    // SAFETY: as in `memory`.
    let instance = unsafe { instance(ctx) };
    if instance.events.get().is_some() {
        // The guest may be running already.
        return -libc::EBUSY;
    }
    let mut held = instance
        .shared
        .startup
        .held
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    held.insert(instance.number, text(&why).to_owned());
    0
}

unsafe extern "C" fn release(ctx: *mut c_void) {
    // SAFETY: as in `memory`.
    unsafe { instance(ctx) }.release_start();
}

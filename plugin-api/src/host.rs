//! The host as one device or backend sees it.

#![allow(unsafe_code)] // calls the host's tables

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, bail};
use vmm_abi::Str;
use vmm_abi::device::{EVENT_ERROR, EVENT_HANGUP, EVENT_READ, EVENT_TIMER, EVENT_WRITE};
use vmm_abi::host::{
    self as abi, ControlTable, CounterTable, EventTable, FaultTable, IrqTable, LogTable,
    MemoryTable, NameTable, StartupTable, ThreadTable,
};

use crate::iface::service;
use crate::{GuestMemory, Result};

/// The services of the host, for one object. Cheap to clone; usable on any thread until the object is dropped.
#[derive(Clone)]
pub struct Host(Arc<Instance>);

struct Instance {
    raw: vmm_abi::Host,
    dead: AtomicBool,
    memory: Option<&'static MemoryTable>,
    irq: Option<&'static IrqTable>,
    event: Option<&'static EventTable>,
    log: Option<&'static LogTable>,
    fault: Option<&'static FaultTable>,
    counter: Option<&'static CounterTable>,
    control: Option<&'static ControlTable>,
    startup: Option<&'static StartupTable>,
    thread: Option<&'static ThreadTable>,
    name: Option<&'static NameTable>,
}

// SAFETY: the ABI allows host services to be called from any thread; `raw` is never changed.
unsafe impl Send for Instance {}
// SAFETY: as above.
unsafe impl Sync for Instance {}

/// A guest write that only signals an eventfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Region id.
    pub region: u32,
    /// Offset in it.
    pub offset: u64,
    /// Access width in bytes, 0 for any.
    pub width: u32,
    /// Only this value signals; `None` takes every value.
    pub value: Option<u64>,
}

/// Readiness of a descriptor, or a timer's expiry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Events(pub u32);

impl Events {
    /// Data can be read.
    pub const READ: Self = Self(EVENT_READ);
    /// Data can be written.
    pub const WRITE: Self = Self(EVENT_WRITE);

    /// Data can be read, or the other end is gone, which a read then tells.
    #[must_use]
    pub fn readable(self) -> bool {
        self.0 & (EVENT_READ | EVENT_HANGUP | EVENT_ERROR) != 0
    }

    /// Data can be written.
    #[must_use]
    pub fn writable(self) -> bool {
        self.0 & EVENT_WRITE != 0
    }

    /// Error, or the other end is gone.
    #[must_use]
    pub fn hangup(self) -> bool {
        self.0 & (EVENT_HANGUP | EVENT_ERROR) != 0
    }

    /// The timer of this token has expired.
    #[must_use]
    pub fn timer(self) -> bool {
        self.0 & EVENT_TIMER != 0
    }
}

impl std::ops::BitOr for Events {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// One MSI-X vector as a descriptor: raising it is one write, without a call into the host.
#[derive(Clone, Copy, Debug)]
pub struct Interrupt(BorrowedFd<'static>, Counter);

impl Interrupt {
    /// Raises the interrupt, and counts it in the object's counter `interrupts`. Any thread.
    pub fn raise(&self) {
        self.1.add(1);
        crate::eventfd::signal(self.0);
    }
}

/// A number that the host shows beside the object's name. Adding is one relaxed atomic instruction.
#[derive(Clone, Copy, Debug)]
pub struct Counter(&'static AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The present value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Turns `-errno` into an error, other values into themselves.
fn check(code: i32, what: &str) -> Result<i32> {
    if code < 0 {
        return Err(std::io::Error::from_raw_os_error(-code))
            .with_context(|| format!("the host refuses {what}"));
    }
    Ok(code)
}

impl Host {
    /// Takes the services that `raw` offers.
    ///
    /// # Safety
    /// `raw` is what the host passed to create: valid for the life of the process.
    pub(crate) unsafe fn new(raw: vmm_abi::Host) -> Self {
        Self(Arc::new(Instance {
            dead: AtomicBool::new(false),
            memory: service(&raw, abi::MEMORY),
            irq: service(&raw, abi::IRQ),
            event: service(&raw, abi::EVENT),
            log: service(&raw, abi::LOG),
            fault: service(&raw, abi::FAULT),
            counter: service(&raw, abi::COUNTER),
            control: service(&raw, abi::CONTROL),
            startup: service(&raw, abi::STARTUP),
            thread: service(&raw, abi::THREAD),
            name: service(&raw, abi::NAME),
            raw,
        }))
    }

    /// Guest RAM. From create on.
    ///
    /// # Errors
    /// The host has none, as when it only inspects the plugin.
    pub fn memory(&self) -> Result<GuestMemory> {
        let table = self.0.memory.context("this host lends no guest memory")?;
        // SAFETY: the ABI says that the table is never null and never changes.
        let table = unsafe { (table.table)(self.0.raw.ctx).as_ref() };
        Ok(GuestMemory::new(
            table.context("this host has no guest memory table")?,
        ))
    }

    /// MSI-X vector `vector` as a descriptor. From start on.
    ///
    /// # Errors
    /// The function has no such vector.
    pub fn interrupt(&self, vector: u32) -> Result<Interrupt> {
        let irq = self.irq()?;
        // SAFETY: a call by the table's contract.
        let fd = check(
            unsafe { (irq.fd)(self.0.raw.ctx, vector) },
            &format!("MSI-X vector {vector}"),
        )?;
        // SAFETY: the host keeps the descriptor open for the object's life.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        Ok(Interrupt(fd, self.counter("interrupts")))
    }

    /// Drives an interrupt pin: an index into the description's pins, 0 for a PCI function's INTx. From start on, any thread.
    pub fn set_pin(&self, pin: u32, high: bool) {
        if let Some(irq) = self.0.irq {
            // SAFETY: a call by the table's contract.
            let code = unsafe { (irq.level)(self.0.raw.ctx, pin, u32::from(high)) };
            if code < 0 {
                log::error!(
                    "the host has no interrupt pin {pin} for this device (error {})",
                    -code
                );
            }
        }
    }

    /// Whether the guest has enabled MSI-X; otherwise the function has to use its INTx pin. From start on, any thread.
    #[must_use]
    pub fn msix_enabled(&self) -> bool {
        // SAFETY: a call by the table's contract.
        self.0
            .irq
            .is_some_and(|irq| unsafe { (irq.msix_enabled)(self.0.raw.ctx) } > 0)
    }

    fn irq(&self) -> Result<&'static IrqTable> {
        self.0.irq.context("this host offers no interrupts")
    }

    fn event(&self) -> Result<&'static EventTable> {
        self.0.event.context("this host offers no events")
    }

    /// Binds a doorbell to `fd`, until [`Host::end_doorbell`] or for the life of the object. From start on, any thread. `Ok(false)`: not on this machine; the write
    /// arrives in [`crate::Device::write`], which a device must handle in any case.
    ///
    /// # Errors
    /// The host refuses it: no such region, address taken, out of resources.
    pub fn doorbell(&self, bell: Doorbell, fd: BorrowedFd<'_>) -> Result<bool> {
        let code = self.call_doorbell(bell, 0, fd)?;
        if code == -libc::ENOTSUP {
            return Ok(false);
        }
        check(
            code,
            &format!(
                "a doorbell at offset {:#x} of region {}",
                bell.offset, bell.region
            ),
        )?;
        Ok(true)
    }

    /// Ends the binding of a doorbell to `fd`: writes arrive in [`crate::Device::write`] again. One under way on a vCPU may still signal.
    ///
    /// # Errors
    /// It is not bound.
    pub fn end_doorbell(&self, bell: Doorbell, fd: BorrowedFd<'_>) -> Result<()> {
        let code = self.call_doorbell(bell, abi::DOORBELL_END, fd)?;
        check(
            code,
            &format!(
                "to end the doorbell at offset {:#x} of region {}",
                bell.offset, bell.region
            ),
        )?;
        Ok(())
    }

    fn call_doorbell(&self, bell: Doorbell, flags: u32, fd: BorrowedFd<'_>) -> Result<i32> {
        let event = self.event()?;
        let matching = if bell.value.is_some() {
            abi::DOORBELL_MATCH
        } else {
            0
        };
        let value = bell.value.unwrap_or(0);
        // SAFETY: a call by the table's contract.
        Ok(unsafe {
            (event.doorbell)(
                self.0.raw.ctx,
                bell.region,
                bell.offset,
                bell.width,
                flags | matching,
                value,
                fd.as_raw_fd(),
            )
        })
    }

    /// Calls the object's `ready` with `token` on the I/O thread for as long as `fd` is ready for `events`. Replaces an
    /// earlier watch of that token. The object keeps `fd` open until it has called [`Host::unwatch`].
    ///
    /// # Errors
    /// The host refuses it.
    pub fn watch(&self, fd: BorrowedFd<'_>, events: Events, token: u64) -> Result<()> {
        let event = self.event()?;
        // SAFETY: a call by the table's contract.
        let code = unsafe { (event.watch)(self.0.raw.ctx, fd.as_raw_fd(), events.0, token) };
        check(code, "to watch a descriptor")?;
        Ok(())
    }

    /// Ends a watch. On the I/O thread, no `ready` of this token follows; from another thread, one may be under way.
    pub fn unwatch(&self, token: u64) {
        if let Some(event) = self.0.event {
            // SAFETY: a call by the table's contract. An unknown token is no error for the caller: the watch is not there.
            unsafe { (event.unwatch)(self.0.raw.ctx, token) };
        }
    }

    /// Calls the object's `ready` with `token` once at `deadline` (nanoseconds of [`Host::clock`]); `None` cancels.
    ///
    /// # Errors
    /// The host refuses it.
    pub fn timer(&self, token: u64, deadline: Option<u64>) -> Result<()> {
        let event = self.event()?;
        let deadline = deadline.unwrap_or(u64::MAX);
        // SAFETY: a call by the table's contract.
        let code = unsafe { (event.timer)(self.0.raw.ctx, token, deadline) };
        check(code, "a timer")?;
        Ok(())
    }

    /// Monotonic nanoseconds.
    #[must_use]
    pub fn clock(&self) -> u64 {
        // SAFETY: a call by the table's contract.
        self.0
            .event
            .map_or(0, |event| unsafe { (event.clock)(self.0.raw.ctx) })
    }

    /// The object's counter `name`, which the host shows with the others of the object. Names that differ in digits behind a
    /// slash are one histogram: `latency/14` counts what took less than 2^14 nanoseconds and not less than 2^13. Block
    /// backends have counters without asking (`reads`, `read_bytes`, `writes`, `write_bytes`, `flushes`, `discards`,
    /// `write_zeroes`, `errors`, `latency`), devices `interrupts`. A host without counters gives one that nobody reads.
    #[must_use]
    pub fn counter(&self, name: &str) -> Counter {
        // SAFETY: a call by the table's contract; the cell is valid for the life of the process and only accessed atomically.
        let cell = self.0.counter.and_then(|table| unsafe {
            (table.counter)(self.0.raw.ctx, Str::new(name))
                .cast::<AtomicU64>()
                .as_ref()
        });
        Counter(cell.unwrap_or_else(|| Box::leak(Box::default())))
    }

    /// Asks the host to reset the machine; returns at once.
    pub fn request_reset(&self, why: &str) {
        self.request(abi::REQUEST_RESET, why);
    }

    /// Asks the host to switch the machine off; returns at once.
    pub fn request_power_off(&self, why: &str) {
        self.request(abi::REQUEST_POWER_OFF, why);
    }

    /// Asks the host to end the VM as failed, because the guest is beyond help; returns at once.
    pub fn request_failure(&self, why: &str) {
        self.request(abi::REQUEST_FAILURE, why);
    }

    fn request(&self, what: u32, why: &str) {
        if let Some(control) = self.0.control {
            // SAFETY: a call by the table's contract.
            let code = unsafe { (control.request)(self.0.raw.ctx, what, Str::new(why)) };
            if code < 0 {
                log::error!("the host refuses request {what} ({why}): error {}", -code);
            }
        }
    }

    /// Keeps the guest from starting until [`Host::release_startup`]. During create only.
    ///
    /// # Errors
    /// The host can't wait.
    pub fn hold_startup(&self, why: &str) -> Result<()> {
        let Some(startup) = self.0.startup else {
            bail!("this host can't wait for {why}")
        };
        // SAFETY: a call by the table's contract.
        let code = unsafe { (startup.hold)(self.0.raw.ctx, Str::new(why)) };
        check(code, &format!("to wait for {why}"))?;
        Ok(())
    }

    /// Lets the guest start. Any thread, any number of times.
    pub fn release_startup(&self) {
        if let Some(startup) = self.0.startup {
            // SAFETY: a call by the table's contract.
            unsafe { (startup.release)(self.0.raw.ctx) };
        }
    }

    /// Whether a wake-up of the calling thread, which the object has started, may interrupt others: as `vmm.host.thread/1` says. False:
    /// not on this machine. [`crate::Pace`] knows when it pays.
    pub fn gather(&self, on: bool) -> bool {
        // SAFETY: a call by the table's contract.
        self.0
            .thread
            .is_some_and(|table| unsafe { (table.gather)(self.0.raw.ctx, u32::from(on)) } == 0)
    }

    /// The name of the object's table in the VM file, such as `block_dev.root`; empty if the host does not tell.
    #[must_use]
    pub fn name(&self) -> &'static str {
        let Some(table) = self.0.name else {
            return "";
        };
        // SAFETY: a call by the table's contract.
        let name = unsafe { (table.name)(self.0.raw.ctx) };
        if name.len == 0 {
            return "";
        }
        // SAFETY: the table promises text that is valid for the life of the process.
        let bytes = unsafe { std::slice::from_raw_parts(name.ptr, name.len) };
        std::str::from_utf8(bytes).unwrap_or("")
    }

    /// Logs under the object's own name. The `log` macros work as well, but only say which plugin speaks.
    pub fn log(&self, level: log::Level, message: std::fmt::Arguments<'_>) {
        if level <= log::max_level()
            && let Some(log) = self.0.log
        {
            let text = message.to_string();
            // SAFETY: a call by the table's contract.
            unsafe { (log.log)(self.0.raw.ctx, level as u32, Str::new(""), Str::new(&text)) };
        }
    }

    /// Reports that the object has failed for good. From now on its methods are not called any more: reads give all
    /// ones, requests fail. The host follows the device's `on_fault`.
    pub fn fault(&self, method: &str, text: &str) {
        if self.0.dead.swap(true, Ordering::AcqRel) {
            return;
        }
        match self.0.fault {
            // SAFETY: a call by the table's contract.
            Some(fault) => unsafe {
                (fault.report)(self.0.raw.ctx, Str::new(method), Str::new(text))
            },
            None => log::error!("{method}: {text}"),
        }
    }

    /// Whether the object has failed. Threads of the object end when they see it.
    #[inline]
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.0.dead.load(Ordering::Acquire)
    }

    /// Starts a thread of the object. A panic in it is reported as a fault in `name`, which is also the thread's name (15 bytes show).
    ///
    /// # Errors
    /// The system is out of threads.
    pub fn spawn(
        &self,
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<std::thread::JoinHandle<()>> {
        let (host, method) = (self.clone(), format!("thread {name}"));
        std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(256 << 10)
            .spawn(move || crate::guard::call(&host, &method, (), body))
    }
}

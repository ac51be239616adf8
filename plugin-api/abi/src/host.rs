//! What the host lends a plugin. Every function may be called from any thread, from create until release returns,
//! unless its doc says otherwise; `ctx` is that of the [`crate::Host`] the plugin was given.

use core::ffi::c_void;

use crate::Str;

/// Service name of [`MemoryTable`].
pub const MEMORY: &str = "vmm.host.memory/1";
/// Service name of [`IrqTable`].
pub const IRQ: &str = "vmm.host.irq/1";
/// Service name of [`EventTable`].
pub const EVENT: &str = "vmm.host.event/1";
/// Service name of [`LogTable`].
pub const LOG: &str = "vmm.host.log/1";
/// Service name of [`FaultTable`].
pub const FAULT: &str = "vmm.host.fault/1";
/// Service name of [`CounterTable`].
pub const COUNTER: &str = "vmm.host.counter/1";
/// Service name of [`ControlTable`].
pub const CONTROL: &str = "vmm.host.control/1";
/// Service name of [`StartupTable`].
pub const STARTUP: &str = "vmm.host.startup/1";
/// Service name of [`ThreadTable`].
pub const THREAD: &str = "vmm.host.thread/1";
/// Service name of [`NameTable`].
pub const NAME: &str = "vmm.host.name/1";

/// [`LogTable`] level: something failed.
pub const LOG_ERROR: u32 = 1;
/// [`LogTable`] level: something is odd.
pub const LOG_WARN: u32 = 2;
/// [`LogTable`] level: what an operator wants to know.
pub const LOG_INFO: u32 = 3;
/// [`LogTable`] level: what a developer wants to know.
pub const LOG_DEBUG: u32 = 4;
/// [`LogTable`] level: everything.
pub const LOG_TRACE: u32 = 5;

/// [`EventTable::doorbell`] flag: only writes of `value` signal.
pub const DOORBELL_MATCH: u32 = 1;
/// [`EventTable::doorbell`] flag: end the binding of the same region, offset, width and match.
pub const DOORBELL_END: u32 = 2;

/// [`ControlTable::request`]: reset the machine.
pub const REQUEST_RESET: u32 = 1;
/// [`ControlTable::request`]: switch it off, as if the guest had.
pub const REQUEST_POWER_OFF: u32 = 2;
/// [`ControlTable::request`]: end the VM as failed, because the guest is beyond help.
pub const REQUEST_FAILURE: u32 = 3;

/// One range of guest RAM, mapped into this process. Another process can map the same by `fd` and `fd_offset`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct MemRegion {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Where it is mapped here, readable and writable. The guest changes it at any time: only volatile or atomic access.
    pub host: *mut u8,
    /// Offset in `fd`.
    pub fd_offset: u64,
    /// File that backs it, or -1 where no file does: memory is private to this process unless the VM file says otherwise.
    pub fd: i32,
    /// Unused, zero.
    pub reserved: u32,
    /// One bit per 4 KiB page, lowest bit first, to be set atomically by whoever writes to the page while
    /// [`MemTable::tracking`] is not zero; `len / 4096` bits rounded up to whole words.
    pub dirty: *mut u64,
}

/// All guest RAM, sorted by address. The same for the life of the process.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct MemTable {
    /// The ranges.
    pub regions: *const MemRegion,
    /// How many.
    pub count: usize,
    /// Read atomically: not zero while pages written must be marked in the `dirty` bitmaps.
    pub tracking: *const u32,
}

/// `vmm.host.memory/1`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct MemoryTable {
    /// The table of guest RAM; never null, never changes.
    pub table: unsafe extern "C" fn(ctx: *mut c_void) -> *const MemTable,
}

/// `vmm.host.irq/1`. State: from start on.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct IrqTable {
    /// An eventfd; each count written to it is MSI-X vector `vector`. Borrowed, valid until release. While the guest masks
    /// the vector the count waits in it as the pending bit. `-errno`: no such vector.
    pub fd: unsafe extern "C" fn(ctx: *mut c_void, vector: u32) -> i32,
    /// Raises MSI-X vector `vector` once.
    pub raise: unsafe extern "C" fn(ctx: *mut c_void, vector: u32) -> i32,
    /// Drives pin `pin` (a PCI function's INTx is pin 0) high (1) or low (0).
    pub level: unsafe extern "C" fn(ctx: *mut c_void, pin: u32, high: u32) -> i32,
    /// Whether the guest has enabled MSI-X (1) or the function has to use INTx (0).
    pub msix_enabled: unsafe extern "C" fn(ctx: *mut c_void) -> i32,
}

/// `vmm.host.event/1`. State: from start on; a backend may use watches and timers from create on.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct EventTable {
    /// Binds guest writes of `width` bytes (0: any width) at `offset` of region `region` to eventfd `fd`: such a write adds 1
    /// to it and never reaches `vmm.io/1`. Lasts until release, or until a call with `DOORBELL_END`, after which writes reach
    /// `vmm.io/1` again. `-ENOTSUP`: not on this machine; the write arrives at `vmm.io/1`, which a device must handle in
    /// any case. Other `-errno`: refused, or no such binding to end.
    pub doorbell: unsafe extern "C" fn(
        ctx: *mut c_void,
        region: u32,
        offset: u64,
        width: u32,
        flags: u32,
        value: u64,
        fd: i32,
    ) -> i32,
    /// Calls `vmm.events/1` with `token` whenever `fd` is ready for `events` (`EVENT_*`), again and again for as long as
    /// it is. A second watch of the same token replaces the first. The object keeps `fd` open while it is watched.
    pub watch: unsafe extern "C" fn(ctx: *mut c_void, fd: i32, events: u32, token: u64) -> i32,
    /// Ends a watch. When called on the I/O thread no further `ready` of this token comes; from elsewhere one may be under way.
    pub unwatch: unsafe extern "C" fn(ctx: *mut c_void, token: u64) -> i32,
    /// Calls `vmm.events/1` with `token` and `EVENT_TIMER` once at `deadline` on `clock`'s scale; replaces an earlier deadline
    /// of that token; `u64::MAX` cancels.
    pub timer: unsafe extern "C" fn(ctx: *mut c_void, token: u64, deadline: u64) -> i32,
    /// Nanoseconds, monotonic.
    pub clock: unsafe extern "C" fn(ctx: *mut c_void) -> u64,
}

/// `vmm.host.log/1`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct LogTable {
    /// The most detailed `LOG_*` level that anybody reads now; 0 for none.
    pub max_level: unsafe extern "C" fn(ctx: *mut c_void) -> u32,
    /// Writes one message. The host adds the name of the device or plugin.
    pub log: unsafe extern "C" fn(ctx: *mut c_void, level: u32, target: Str, text: Str),
}

/// `vmm.host.fault/1`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct FaultTable {
    /// The object has failed for good, in `method`, as `text` says (with place in the source). The host logs it with the
    /// plugin's and the device's names and follows `on_fault`.
    pub report: unsafe extern "C" fn(ctx: *mut c_void, method: Str, text: Str),
}

/// `vmm.host.counter/1`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct CounterTable {
    /// A counter of this object: 8 aligned bytes, added to atomically by the plugin, read by the host, valid for the life
    /// of the process. The same name gives the same counter.
    pub counter: unsafe extern "C" fn(ctx: *mut c_void, name: Str) -> *mut u64,
}

/// `vmm.host.control/1`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct ControlTable {
    /// Asks for `REQUEST_*`; `why` goes to the log. Returns at once, before it happens.
    pub request: unsafe extern "C" fn(ctx: *mut c_void, what: u32, why: Str) -> i32,
}

/// `vmm.host.startup/1`: lets an object keep the guest from starting, for example until a console client has come.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct StartupTable {
    /// No vCPU runs until [`StartupTable::release`]. During create only; at most once. `why` goes to the log.
    pub hold: unsafe extern "C" fn(ctx: *mut c_void, why: Str) -> i32,
    /// Ends the hold; without one, does nothing.
    pub release: unsafe extern "C" fn(ctx: *mut c_void),
}

/// `vmm.host.thread/1`: how the system schedules the thread that calls. For threads that the plugin has started.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct ThreadTable {
    /// `on` 1: a wake-up of the calling thread interrupts nobody: if no processor is free, the thread runs when one is, or when
    /// its turn comes. So what wakes it, a virtual CPU that has rung a doorbell, goes on and leaves more work behind. 0: as a
    /// thread is at first. Returns `-ENOTSUP`, and changes nothing, where the system knows no such difference or the operator
    /// has chosen how the process is scheduled.
    pub gather: unsafe extern "C" fn(ctx: *mut c_void, on: u32) -> i32,
}

/// `vmm.host.name/1`: what the operator calls the object, for messages and probes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct NameTable {
    /// The name of its table in the VM file, such as `block_dev.root`. Valid for the life of the process.
    pub name: unsafe extern "C" fn(ctx: *mut c_void) -> Str,
}

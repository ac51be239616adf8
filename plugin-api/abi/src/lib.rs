//! The C-layout tables between vmm-host and its plugins, and nothing else.
//!
//! A plugin is a shared object that exports one static, [`Root`], under the name [`ROOT_SYMBOL`], and carries its
//! manifest (TOML text) in the ELF section [`MANIFEST_SECTION`]. The host calls [`Root::init`] once and
//! [`Root::create`] for each device or backend; what it gets is an [`Obj`]. Both sides then ask each other for
//! *interfaces by name*: the host asks the object for `vmm.io/1`, the plugin asks [`Host::service`] for
//! `vmm.host.irq/1`. A name stands for one table for ever; growth is a new name, and what is absent is simply not
//! offered. So an old plugin works in a new host and a new plugin in an old host.
//!
//! # Rules for every function here
//!
//! - **Ownership.** Everything passed by pointer is borrowed for the call, unless its doc says otherwise. Only objects
//!   and block queues are owned, and each has exactly one release. Tables are static for ever; plugins are never unloaded.
//! - **Errors.** `0` or a positive count is success, `-errno` is failure. Control-path calls also take a [`Sink`] for
//!   one line of text that says what is wrong and what to do.
//! - **Unwinding.** No function may unwind into its caller. The SDK's thunks catch panics and report them through
//!   `vmm.host.fault/1`; a plugin in another language does what its language needs.
//! - **Threads.** *Control thread*: create, describe, start, pause, resume, reset, save, load, stop, release; never two at once for one
//!   object. *vCPU threads*: register access, several at once. *I/O thread*: `ready`, never two at once for one object.
//!   *Queue owner*: the one thread that uses a queue at a time. Host services: any thread, from create until release returns.
//! - **States.** created → \[load\] → started ⇄ paused → stopped → released; reset happens while paused. The host enforces it.

#![no_std]

pub mod block;
pub mod chardev;
pub mod device;
pub mod host;

use core::ffi::c_void;

/// ABI generation. A host refuses a plugin of another major number.
pub const ABI_MAJOR: u32 = 1;
/// Counts additions since the major number; for information only, never compared.
pub const ABI_MINOR: u32 = 0;
/// What [`Root::magic`] holds.
pub const MAGIC: [u8; 8] = *b"VMMPLUG\0";
/// The exported symbol, a [`Root`].
pub const ROOT_SYMBOL: &str = "VMM_PLUGIN";
/// The ELF section that holds the manifest text.
pub const MANIFEST_SECTION: &str = ".vmm.plugin";

/// [`Root::flags`]: panics unwind in this plugin, so its thunks can catch them, or there are none, as in C. Without it a panic
/// ends the process.
pub const FLAG_UNWIND: u32 = 1;
/// [`Root::flags`]: built with debug assertions.
pub const FLAG_DEBUG: u32 = 2;

/// [`Root::create`] makes a device (`driver =`).
pub const KIND_DEVICE: u32 = 1;
/// [`Root::create`] makes a block backend (`type =` in a `[block_dev]` table).
pub const KIND_BLOCK: u32 = 2;
/// [`Root::create`] makes a character backend (`type =` in a `[char_dev]` table).
pub const KIND_CHAR: u32 = 3;

/// [`Opt::kind`]: [`Opt::int`] is 0 or 1.
pub const OPT_BOOL: u32 = 1;
/// [`Opt::kind`]: [`Opt::int`] is the number; sizes are in bytes.
pub const OPT_INT: u32 = 2;
/// [`Opt::kind`]: [`Opt::text`] is the string, path or enum value.
pub const OPT_TEXT: u32 = 3;
/// [`Opt::kind`]: [`Opt::obj`] is the backend that the option names, [`Opt::text`] that backend's name in the VM file.
pub const OPT_OBJECT: u32 = 4;

/// The layout record in an [`Iface`] is an abi_stable 0.11 `TypeLayout`.
pub const LAYOUT_ABI_STABLE_0_11: u32 = 11;

/// UTF-8 text, not NUL terminated, borrowed for the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct Str {
    /// First byte; may be null when `len` is 0.
    pub ptr: *const u8,
    /// Bytes.
    pub len: usize,
}

/// Where the callee puts bytes: error text, saved state. Called any number of times during the call it was passed to.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct Sink {
    /// Passed back in `write`.
    pub ctx: *mut c_void,
    /// Appends `len` bytes at `ptr`.
    pub write: unsafe extern "C" fn(ctx: *mut c_void, ptr: *const u8, len: usize),
}

/// The answer to a question for an interface by name.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct Iface {
    /// The table that the name stands for, or null: not offered.
    pub table: *const c_void,
    /// Description of the table's layout for the other side to check, or null: taken on trust.
    pub layout: *const c_void,
    /// What `layout` points at; [`LAYOUT_ABI_STABLE_0_11`] or 0.
    pub layout_kind: u32,
}

/// What every object can do.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct Base {
    /// Ends the object; it is not used afterwards. Control thread; the object is created or stopped, and backends
    /// outlive the objects that were created with them.
    pub release: unsafe extern "C" fn(this: *mut c_void),
    /// The table for an interface name such as `vmm.io/1`. Any thread, any time; always the same answer.
    pub interface: unsafe extern "C" fn(this: *mut c_void, name: Str) -> Iface,
}

/// A device or backend that a plugin made.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct Obj {
    /// First argument of every function in the object's tables.
    pub this: *mut c_void,
    /// Null only in an [`Opt`] that carries no object.
    pub base: *const Base,
}

/// The host's side. One for the process at [`Root::init`], one for each object at [`Root::create`]; both stay valid
/// for the life of the process.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct Host {
    /// First argument of every function in the services' tables.
    pub ctx: *mut c_void,
    /// The table for a service name such as `vmm.host.irq/1`. Any thread, any time; always the same answer.
    pub service: unsafe extern "C" fn(ctx: *mut c_void, name: Str) -> Iface,
}

/// One option of a device or backend, already validated against the manifest and with defaults filled in.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct Opt {
    /// The option's name in the manifest.
    pub key: Str,
    /// `OPT_*`: which of the next fields counts.
    pub kind: u32,
    /// Unused, zero.
    pub reserved: u32,
    /// For `OPT_BOOL` and `OPT_INT`.
    pub int: u64,
    /// For `OPT_TEXT` and `OPT_OBJECT`.
    pub text: Str,
    /// For `OPT_OBJECT`.
    pub obj: Obj,
}

/// The one exported static of a plugin.
#[repr(C)]
#[derive(Debug)]
pub struct Root {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`ABI_MAJOR`] that the plugin was built with.
    pub abi_major: u32,
    /// [`ABI_MINOR`] that the plugin was built with.
    pub abi_minor: u32,
    /// `FLAG_*`.
    pub flags: u32,
    /// Unused, zero.
    pub reserved: u32,
    /// The same text as in [`MANIFEST_SECTION`].
    pub manifest: *const u8,
    /// Its bytes.
    pub manifest_len: usize,
    /// Called once, first, on the control thread, with the process-wide host: install log and panic bridges here.
    /// Returns 0 or `-errno`; on failure the plugin is not used.
    pub init: unsafe extern "C" fn(host: *const Host) -> i32,
    /// Creates a device or backend. Control thread; no vCPU runs yet. `kind` is `KIND_*`, `name` one of the manifest's
    /// names of that kind. May use the log, fault, counter, memory, startup and thread services; interrupts, doorbells and watches
    /// only from `start` on (a backend has no `start`: it may watch at once). On failure writes one line to `err`,
    /// leaves `out` alone and keeps nothing.
    pub create: unsafe extern "C" fn(
        host: *const Host,
        kind: u32,
        name: Str,
        opts: *const Opt,
        opt_count: usize,
        out: *mut Obj,
        err: *const Sink,
    ) -> i32,
}

#[allow(unsafe_code)] // the exported static has to be Sync
// SAFETY: a `Root` is immutable data; the pointers in it refer to statics of the plugin.
unsafe impl Sync for Root {}

impl Str {
    /// Borrows `text` for a call.
    #[must_use]
    pub const fn new(text: &str) -> Self {
        Self {
            ptr: text.as_ptr(),
            len: text.len(),
        }
    }
}

impl Iface {
    /// "Not offered".
    pub const NONE: Self = Self {
        table: core::ptr::null(),
        layout: core::ptr::null(),
        layout_kind: 0,
    };
}

impl Obj {
    /// No object.
    pub const NONE: Self = Self {
        this: core::ptr::null_mut(),
        base: core::ptr::null(),
    };
}

//! The C side of a plugin: the thunks behind the tables, and the [`plugin!`](crate::plugin) macro that names them.

#![allow(unsafe_code)] // the FFI edge: raw pointers from and to the host

mod block;
mod chardev;
mod device;
mod meter;

use std::ffi::c_void;

use vmm_abi::device::{
    CAP_LIVE, CapDesc, PinDesc, REGION_BAR_IO, REGION_BAR_MEM32, REGION_BAR_MEM64, REGION_MMIO,
    REGION_PIO, RegionDesc, TRIGGER_EDGE, TRIGGER_LEVEL,
};
use vmm_abi::{Base, Obj, Opt, Root, Sink, Str};

use self::block::BlockTables;
use self::chardev::CharTables;
use self::device::DeviceTables;
use crate::{
    BlockBackend, CharBackend, Description, Device, Host, Options, RegionKind, Result, Trigger,
    guard,
};

/// The text that `s` borrows; empty if it is not UTF-8.
#[doc(hidden)]
#[must_use]
pub fn text<'a>(s: &Str) -> &'a str {
    if s.len == 0 {
        return "";
    }
    // SAFETY: the ABI promises `len` bytes for the call that this was passed to.
    std::str::from_utf8(unsafe { std::slice::from_raw_parts(s.ptr, s.len) }).unwrap_or("")
}

/// Collects what a callee writes to a [`Sink`].
#[derive(Default)]
pub(crate) struct ErrorText(Vec<u8>);

impl ErrorText {
    pub(crate) fn sink(&mut self) -> Sink {
        unsafe extern "C" fn write(ctx: *mut c_void, ptr: *const u8, len: usize) {
            if len > 0 {
                // SAFETY: `ctx` is the `ErrorText` that made this sink; the ABI promises `len` bytes.
                unsafe {
                    (*ctx.cast::<ErrorText>())
                        .0
                        .extend_from_slice(std::slice::from_raw_parts(ptr, len))
                };
            }
        }
        Sink {
            ctx: std::ptr::from_mut(self).cast(),
            write,
        }
    }

    #[cfg(feature = "testing")]
    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0
    }

    pub(crate) fn or_errno(self, code: i32) -> String {
        if self.0.is_empty() {
            return std::io::Error::from_raw_os_error(-code).to_string();
        }
        String::from_utf8_lossy(&self.0).into_owned()
    }
}

/// Writes `message` to `sink`.
///
/// # Safety
/// `sink` is null or valid for the call.
unsafe fn put(sink: *const Sink, message: &[u8]) {
    // SAFETY: the caller's promise.
    if let Some(sink) = unsafe { sink.as_ref() } {
        // SAFETY: a call by the sink's contract.
        unsafe { (sink.write)(sink.ctx, message.as_ptr(), message.len()) };
    }
}

/// An error as `-errno` and its chain of texts in `sink`.
///
/// # Safety
/// `sink` is null or valid for the call.
#[doc(hidden)]
pub unsafe fn fail(error: &anyhow::Error, sink: *const Sink) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { put(sink, format!("{error:#}").as_bytes()) };
    let code = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<std::io::Error>()?.raw_os_error());
    -code.filter(|c| *c > 0).unwrap_or(libc::EINVAL)
}

/// What `this` points at in every table: the author's value, its host, and the description that the host borrows.
struct Object<T> {
    inner: T,
    host: Host,
    device: Described,
}

/// A [`Description`] in C layout; the pointers stay valid as long as this lives.
#[derive(Default)]
struct Described {
    regions: Vec<RegionDesc>,
    pins: Vec<PinDesc>,
    acpi_hid: String,
    caps: Vec<CapDesc>,
    source: Description,
}

impl Described {
    fn new(source: Description) -> Self {
        let regions = source.regions.iter().map(|r| {
            let (kind, bar, address) = match r.kind {
                RegionKind::Pio(address) => (REGION_PIO, 0, address),
                RegionKind::Mmio(address) => (REGION_MMIO, 0, address),
                RegionKind::Bar32(bar) => (REGION_BAR_MEM32, bar, 0),
                RegionKind::Bar64(bar) => (REGION_BAR_MEM64, bar, 0),
                RegionKind::BarIo(bar) => (REGION_BAR_IO, bar, 0),
            };
            RegionDesc {
                id: r.id,
                kind,
                bar,
                reserved: 0,
                address,
                size: r.size,
            }
        });
        let pins = source.pins.iter().map(|p| PinDesc {
            irq: p.irq,
            trigger: if p.trigger == Trigger::Level {
                TRIGGER_LEVEL
            } else {
                TRIGGER_EDGE
            },
        });
        let caps = source
            .pci
            .iter()
            .flat_map(|p| &p.capabilities)
            .map(|c| CapDesc {
                id: c.id.into(),
                flags: if c.live { CAP_LIVE } else { 0 },
                body: c.body.as_ptr(),
                body_len: c.body.len(),
            });
        Self {
            regions: regions.collect(),
            pins: pins.collect(),
            caps: caps.collect(),
            acpi_hid: source.acpi_hid.clone().unwrap_or_default(),
            source,
        }
    }
}

/// The object behind `this`.
///
/// # Safety
/// `this` came from [`create_device`], [`create_block`] or [`create_char`] with the same `T` and is not released.
unsafe fn object<'a, T>(this: *mut c_void) -> &'a Object<T> {
    // SAFETY: the caller's promise.
    unsafe { &*this.cast::<Object<T>>() }
}

/// Runs a fallible control-path method under the guard.
///
/// # Safety
/// As [`object`]; `err` is null or valid for the call.
unsafe fn control<T>(
    this: *mut c_void,
    method: &str,
    err: *const Sink,
    f: impl FnOnce(&T) -> Result<i32>,
) -> i32 {
    // SAFETY: the caller's promise.
    let object = unsafe { object::<T>(this) };
    guard::call(
        &object.host,
        method,
        -libc::EIO,
        || match f(&object.inner) {
            Ok(code) => code,
            // SAFETY: the caller's promise.
            Err(error) => unsafe { fail(&error, err) },
        },
    )
}

unsafe extern "C" fn release<T>(this: *mut c_void) {
    // SAFETY: the one release of an object that the create function below has boxed.
    let object = unsafe { Box::from_raw(this.cast::<Object<T>>()) };
    let Object {
        inner,
        host,
        device,
    } = *object;
    if let Err(text) = guard::catch(move || drop(inner)) {
        host.fault("drop", &text);
    }
    drop(device);
}

/// What the host passed to create.
#[doc(hidden)]
pub struct CreateCall {
    host: *const vmm_abi::Host,
    opts: *const Opt,
    opt_count: usize,
    out: *mut Obj,
    err: *const Sink,
}

impl CreateCall {
    /// # Safety
    /// The values are those of one call of [`Root::create`], and used within it.
    #[must_use]
    pub unsafe fn new(
        host: *const vmm_abi::Host,
        opts: *const Opt,
        opt_count: usize,
        out: *mut Obj,
        err: *const Sink,
    ) -> Self {
        Self {
            host,
            opts,
            opt_count,
            out,
            err,
        }
    }

    /// Makes the object and hands it to the host; a panic or an error becomes the call's result.
    fn run<T>(
        &self,
        base: &'static Base,
        make: impl FnOnce(&Options<'_>, &Host) -> Result<T>,
        describe: impl FnOnce(&T) -> Description,
    ) -> i32 {
        // SAFETY: by `new`'s contract the host is valid for ever and the options for this call.
        let (host, opts) = unsafe {
            let opts = if self.opt_count == 0 {
                &[][..]
            } else {
                std::slice::from_raw_parts(self.opts, self.opt_count)
            };
            (Host::new(*self.host), Options::new(opts))
        };
        let made = guard::catch(|| {
            let inner = make(&opts, &host)?;
            let device = Described::new(describe(&inner));
            Ok(Object {
                inner,
                host: host.clone(),
                device,
            })
        });
        match made {
            Ok(Ok(object)) => {
                // SAFETY: the ABI promises room for one object.
                unsafe {
                    self.out.write(Obj {
                        this: Box::into_raw(Box::new(object)).cast(),
                        base,
                    })
                };
                0
            }
            // SAFETY: the sink is valid for this call.
            Ok(Err(error)) => unsafe { fail(&error, self.err) },
            Err(text) => {
                host.fault("create", &text);
                // SAFETY: the sink is valid for this call.
                unsafe { put(self.err, text.as_bytes()) };
                -libc::EIO
            }
        }
    }
}

#[doc(hidden)]
#[must_use]
pub fn create_device<T: Device>(call: &CreateCall) -> i32 {
    call.run::<T>(DeviceTables::<T>::BASE, T::create, T::describe)
}

#[doc(hidden)]
#[must_use]
pub fn create_block<T: BlockBackend>(call: &CreateCall) -> i32 {
    call.run::<T>(BlockTables::<T>::BASE, T::create, |_| {
        Description::default()
    })
}

#[doc(hidden)]
#[must_use]
pub fn create_char<T: CharBackend>(call: &CreateCall) -> i32 {
    call.run::<T>(CharTables::<T>::BASE, T::create, |_| Description::default())
}

/// The plugin's `init`: panic hook and log bridge. Once per process; later calls change nothing.
#[doc(hidden)]
pub unsafe extern "C" fn init(host: *const vmm_abi::Host) -> i32 {
    // SAFETY: the host passes its process-wide side, valid for ever.
    match guard::catch(|| crate::log_bridge::install(unsafe { *host })) {
        Ok(()) => {
            guard::install_panic_hook();
            crate::probes::register();
            0
        }
        Err(_) => -libc::EIO,
    }
}

/// The exported static of a plugin.
#[doc(hidden)]
#[must_use]
pub const fn root(
    manifest: &'static [u8],
    create: unsafe extern "C" fn(
        *const vmm_abi::Host,
        u32,
        Str,
        *const Opt,
        usize,
        *mut Obj,
        *const Sink,
    ) -> i32,
) -> Root {
    let unwind = if cfg!(panic = "unwind") {
        vmm_abi::FLAG_UNWIND
    } else {
        0
    };
    let debug = if cfg!(debug_assertions) {
        vmm_abi::FLAG_DEBUG
    } else {
        0
    };
    Root {
        magic: vmm_abi::MAGIC,
        abi_major: vmm_abi::ABI_MAJOR,
        abi_minor: vmm_abi::ABI_MINOR,
        flags: unwind | debug,
        reserved: 0,
        manifest: manifest.as_ptr(),
        manifest_len: manifest.len(),
        init,
        create,
    }
}

/// Makes the crate a plugin: embeds the manifest and exports the root.
///
/// `manifest` is a TOML file beside the source file, without `abi`, `version` and `license`, which come from this SDK and
/// the crate's `Cargo.toml`. The lists name, for each driver or type in it, the Rust type that implements it.
///
/// ```ignore
/// vmm_plugin_api::plugin! {
///     manifest: "plugin.toml",
///     devices: { "acme-widget" => Widget },
///     blocks: { "acme-disk" => Disk },
///     chars: {},
/// }
/// ```
#[macro_export]
macro_rules! plugin {
    (
        manifest: $manifest:literal,
        devices: { $($device:literal => $device_type:ty),* $(,)? },
        blocks: { $($block:literal => $block_type:ty),* $(,)? },
        chars: { $($char:literal => $char_type:ty),* $(,)? } $(,)?
    ) => {
        const VMM_MANIFEST_TEXT: &str = concat!(
            "abi = \"1.0\"\nversion = \"", env!("CARGO_PKG_VERSION"), "\"\nlicense = \"", env!("CARGO_PKG_LICENSE"),
            "\"\n", include_str!($manifest),
        );

        #[used]
        #[allow(unsafe_code)]
        #[unsafe(link_section = ".vmm.plugin")]
        static VMM_MANIFEST: [u8; VMM_MANIFEST_TEXT.len()] = match VMM_MANIFEST_TEXT.as_bytes().first_chunk() {
            Some(bytes) => *bytes,
            None => panic!(),
        };

        /// What the host looks for in the shared object.
        #[allow(unsafe_code)]
        #[unsafe(no_mangle)]
        pub static VMM_PLUGIN: $crate::abi::Root = $crate::private::root(&VMM_MANIFEST, {
            #[allow(unsafe_code, unused_variables)]
            unsafe extern "C" fn create(
                host: *const $crate::abi::Host,
                kind: u32,
                name: $crate::abi::Str,
                opts: *const $crate::abi::Opt,
                opt_count: usize,
                out: *mut $crate::abi::Obj,
                err: *const $crate::abi::Sink,
            ) -> i32 {
                // SAFETY: these are the values of this call.
                let call = unsafe { $crate::private::CreateCall::new(host, opts, opt_count, out, err) };
                match (kind, $crate::private::text(&name)) {
                    $(($crate::abi::KIND_DEVICE, $device) => $crate::private::create_device::<$device_type>(&call),)*
                    $(($crate::abi::KIND_BLOCK, $block) => $crate::private::create_block::<$block_type>(&call),)*
                    $(($crate::abi::KIND_CHAR, $char) => $crate::private::create_char::<$char_type>(&call),)*
                    (kind, name) => call.unknown(kind, name),
                }
            }
            create
        });
    };
}

impl CreateCall {
    /// The manifest names something that the code does not provide.
    #[must_use]
    pub fn unknown(&self, kind: u32, name: &str) -> i32 {
        let error = anyhow::anyhow!(
            "the manifest names `{name}` (kind {kind}), which this plugin's code does not provide"
        );
        // SAFETY: the sink is valid for this call.
        unsafe { fail(&error, self.err) }
    }
}

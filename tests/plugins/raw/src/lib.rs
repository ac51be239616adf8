//! A device with one I/O port, written against the ABI's tables alone, without the SDK. Test plugins of other generations
//! take it and vary what it offers.

#![allow(unsafe_code)] // the C side of a plugin

use std::ffi::c_void;
use std::marker::PhantomData;

use abi_stable::StableAbi;
use vmm_abi::device::{DEVICE, DeviceDesc, DeviceTable, IO, IoTable, REGION_PIO, RegionDesc};
use vmm_abi::{Base, Host, Iface, LAYOUT_ABI_STABLE_0_11, Obj, Opt, Root, Sink, Str};

/// How a plugin differs from the plain one.
pub trait Variant: 'static {
    /// The manifest.
    const MANIFEST: &'static str;
    /// The minor version that the plugin claims.
    const ABI_MINOR: u32;
    /// The table it offers under `name`.
    fn interface(name: &str) -> Iface;
    /// What its port reads: `true` if the host offers the named service.
    fn read(has_service: impl Fn(&str) -> bool) -> u64;
}

/// The device.
struct Port {
    region: RegionDesc,
    value: u64,
}

/// The tables of a variant.
pub struct Plugin<V>(PhantomData<V>);

/// The text behind `s`.
fn text<'a>(s: &Str) -> &'a str {
    if s.len == 0 {
        return "";
    }
    // SAFETY: the ABI promises `len` bytes for the call.
    std::str::from_utf8(unsafe { std::slice::from_raw_parts(s.ptr, s.len) }).unwrap_or("")
}

/// `table` with its layout record.
pub fn recorded<T: StableAbi>(table: &'static T) -> Iface {
    Iface {
        table: std::ptr::from_ref(table).cast(),
        layout: std::ptr::from_ref(T::LAYOUT).cast(),
        layout_kind: LAYOUT_ABI_STABLE_0_11,
    }
}

/// `table` without one.
pub fn on_trust<T>(table: &'static T) -> Iface {
    Iface {
        table: std::ptr::from_ref(table).cast(),
        ..Iface::NONE
    }
}

/// The plain `vmm.device/1`.
pub const DEVICE_TABLE: &DeviceTable = &DeviceTable {
    describe,
    start: nothing,
    pause: nothing,
    resume: nothing,
    reset: nothing,
    stop,
};

/// The plain `vmm.io/1`.
pub const IO_TABLE: &IoTable = &IoTable { read, write };

/// What the plain plugin offers, with or without layout records.
pub fn plain(name: &str, records: bool) -> Iface {
    match (name, records) {
        (DEVICE, true) => recorded(DEVICE_TABLE),
        (DEVICE, false) => on_trust(DEVICE_TABLE),
        (IO, true) => recorded(IO_TABLE),
        (IO, false) => on_trust(IO_TABLE),
        _ => Iface::NONE,
    }
}

unsafe extern "C" fn describe(this: *mut c_void, out: *mut DeviceDesc) -> i32 {
    // SAFETY: `this` is a `Port` of `create`, and the host has room for the description.
    unsafe {
        let port = &*this.cast::<Port>();
        out.write(DeviceDesc {
            regions: &raw const port.region,
            region_count: 1,
            pins: std::ptr::null(),
            pin_count: 0,
            acpi_hid: Str::new(""),
        });
    }
    0
}

unsafe extern "C" fn nothing(_this: *mut c_void, _err: *const Sink) -> i32 {
    0
}

unsafe extern "C" fn stop(_this: *mut c_void) {}

unsafe extern "C" fn read(this: *mut c_void, _region: u32, _offset: u64, _width: u32) -> u64 {
    // SAFETY: `this` is a `Port` of `create`.
    unsafe { &*this.cast::<Port>() }.value
}

unsafe extern "C" fn write(
    _this: *mut c_void,
    _region: u32,
    _offset: u64,
    _width: u32,
    _value: u64,
) {
}

unsafe extern "C" fn release(this: *mut c_void) {
    // SAFETY: the one release of what `create` has boxed.
    drop(unsafe { Box::from_raw(this.cast::<Port>()) });
}

unsafe extern "C" fn init(_host: *const Host) -> i32 {
    0
}

impl<V: Variant> Plugin<V> {
    const BASE: &'static Base = &Base {
        release,
        interface: Self::interface,
    };

    /// What the plugin exports.
    pub const ROOT: Root = Root {
        magic: vmm_abi::MAGIC,
        abi_major: vmm_abi::ABI_MAJOR,
        abi_minor: V::ABI_MINOR,
        // Nothing in it panics.
        flags: vmm_abi::FLAG_UNWIND,
        reserved: 0,
        manifest: V::MANIFEST.as_ptr(),
        manifest_len: V::MANIFEST.len(),
        init,
        create: Self::create,
    };

    unsafe extern "C" fn interface(_this: *mut c_void, name: Str) -> Iface {
        V::interface(text(&name))
    }

    unsafe extern "C" fn create(
        host: *const Host,
        _kind: u32,
        _name: Str,
        opts: *const Opt,
        opt_count: usize,
        out: *mut Obj,
        err: *const Sink,
    ) -> i32 {
        // SAFETY: the ABI promises `opt_count` options, a host, a sink and room for an object.
        unsafe {
            let opts = if opt_count == 0 {
                &[]
            } else {
                std::slice::from_raw_parts(opts, opt_count)
            };
            let Some(port) = opts.iter().find(|o| text(&o.key) == "port") else {
                let why = "option `port` is missing";
                ((*err).write)((*err).ctx, why.as_ptr(), why.len());
                return -libc::EINVAL;
            };
            let host = &*host;
            let value = V::read(|name| !(host.service)(host.ctx, Str::new(name)).table.is_null());
            let region = RegionDesc {
                id: 0,
                kind: REGION_PIO,
                bar: 0,
                reserved: 0,
                address: port.int,
                size: 1,
            };
            out.write(Obj {
                this: Box::into_raw(Box::new(Port { region, value })).cast(),
                base: Self::BASE,
            });
        }
        0
    }
}

/// Exports variant `$variant` whose manifest is the literal `$manifest`.
#[macro_export]
macro_rules! export {
    ($variant:ty) => {
        const MANIFEST_BYTES: usize = <$variant as $crate::Variant>::MANIFEST.len();

        #[used]
        #[allow(unsafe_code)]
        #[unsafe(link_section = ".vmm.plugin")]
        static MANIFEST: [u8; MANIFEST_BYTES] = match <$variant as $crate::Variant>::MANIFEST
            .as_bytes()
            .first_chunk()
        {
            Some(bytes) => *bytes,
            None => panic!(),
        };

        /// What the host looks for in the shared object.
        #[allow(unsafe_code)]
        #[unsafe(no_mangle)]
        pub static VMM_PLUGIN: vmm_abi::Root = $crate::Plugin::<$variant>::ROOT;
    };
}

/// The manifest of a plugin with one driver of the same name.
#[macro_export]
macro_rules! manifest {
    ($name:literal, $abi:literal, $about:literal) => {
        concat!(
            "abi = \"", $abi, "\"\nname = \"", $name, "\"\nversion = \"0.1.0\"\nlicense = \"Apache-2.0 OR MIT\"\nabout = \"",
            $about, "\"\n[[driver]]\nname = \"", $name, "\"\nabout = \"", $about, "\"\nbus = \"isa\"\n",
            "[[driver.option]]\nname = \"port\"\ntype = \"u32\"\ndefault = 0x530\nrange = [0x100, 0xffff]\nabout = \"Number of the I/O port\"\n",
        )
    };
}

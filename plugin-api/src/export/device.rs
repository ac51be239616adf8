//! The thunks behind a device's tables.

use std::ffi::c_void;
use std::marker::PhantomData;

use vmm_abi::device::{
    DEVICE, DEVICE_RESIZE, DeviceDesc, DeviceResizeTable, DeviceTable, EVENTS, EventsTable, IO,
    IoTable, PCI, PCI_CAPABILITY, PciCapabilityTable, PciDesc, PciTable, SNAPSHOT, SnapshotTable,
};
use vmm_abi::{Base, Iface, Sink, Str};

use super::{control, object, put, release, text};
use crate::iface::offer;
use crate::{Device, Events, guard};

/// The tables of device type `T`.
pub(super) struct DeviceTables<T>(PhantomData<T>);

impl<T: Device> DeviceTables<T> {
    pub(super) const BASE: &'static Base = &Base {
        release: release::<T>,
        interface: Self::interface,
    };
    const DEVICE: &'static DeviceTable = &DeviceTable {
        describe: Self::describe,
        start: Self::start,
        pause: Self::pause,
        resume: Self::resume,
        reset: Self::reset,
        stop: Self::stop,
    };
    const IO: &'static IoTable = &IoTable {
        read: Self::read,
        write: Self::write,
    };
    const PCI: &'static PciTable = &PciTable {
        describe: Self::describe_pci,
    };
    const CAPABILITY: &'static PciCapabilityTable = &PciCapabilityTable {
        read: Self::read_capability,
        write: Self::write_capability,
    };
    const EVENTS: &'static EventsTable = &EventsTable { ready: Self::ready };
    const SNAPSHOT: &'static SnapshotTable = &SnapshotTable {
        save: Self::save,
        load: Self::load,
    };

    const RESIZE: &'static DeviceResizeTable = &DeviceResizeTable {
        resized: Self::resized,
    };

    unsafe extern "C" fn interface(this: *mut c_void, name: Str) -> Iface {
        // SAFETY: the host passes the object that this table came with.
        let pci = unsafe { object::<T>(this) }.device.source.pci.is_some();
        match text(&name) {
            DEVICE => offer(Self::DEVICE),
            IO => offer(Self::IO),
            EVENTS => offer(Self::EVENTS),
            PCI if pci => offer(Self::PCI),
            PCI_CAPABILITY if pci => offer(Self::CAPABILITY),
            DEVICE_RESIZE if T::FOLLOWS_RESIZE => offer(Self::RESIZE),
            SNAPSHOT if T::STATE_VERSION.is_some() => offer(Self::SNAPSHOT),
            _ => Iface::NONE,
        }
    }

    unsafe extern "C" fn describe(this: *mut c_void, out: *mut DeviceDesc) -> i32 {
        // SAFETY: as in `interface`.
        let device = &unsafe { object::<T>(this) }.device;
        // SAFETY: the ABI promises room for one description.
        unsafe {
            out.write(DeviceDesc {
                regions: device.regions.as_ptr(),
                region_count: device.regions.len(),
                pins: device.pins.as_ptr(),
                pin_count: device.pins.len(),
                acpi_hid: Str::new(&device.acpi_hid),
            });
        }
        0
    }

    unsafe extern "C" fn describe_pci(this: *mut c_void, out: *mut PciDesc) -> i32 {
        // SAFETY: as in `interface`.
        let device = &unsafe { object::<T>(this) }.device;
        let Some(pci) = &device.source.pci else {
            return -libc::ENODEV;
        };
        // SAFETY: the ABI promises room for one description.
        unsafe {
            out.write(PciDesc {
                vendor: pci.vendor,
                device: pci.device,
                subsystem_vendor: pci.subsystem_vendor,
                subsystem: pci.subsystem,
                class: pci.class,
                revision: pci.revision,
                intx: pci.intx.into(),
                msix_vectors: pci.msix_vectors,
                msix_bar: pci.msix_bar,
                reserved: 0,
                caps: device.caps.as_ptr(),
                cap_count: device.caps.len(),
            });
        }
        0
    }

    unsafe extern "C" fn start(this: *mut c_void, err: *const Sink) -> i32 {
        // SAFETY: the host passes the object that this table came with, and a valid sink.
        unsafe { control::<T>(this, "start", err, |d| d.start().map(|()| 0)) }
    }

    unsafe extern "C" fn pause(this: *mut c_void, err: *const Sink) -> i32 {
        // SAFETY: as in `start`.
        unsafe { control::<T>(this, "pause", err, |d| d.pause().map(|()| 0)) }
    }

    unsafe extern "C" fn resume(this: *mut c_void, err: *const Sink) -> i32 {
        // SAFETY: as in `start`.
        unsafe { control::<T>(this, "resume", err, |d| d.resume().map(|()| 0)) }
    }

    unsafe extern "C" fn reset(this: *mut c_void, err: *const Sink) -> i32 {
        // SAFETY: as in `start`.
        unsafe { control::<T>(this, "reset", err, |d| d.reset().map(|()| 0)) }
    }

    unsafe extern "C" fn stop(this: *mut c_void) {
        // SAFETY: as in `start`; without a sink.
        unsafe {
            control::<T>(this, "stop", std::ptr::null(), |d| {
                d.stop();
                Ok(0)
            })
        };
    }

    unsafe extern "C" fn read(this: *mut c_void, region: u32, offset: u64, width: u32) -> u64 {
        // SAFETY: as in `interface`.
        let object = unsafe { object::<T>(this) };
        guard::call(&object.host, "read", u64::MAX, || {
            object.inner.read(region, offset, width)
        })
    }

    unsafe extern "C" fn write(
        this: *mut c_void,
        region: u32,
        offset: u64,
        width: u32,
        value: u64,
    ) {
        // SAFETY: as in `interface`.
        let object = unsafe { object::<T>(this) };
        guard::call(&object.host, "write", (), || {
            object.inner.write(region, offset, width, value)
        });
    }

    unsafe extern "C" fn read_capability(
        this: *mut c_void,
        cap: u32,
        offset: u32,
        width: u32,
    ) -> u32 {
        // SAFETY: as in `interface`.
        let object = unsafe { object::<T>(this) };
        guard::call(&object.host, "read_capability", u32::MAX, || {
            object.inner.read_capability(cap, offset, width)
        })
    }

    unsafe extern "C" fn write_capability(
        this: *mut c_void,
        cap: u32,
        offset: u32,
        width: u32,
        value: u32,
    ) {
        // SAFETY: as in `interface`.
        let object = unsafe { object::<T>(this) };
        guard::call(&object.host, "write_capability", (), || {
            object.inner.write_capability(cap, offset, width, value);
        });
    }

    unsafe extern "C" fn ready(this: *mut c_void, token: u64, events: u32) {
        // SAFETY: as in `interface`.
        let object = unsafe { object::<T>(this) };
        guard::call(&object.host, "ready", (), || {
            object.inner.ready(token, Events(events))
        });
    }

    unsafe extern "C" fn resized(this: *mut c_void) {
        // SAFETY: as in `interface`.
        let object = unsafe { object::<T>(this) };
        guard::call(&object.host, "resized", (), || object.inner.resized());
    }

    unsafe extern "C" fn save(this: *mut c_void, out: *const Sink, err: *const Sink) -> i32 {
        // SAFETY: as in `start`; `out` is a valid sink.
        unsafe {
            control::<T>(this, "save", err, |d| {
                put(out, &d.save()?);
                Ok(T::STATE_VERSION
                    .and_then(|v| i32::try_from(v).ok())
                    .unwrap_or(-libc::ENOTSUP))
            })
        }
    }

    unsafe extern "C" fn load(
        this: *mut c_void,
        version: u32,
        data: *const u8,
        len: usize,
        err: *const Sink,
    ) -> i32 {
        let state = if len == 0 {
            &[][..]
        } else {
            // SAFETY: the ABI promises `len` bytes at `data`.
            unsafe { std::slice::from_raw_parts(data, len) }
        };
        // SAFETY: as in `start`.
        unsafe { control::<T>(this, "load", err, |d| d.load(version, state).map(|()| 0)) }
    }
}

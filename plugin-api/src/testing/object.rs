//! Devices and backends in the hands of a test.

#![allow(unsafe_code)] // calls the plugin's tables

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, bail};
use vmm_abi::block::{BLOCK_RESIZE, BlockResizeTable};
use vmm_abi::device::{
    DEVICE, DEVICE_RESIZE, DeviceDesc, DeviceResizeTable, DeviceTable, EVENTS, EventsTable, IO,
    IoTable, PCI, PCI_CAPABILITY, PciCapabilityTable, PciDesc, PciTable, RegionDesc, SNAPSHOT,
    SnapshotTable,
};
use vmm_abi::{OPT_BOOL, OPT_INT, OPT_OBJECT, OPT_TEXT, Obj, Opt, Root, Sink, Str};

use super::instance::Instance;
use super::lock;
use crate::export::ErrorText;
use crate::iface::interface;
use crate::{BlockDevice, CharDevice, Result};

/// The value of an option.
#[derive(Clone)]
pub enum Value {
    /// For `bool`.
    Bool(bool),
    /// For `u32`, `u64` and `size`.
    Int(u64),
    /// For `string`, `path` and `enum`.
    Text(String),
    /// For `ref:block` and `ref:char`.
    Object(Backend),
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Int(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<&Backend> for Value {
    fn from(value: &Backend) -> Self {
        Self::Object(value.clone())
    }
}

/// A live object and what it was created with.
pub(super) struct Object {
    obj: Obj,
    instance: &'static Instance,
    /// Backends outlive their users.
    _uses: Vec<Backend>,
}

// SAFETY: the tables' thread rules are the test's to keep; the pointers themselves may move.
unsafe impl Send for Object {}
// SAFETY: as above.
unsafe impl Sync for Object {}

impl Object {
    pub(super) fn create(
        instance: &'static Instance,
        root: &'static Root,
        kind: u32,
        name: &str,
        options: &[(&str, Value)],
    ) -> Result<Self> {
        let host: &'static vmm_abi::Host = Box::leak(Box::new(instance.host()));
        let opts: Vec<Opt> = options.iter().map(|(key, value)| opt(key, value)).collect();
        let uses = options.iter().filter_map(|(_, v)| match v {
            Value::Object(backend) => Some(backend.clone()),
            _ => None,
        });
        let mut obj = Obj::NONE;
        let mut error = ErrorText::default();
        let sink = error.sink();
        // SAFETY: calls by the root's contract; host and instance are leaked.
        let code = unsafe {
            if (root.init)(host) < 0 {
                bail!("the plugin's init failed");
            }
            (root.create)(
                host,
                kind,
                Str::new(name),
                opts.as_ptr(),
                opts.len(),
                &raw mut obj,
                &raw const sink,
            )
        };
        if code < 0 {
            bail!("{}", error.or_errno(code));
        }
        Ok(Self {
            obj,
            instance,
            _uses: uses.collect(),
        })
    }

    pub(super) fn ready(&self, token: u64, events: u32) -> usize {
        let Some(table) = interface::<EventsTable>(&self.obj, EVENTS) else {
            return 0;
        };
        // SAFETY: a call by the table's contract.
        unsafe { (table.ready)(self.obj.this, token, events) };
        1
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: the one release.
        unsafe { ((*self.obj.base).release)(self.obj.this) };
        self.instance.forget();
    }
}

fn opt(key: &str, value: &Value) -> Opt {
    let (kind, int, text, obj) = match value {
        Value::Bool(b) => (OPT_BOOL, u64::from(*b), "", Obj::NONE),
        Value::Int(n) => (OPT_INT, *n, "", Obj::NONE),
        Value::Text(t) => (OPT_TEXT, 0, t.as_str(), Obj::NONE),
        Value::Object(b) => (OPT_OBJECT, 0, key, b.0.obj),
    };
    Opt {
        key: Str::new(key),
        kind,
        reserved: 0,
        int,
        text: Str::new(text),
        obj,
    }
}

/// A backend; clones share it.
#[derive(Clone)]
pub struct Backend(pub(super) Arc<Object>);

impl Backend {
    /// As a device would use it.
    ///
    /// # Errors
    /// It is no block backend.
    pub fn as_block(&self) -> Result<BlockDevice> {
        BlockDevice::from_object(&opt("test", &Value::Object(self.clone())))
    }

    /// As a device would use it.
    ///
    /// # Errors
    /// It is no character backend.
    pub fn as_char(&self) -> Result<CharDevice> {
        CharDevice::from_object(&opt("test", &Value::Object(self.clone())))
    }

    /// Lets the backend look at its size again, as the host does when the operator says so; the size, or `None` if the backend
    /// does not follow such changes.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn look_again(&self) -> Result<Option<u64>> {
        let Some(table) = interface::<BlockResizeTable>(&self.0.obj, BLOCK_RESIZE) else {
            return Ok(None);
        };
        let (mut error, mut bytes) = (ErrorText::default(), 0);
        let sink = error.sink();
        // SAFETY: a call by the table's contract.
        let code = unsafe { (table.look_again)(self.0.obj.this, &raw mut bytes, &raw const sink) };
        if code < 0 {
            bail!("{}", error.or_errno(code));
        }
        Ok(Some(bytes))
    }

    /// The present value of the object's counter; 0 if it has none of that name.
    #[must_use]
    pub fn counter(&self, name: &str) -> u64 {
        lock(&self.0.instance.counters)
            .get(name)
            .map_or(0, |c| c.load(Ordering::Relaxed))
    }
}

/// A device; the test plays its guest.
pub struct FakeDevice {
    object: Backend,
    device: &'static DeviceTable,
    io: Option<&'static IoTable>,
}

impl FakeDevice {
    pub(super) fn new(object: Backend) -> Result<Self> {
        let device =
            interface(&object.0.obj, DEVICE).context("the object offers no vmm.device/1")?;
        let io = interface(&object.0.obj, IO);
        Ok(Self { object, device, io })
    }

    fn this(&self) -> *mut std::ffi::c_void {
        self.object.0.obj.this
    }

    fn instance(&self) -> &'static Instance {
        self.object.0.instance
    }

    /// The device's regions.
    #[must_use]
    pub fn regions(&self) -> &[RegionDesc] {
        let mut desc = std::mem::MaybeUninit::<DeviceDesc>::zeroed();
        // SAFETY: `describe` fills the description, whose arrays live as long as the object.
        unsafe {
            if (self.device.describe)(self.this(), desc.as_mut_ptr()) < 0 {
                return &[];
            }
            let desc = desc.assume_init_ref();
            if desc.region_count == 0 {
                return &[];
            }
            std::slice::from_raw_parts(desc.regions, desc.region_count)
        }
    }

    /// The PCI description, for a PCI function.
    #[must_use]
    pub fn pci(&self) -> Option<PciDesc> {
        let table: &PciTable = interface(&self.object.0.obj, PCI)?;
        let mut desc = std::mem::MaybeUninit::<PciDesc>::zeroed();
        // SAFETY: `describe` fills the description; zero is a valid value of every field.
        unsafe {
            ((table.describe)(self.this(), desc.as_mut_ptr()) == 0).then(|| desc.assume_init())
        }
    }

    /// Bodies of the PCI capabilities with their ids, in order.
    #[must_use]
    pub fn capabilities(&self) -> Vec<(u8, Vec<u8>)> {
        let Some(pci) = self.pci() else {
            return Vec::new();
        };
        let caps = if pci.cap_count == 0 {
            &[][..]
        } else {
            // SAFETY: the description's arrays live as long as the object.
            unsafe { std::slice::from_raw_parts(pci.caps, pci.cap_count) }
        };
        caps.iter()
            .map(|c| {
                // SAFETY: as above.
                let body = unsafe { std::slice::from_raw_parts(c.body, c.body_len) };
                (c.id as u8, body.to_vec())
            })
            .collect()
    }

    fn call(&self, what: &str, f: impl FnOnce(*const Sink) -> i32) -> Result<i32> {
        let mut error = ErrorText::default();
        let sink = error.sink();
        let code = f(&raw const sink);
        if code < 0 {
            bail!("{what}: {}", error.or_errno(code));
        }
        Ok(code)
    }

    /// The guest is about to run.
    ///
    /// # Errors
    /// What the device reports.
    pub fn start(&self) -> Result<()> {
        // SAFETY: a call by the table's contract.
        self.call("start", |err| unsafe {
            (self.device.start)(self.this(), err)
        })
        .map(drop)
    }

    /// Quiesces.
    ///
    /// # Errors
    /// What the device reports.
    pub fn pause(&self) -> Result<()> {
        // SAFETY: a call by the table's contract.
        self.call("pause", |err| unsafe {
            (self.device.pause)(self.this(), err)
        })
        .map(drop)
    }

    /// Undoes pause.
    ///
    /// # Errors
    /// What the device reports.
    pub fn resume(&self) -> Result<()> {
        // SAFETY: a call by the table's contract.
        self.call("resume", |err| unsafe {
            (self.device.resume)(self.this(), err)
        })
        .map(drop)
    }

    /// Back to power-on state; the device is paused.
    ///
    /// # Errors
    /// What the device reports.
    pub fn reset(&self) -> Result<()> {
        // SAFETY: a call by the table's contract.
        self.call("reset", |err| unsafe {
            (self.device.reset)(self.this(), err)
        })
        .map(drop)
    }

    /// The guest will not run again.
    pub fn stop(&self) {
        // SAFETY: a call by the table's contract.
        unsafe { (self.device.stop)(self.this()) };
    }

    /// A disk of the device has grown; false if the device does not follow that.
    pub fn resized(&self) -> bool {
        let table = interface::<DeviceResizeTable>(&self.object.0.obj, DEVICE_RESIZE);
        // SAFETY: a call by the table's contract.
        table.map(|t| unsafe { (t.resized)(self.this()) }).is_some()
    }

    fn snapshot(&self) -> Result<&'static SnapshotTable> {
        interface(&self.object.0.obj, SNAPSHOT).context("the device has no saved state")
    }

    /// The state and its version; the device is paused.
    ///
    /// # Errors
    /// What the device reports.
    pub fn save(&self) -> Result<(u32, Vec<u8>)> {
        let table = self.snapshot()?;
        let mut state = ErrorText::default();
        let out = state.sink();
        // SAFETY: a call by the table's contract.
        let version = self.call("save", |err| unsafe {
            (table.save)(self.this(), &raw const out, err)
        })?;
        Ok((version.unsigned_abs(), state.bytes()))
    }

    /// Loads state into a device that has not started.
    ///
    /// # Errors
    /// What the device reports.
    pub fn load(&self, version: u32, state: &[u8]) -> Result<()> {
        let table = self.snapshot()?;
        // SAFETY: a call by the table's contract.
        self.call("load", |err| unsafe {
            (table.load)(self.this(), version, state.as_ptr(), state.len(), err)
        })
        .map(drop)
    }

    /// The guest reads a register; the result is masked to `width` bytes as the real host does.
    #[must_use]
    pub fn read(&self, region: u32, offset: u64, width: u32) -> u64 {
        // SAFETY: a call by the table's contract.
        let value = self.io.map_or(u64::MAX, |io| unsafe {
            (io.read)(self.this(), region, offset, width)
        });
        if width >= 8 {
            value
        } else {
            value & ((1 << (8 * width)) - 1)
        }
    }

    /// The guest writes a register: rings a doorbell if one is bound there, else reaches the device.
    pub fn write(&self, region: u32, offset: u64, width: u32, value: u64) {
        for (bell, fd) in lock(&self.instance().doorbells).iter() {
            let place = bell.region == region
                && bell.offset == offset
                && (bell.width == 0 || bell.width == width);
            if place && bell.value.is_none_or(|v| v == value) {
                use std::os::fd::AsFd;
                return crate::eventfd::signal(fd.as_fd());
            }
        }
        if let Some(io) = self.io {
            // SAFETY: a call by the table's contract.
            unsafe { (io.write)(self.this(), region, offset, width, value) };
        }
    }

    /// The guest reads a live capability.
    #[must_use]
    pub fn read_capability(&self, cap: u32, offset: u32, width: u32) -> u32 {
        let table: Option<&PciCapabilityTable> = interface(&self.object.0.obj, PCI_CAPABILITY);
        // SAFETY: a call by the table's contract.
        table.map_or(u32::MAX, |t| unsafe {
            (t.read)(self.this(), cap, offset, width)
        })
    }

    /// The guest writes to a live capability.
    pub fn write_capability(&self, cap: u32, offset: u32, width: u32, value: u32) {
        if let Some(table) = interface::<PciCapabilityTable>(&self.object.0.obj, PCI_CAPABILITY) {
            // SAFETY: a call by the table's contract.
            unsafe { (table.write)(self.this(), cap, offset, width, value) };
        }
    }

    /// Whether the guest has MSI-X enabled (as at first) or uses INTx.
    pub fn enable_msix(&self, on: bool) {
        self.instance().msix.store(on, Ordering::Relaxed);
    }

    /// Whether MSI-X is enabled.
    #[must_use]
    pub fn msix_enabled(&self) -> bool {
        self.instance().msix.load(Ordering::Relaxed)
    }

    /// Whether a thread of the device has last asked for a wake-up that interrupts nobody.
    #[must_use]
    pub fn gathers(&self) -> bool {
        self.instance().gathering.load(Ordering::Relaxed)
    }

    /// Lets the host answer "not on this machine" to doorbells bound from now on.
    pub fn refuse_doorbells(&self) {
        self.instance()
            .refuse_doorbells
            .store(true, Ordering::Relaxed);
    }

    /// How often MSI-X vector `vector` was raised since the last call.
    #[must_use]
    pub fn interrupts(&self, vector: u32) -> u64 {
        lock(&self.instance().vectors)
            .get(&vector)
            .map_or(0, crate::EventFd::drain)
    }

    /// Whether pin `pin` is high.
    #[must_use]
    pub fn pin(&self, pin: u32) -> bool {
        lock(&self.instance().pins)
            .get(&pin)
            .is_some_and(|p| p.high)
    }

    /// How often pin `pin` has gone from low to high.
    #[must_use]
    pub fn pin_rises(&self, pin: u32) -> u64 {
        lock(&self.instance().pins).get(&pin).map_or(0, |p| p.rises)
    }

    /// The present value of the device's counter; 0 if it has none of that name.
    #[must_use]
    pub fn counter(&self, name: &str) -> u64 {
        self.object.counter(name)
    }
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        self.stop();
    }
}

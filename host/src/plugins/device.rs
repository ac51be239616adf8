//! A device that a plugin made: its description in the machine's terms, its registers on the bus, its life cycle.

#![allow(unsafe_code)] // reads the plugin's description and calls its tables

use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use vmm_abi::Sink;
use vmm_abi::device::{
    CAP_LIVE, DEVICE, DEVICE_RESIZE, DeviceDesc, DeviceResizeTable, DeviceTable, IO, IoTable, PCI,
    PCI_CAPABILITY, PciCapabilityTable, PciDesc, PciTable, PinDesc, REGION_BAR_IO,
    REGION_BAR_MEM32, REGION_BAR_MEM64, REGION_MMIO, REGION_PIO, RegionDesc, TRIGGER_LEVEL,
};

use super::instance::{Instance, text};
use super::object::{Collected, Object};
use crate::bus::{Registers, ones};
use crate::hypervisor::Space;
use crate::machine::{IsaDesc, IsaPin, IsaRegion};
use crate::pci::{BarDesc, BarKind, CapDesc, LiveCapability, PciFunctionDesc};

/// More of anything than a real device has; keeps a confused plugin from sending the host through all of memory.
const MAX_ITEMS: usize = 256;

/// A device.
pub struct Device {
    object: Arc<Object>,
    table: &'static DeviceTable,
    io: Option<&'static IoTable>,
    /// What it says it is.
    pub description: Description,
}

/// What a device says it is.
pub enum Description {
    /// At fixed addresses.
    Isa(IsaDesc),
    /// A PCI function.
    Pci(PciFunctionDesc),
}

impl Device {
    /// Asks the object what it is.
    ///
    /// # Errors
    /// It is no device, or its description makes no sense.
    pub fn new(object: Arc<Object>) -> Result<Self> {
        let table: &'static DeviceTable = object
            .table(DEVICE)?
            .with_context(|| format!("the plugin's object is no device: it offers no {DEVICE}"))?;
        let io = object.table(IO)?;
        let mut desc = MaybeUninit::<DeviceDesc>::zeroed();
        // SAFETY: a call by the table's contract; on success the description is filled, and its arrays live as long as the object.
        let (desc, regions, pins) = unsafe {
            let code = (table.describe)(object.this(), desc.as_mut_ptr());
            if code < 0 {
                bail!(
                    "it does not describe itself: {}",
                    Collected::default().or_errno(code)
                );
            }
            let desc = desc.assume_init();
            (
                desc,
                items(desc.regions, desc.region_count)?,
                items(desc.pins, desc.pin_count)?,
            )
        };
        if !regions.is_empty() && io.is_none() {
            bail!("it has register regions but offers no {IO}");
        }
        let description = match object.table::<PciTable>(PCI)? {
            Some(pci) => Description::Pci(pci_function(&object, pci, regions)?),
            None => {
                let hid = Some(text(&desc.acpi_hid).to_owned()).filter(|hid| !hid.is_empty());
                Description::Isa(isa_device(regions, pins, hid)?)
            }
        };
        Ok(Self {
            object,
            table,
            io,
            description,
        })
    }

    /// Its side of the host.
    pub fn instance(&self) -> &'static Instance {
        self.object.instance()
    }

    /// What the bus calls for the device's regions.
    pub fn registers(&self) -> Arc<dyn Registers> {
        Arc::new(DeviceRegisters {
            object: self.object.clone(),
            io: self.io,
            reads: self.instance().counter("register_reads"),
            writes: self.instance().counter("register_writes"),
        })
    }

    /// What PCI calls for the device's live capabilities.
    ///
    /// # Errors
    /// The device offers a skewed table.
    pub fn live_capability(&self) -> Result<Option<Arc<dyn LiveCapability>>> {
        let table = self.object.table::<PciCapabilityTable>(PCI_CAPABILITY)?;
        Ok(table.map(|table| {
            Arc::new(DeviceCapability {
                object: self.object.clone(),
                table,
            }) as Arc<dyn LiveCapability>
        }))
    }

    fn control(&self, what: &str, call: impl FnOnce(*const Sink) -> i32) -> Result<()> {
        if self.instance().failed() {
            return Ok(());
        }
        let mut error = Collected::default();
        let sink = error.sink();
        match call(&raw const sink) {
            code if code < 0 && !self.instance().goes_on() => bail!(
                "{} does not {what}: {}",
                self.instance().label(),
                error.or_errno(code)
            ),
            _ => Ok(()),
        }
    }

    /// The guest is about to run.
    ///
    /// # Errors
    /// What the device reports.
    pub fn start(&self) -> Result<()> {
        // SAFETY: calls by the table's contract: control thread, in the state the host keeps.
        self.control("start", |err| unsafe {
            (self.table.start)(self.object.this(), err)
        })
    }

    /// Quiesces the device; no vCPU runs.
    ///
    /// # Errors
    /// What the device reports.
    pub fn pause(&self) -> Result<()> {
        // SAFETY: as in `start`.
        self.control("pause", |err| unsafe {
            (self.table.pause)(self.object.this(), err)
        })
    }

    /// Undoes pause.
    ///
    /// # Errors
    /// What the device reports.
    pub fn resume(&self) -> Result<()> {
        // SAFETY: as in `start`.
        self.control("resume", |err| unsafe {
            (self.table.resume)(self.object.this(), err)
        })
    }

    /// Whether it was created with one of `backends`.
    pub fn uses_any(&self, backends: &[&Arc<Object>]) -> bool {
        self.object.uses_any(backends)
    }

    /// Tells the device that a disk of its has grown; false if it does not follow that. Started.
    ///
    /// # Errors
    /// The device offers a skewed table.
    pub fn resized(&self) -> Result<bool> {
        let Some(table) = self.object.table::<DeviceResizeTable>(DEVICE_RESIZE)? else {
            return Ok(false);
        };
        // SAFETY: as in `start`.
        unsafe { (table.resized)(self.object.this()) };
        Ok(true)
    }

    /// Back to power-on state; paused before and after.
    ///
    /// # Errors
    /// What the device reports.
    pub fn reset(&self) -> Result<()> {
        // SAFETY: as in `start`.
        self.control("reset", |err| unsafe {
            (self.table.reset)(self.object.this(), err)
        })
    }

    /// The guest will not run again: stops the device and releases it.
    pub fn end(&self) {
        // SAFETY: as in `start`.
        unsafe { (self.table.stop)(self.object.this()) };
        self.object.release();
    }
}

/// An array of a description.
///
/// # Safety
/// `ptr` has `count` elements that live as long as the object.
unsafe fn items<T>(ptr: *const T, count: usize) -> Result<&'static [T]> {
    if count > MAX_ITEMS {
        bail!("its description lists {count} parts, more than any device has");
    }
    if count == 0 {
        return Ok(&[]);
    }
    if ptr.is_null() {
        bail!("its description has {count} parts at a null pointer");
    }
    // SAFETY: the caller's promise. The caller copies what it needs at once.
    Ok(unsafe { std::slice::from_raw_parts(ptr, count) })
}

fn isa_device(regions: &[RegionDesc], pins: &[PinDesc], hid: Option<String>) -> Result<IsaDesc> {
    let regions = regions.iter().map(|r| {
        let space = match r.kind {
            REGION_PIO => Space::Pio,
            REGION_MMIO => Space::Mmio,
            REGION_BAR_IO | REGION_BAR_MEM32 | REGION_BAR_MEM64 => bail!(
                "region {} is a BAR, but the device is no PCI function",
                r.id
            ),
            kind => bail!(
                "region {} is of a kind that this host does not know: {kind}",
                r.id
            ),
        };
        Ok(IsaRegion {
            id: r.id,
            space,
            address: r.address,
            size: r.size,
        })
    });
    let pins = pins.iter().map(|p| {
        let Ok(irq) = u8::try_from(p.irq) else {
            bail!("ISA interrupt {} is out of range: 0 to 15", p.irq)
        };
        Ok(IsaPin {
            irq,
            level: p.trigger == TRIGGER_LEVEL,
        })
    });
    Ok(IsaDesc {
        regions: regions.collect::<Result<_>>()?,
        pins: pins.collect::<Result<_>>()?,
        hid,
    })
}

fn pci_function(
    object: &Object,
    table: &PciTable,
    regions: &[RegionDesc],
) -> Result<PciFunctionDesc> {
    let mut desc = MaybeUninit::<PciDesc>::zeroed();
    // SAFETY: a call by the table's contract; on success the description is filled, and its arrays live as long as the object.
    let (desc, caps) = unsafe {
        let code = (table.describe)(object.this(), desc.as_mut_ptr());
        if code < 0 {
            bail!(
                "it does not describe its PCI function: {}",
                Collected::default().or_errno(code)
            );
        }
        let desc = desc.assume_init();
        (desc, items(desc.caps, desc.cap_count)?)
    };
    let bars = regions.iter().map(|r| {
        let kind = match r.kind {
            REGION_BAR_MEM32 => BarKind::Mmio32,
            REGION_BAR_MEM64 => BarKind::Mmio64,
            REGION_BAR_IO => BarKind::Io,
            REGION_PIO | REGION_MMIO => bail!(
                "region {} is at a fixed address, but the device is a PCI function",
                r.id
            ),
            kind => bail!(
                "region {} is of a kind that this host does not know: {kind}",
                r.id
            ),
        };
        let index = u8::try_from(r.bar).with_context(|| format!("there is no BAR {}", r.bar))?;
        Ok(BarDesc {
            index,
            kind,
            size: r.size,
            region: r.id,
            prefetch: false,
        })
    });
    let caps = caps.iter().map(|c| {
        // SAFETY: the description's arrays live as long as the object.
        let body = unsafe { items(c.body, c.body_len)? }.to_vec();
        let id =
            u8::try_from(c.id).with_context(|| format!("there is no capability id {:#x}", c.id))?;
        Ok(CapDesc {
            id,
            body,
            live: c.flags & CAP_LIVE != 0,
        })
    });
    Ok(PciFunctionDesc {
        vendor: desc.vendor,
        device: desc.device,
        class: desc.class,
        revision: desc.revision,
        subsystem_vendor: desc.subsystem_vendor,
        subsystem: desc.subsystem,
        intx: desc.intx != 0,
        msix_vectors: desc.msix_vectors,
        msix_bar: u8::try_from(desc.msix_bar).context("there is no such MSI-X BAR")?,
        bars: bars.collect::<Result<_>>()?,
        caps: caps.collect::<Result<_>>()?,
    })
}

struct DeviceRegisters {
    object: Arc<Object>,
    io: Option<&'static IoTable>,
    /// Counters of the accesses that left the guest.
    reads: &'static AtomicU64,
    writes: &'static AtomicU64,
}

impl Registers for DeviceRegisters {
    fn read(&self, region: u32, offset: u64, width: u8) -> u64 {
        self.reads.fetch_add(1, Ordering::Relaxed);
        match self.io {
            // SAFETY: a call by the table's contract: any vCPU thread, inside the region.
            Some(io) if !self.object.instance().failed() => unsafe {
                (io.read)(self.object.this(), region, offset, width.into()) & ones(width)
            },
            _ => ones(width),
        }
    }

    fn write(&self, region: u32, offset: u64, width: u8, value: u64) {
        self.writes.fetch_add(1, Ordering::Relaxed);
        if let Some(io) = self.io
            && !self.object.instance().failed()
        {
            // SAFETY: as in `read`.
            unsafe { (io.write)(self.object.this(), region, offset, width.into(), value) };
        }
    }
}

struct DeviceCapability {
    object: Arc<Object>,
    table: &'static PciCapabilityTable,
}

impl LiveCapability for DeviceCapability {
    fn read(&self, cap: u32, offset: u32, width: u8) -> u32 {
        if self.object.instance().failed() {
            return u32::MAX;
        }
        // SAFETY: a call by the table's contract: any vCPU thread.
        unsafe { (self.table.read)(self.object.this(), cap, offset, width.into()) }
    }

    fn write(&self, cap: u32, offset: u32, width: u8, value: u32) {
        if !self.object.instance().failed() {
            // SAFETY: as in `read`.
            unsafe { (self.table.write)(self.object.this(), cap, offset, width.into(), value) };
        }
    }
}

//! What a device offers: regions, PCI description, life cycle, events, saved state.

use core::ffi::c_void;

use crate::{Sink, Str};

/// Interface name of [`DeviceTable`]; every device has it.
pub const DEVICE: &str = "vmm.device/1";
/// Interface name of [`IoTable`]; every device with a region has it.
pub const IO: &str = "vmm.io/1";
/// Interface name of [`PciTable`]; a device that has it is a PCI function.
pub const PCI: &str = "vmm.pci/1";
/// Interface name of [`PciCapabilityTable`]; needed by devices with a `CAP_LIVE` capability.
pub const PCI_CAPABILITY: &str = "vmm.pci.capability/1";
/// Interface name of [`EventsTable`]; needed by objects that use `vmm.host.event/1` watches or timers.
pub const EVENTS: &str = "vmm.events/1";
/// Interface name of [`SnapshotTable`].
pub const SNAPSHOT: &str = "vmm.snapshot/1";
/// Interface name of [`DeviceResizeTable`]; offered by devices that tell their guest of a disk that has grown.
pub const DEVICE_RESIZE: &str = "vmm.device.resize/1";

/// [`RegionDesc::kind`]: I/O ports at a fixed address.
pub const REGION_PIO: u32 = 1;
/// [`RegionDesc::kind`]: guest physical addresses at a fixed place.
pub const REGION_MMIO: u32 = 2;
/// [`RegionDesc::kind`]: a memory BAR below 4 GiB.
pub const REGION_BAR_MEM32: u32 = 3;
/// [`RegionDesc::kind`]: a memory BAR anywhere; takes BAR registers `bar` and `bar + 1`.
pub const REGION_BAR_MEM64: u32 = 4;
/// [`RegionDesc::kind`]: an I/O port BAR.
pub const REGION_BAR_IO: u32 = 5;

/// [`PinDesc::trigger`]: each rising edge is an interrupt.
pub const TRIGGER_EDGE: u32 = 0;
/// [`PinDesc::trigger`]: interrupting for as long as the pin is high; the line may be shared.
pub const TRIGGER_LEVEL: u32 = 1;

/// [`CapDesc::flags`]: the guest's accesses to the capability's body go through [`PciCapabilityTable`].
pub const CAP_LIVE: u32 = 1;

/// [`EventsTable::ready`] `events`: data can be read (`POLLIN`).
pub const EVENT_READ: u32 = 1;
/// [`EventsTable::ready`] `events`: data can be written (`POLLOUT`).
pub const EVENT_WRITE: u32 = 4;
/// [`EventsTable::ready`] `events`: error on the descriptor (`POLLERR`); reported whether asked for or not.
pub const EVENT_ERROR: u32 = 8;
/// [`EventsTable::ready`] `events`: the other end is gone (`POLLHUP`); reported whether asked for or not.
pub const EVENT_HANGUP: u32 = 16;
/// [`EventsTable::ready`] `events`: the timer of this token has expired.
pub const EVENT_TIMER: u32 = 0x100;

/// A numbered window of guest-visible registers. The device never learns where a BAR was placed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct RegionDesc {
    /// The device's own number for it, passed to [`IoTable`].
    pub id: u32,
    /// `REGION_*`.
    pub kind: u32,
    /// BAR number 0 to 5, for BAR kinds.
    pub bar: u32,
    /// Unused, zero.
    pub reserved: u32,
    /// Guest address, for PIO and MMIO kinds.
    pub address: u64,
    /// Bytes; for BARs a power of two (memory at least 16, I/O 4 to 256, except that virtio's legacy I/O BAR may be larger).
    pub size: u64,
}

/// An ISA interrupt pin. A PCI function's INTx is pin 0 and is not listed here.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct PinDesc {
    /// ISA IRQ, 0 to 15.
    pub irq: u32,
    /// `TRIGGER_*`.
    pub trigger: u32,
}

/// What a device is made of. The arrays and text stay valid and unchanged until release.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct DeviceDesc {
    /// Regions.
    pub regions: *const RegionDesc,
    /// How many.
    pub region_count: usize,
    /// ISA interrupt pins; the index is the pin number for `vmm.host.irq/1`.
    pub pins: *const PinDesc,
    /// How many.
    pub pin_count: usize,
    /// ACPI hardware id (`PNP0501`) under which the guest's ACPI tables list the device, or empty: not listed.
    pub acpi_hid: Str,
}

/// `vmm.device/1`: description and life cycle. All on the control thread.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct DeviceTable {
    /// Fills `out`. State: created. The answer never changes. Returns 0 or `-errno`.
    pub describe: unsafe extern "C" fn(this: *mut c_void, out: *mut DeviceDesc) -> i32,
    /// The guest is about to run for the first time; interrupts, doorbells and watches may be asked for from here on.
    /// State: created → started. No vCPU runs until it returns.
    pub start: unsafe extern "C" fn(this: *mut c_void, err: *const Sink) -> i32,
    /// Quiesce: when it returns 0, no thread of the device touches guest memory or raises an interrupt, and requests
    /// in flight are finished or part of the state. State: started → paused; no vCPU runs.
    pub pause: unsafe extern "C" fn(this: *mut c_void, err: *const Sink) -> i32,
    /// Undoes pause. State: paused → started; no vCPU runs until it returns.
    pub resume: unsafe extern "C" fn(this: *mut c_void, err: *const Sink) -> i32,
    /// Back to power-on state, as by the platform's reset line. State: paused; stays paused.
    pub reset: unsafe extern "C" fn(this: *mut c_void, err: *const Sink) -> i32,
    /// The guest will not run again: finish what is in flight, end threads, flush. State: any → stopped.
    pub stop: unsafe extern "C" fn(this: *mut c_void),
}

/// `vmm.io/1`: register access. Any vCPU thread, several at once; state started. Must not block: a vCPU waits.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct IoTable {
    /// Reads `width` (1, 2, 4, 8) bytes at `offset` of region `region`. `offset + width` may lie beyond registers
    /// that the device has, never beyond the region. The host masks the result to `width`.
    pub read: unsafe extern "C" fn(this: *mut c_void, region: u32, offset: u64, width: u32) -> u64,
    /// Writes the low `width` bytes of `value`.
    pub write:
        unsafe extern "C" fn(this: *mut c_void, region: u32, offset: u64, width: u32, value: u64),
}

/// A capability in PCI configuration space (PCI 3.0 section 6.7), in the order in which the guest finds them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct CapDesc {
    /// Capability id; 0x09 is vendor specific. MSI-X (0x11) is the host's: ask for it by `msix_vectors`.
    pub id: u32,
    /// `CAP_*`.
    pub flags: u32,
    /// The bytes after id and next pointer; read-only to the guest unless `CAP_LIVE`.
    pub body: *const u8,
    /// How many, at most 190 in all.
    pub body_len: usize,
}

/// What a PCI function is. `caps` stays valid and unchanged until release.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct PciDesc {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Class, subclass, programming interface: 24 bits, class highest.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Whether the function has an INTx pin (0 or 1); the host picks which.
    pub intx: u8,
    /// MSI-X vectors, 0 to 2048.
    pub msix_vectors: u16,
    /// Memory BAR number that the host makes for the MSI-X table and pending bits; no region may use it.
    pub msix_bar: u32,
    /// Unused, zero.
    pub reserved: u32,
    /// Capabilities.
    pub caps: *const CapDesc,
    /// How many.
    pub cap_count: usize,
}

/// `vmm.pci/1`. The host owns configuration space, BAR placement, MSI-X table and masking.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct PciTable {
    /// Fills `out`. Control thread; state created. The answer never changes. Returns 0 or `-errno`.
    pub describe: unsafe extern "C" fn(this: *mut c_void, out: *mut PciDesc) -> i32,
}

/// `vmm.pci.capability/1`: the guest's accesses to capabilities marked `CAP_LIVE`. Any vCPU thread; state started.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct PciCapabilityTable {
    /// Reads `width` (1, 2, 4) bytes at `offset` into the body of capability number `cap` (its index in the description).
    pub read: unsafe extern "C" fn(this: *mut c_void, cap: u32, offset: u32, width: u32) -> u32,
    /// Writes there.
    pub write:
        unsafe extern "C" fn(this: *mut c_void, cap: u32, offset: u32, width: u32, value: u32),
}

/// `vmm.events/1`: on the I/O thread, never two at once for one object.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct EventsTable {
    /// The descriptor watched with `token` is ready, or the timer `token` has expired. State: from the first watch until
    /// release, also while paused: a paused device notes it and acts on resume. Must not block for long: other
    /// devices share the thread.
    pub ready: unsafe extern "C" fn(this: *mut c_void, token: u64, events: u32),
}

/// `vmm.snapshot/1`: state that survives the process. Control thread; state paused (save) or created (load).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct SnapshotTable {
    /// Writes the state to `out`; returns its version (from 1) or `-errno`.
    pub save: unsafe extern "C" fn(this: *mut c_void, out: *const Sink, err: *const Sink) -> i32,
    /// Takes state of `version`, one that the manifest's `state` range promises. Returns 0 or `-errno`; after a failure
    /// the device is as created.
    pub load: unsafe extern "C" fn(
        this: *mut c_void,
        version: u32,
        data: *const u8,
        len: usize,
        err: *const Sink,
    ) -> i32,
}

/// `vmm.device.resize/1`: the other side of [`crate::block::BlockResizeTable`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "layout", derive(abi_stable::StableAbi))]
pub struct DeviceResizeTable {
    /// A block backend that the device was created with has become larger: the device asks those that it has for their size and
    /// tells the guest, in the way of its own specification. Control thread; state started, vCPUs may run.
    pub resized: unsafe extern "C" fn(this: *mut c_void),
}

//! A device: the trait that its author implements and the words that describe it.

use crate::{Events, Host, Options, Result};

/// A device of a virtual machine. All methods take `&self`: register access comes from several vCPU threads at once.
pub trait Device: Sized + Send + Sync + 'static {
    /// Version of the state that [`Device::save`] writes; `None`: the device can't be saved.
    const STATE_VERSION: Option<u32> = None;

    /// Whether the device tells its guest of a disk that has grown; then it has [`Device::resized`].
    const FOLLOWS_RESIZE: bool = false;

    /// Makes the device from validated options. Control thread; the guest does not run. Interrupts, doorbells and watches come
    /// in [`Device::start`].
    ///
    /// # Errors
    /// What the operator can mend: the text names it. The host adds the device's name.
    fn create(options: &Options<'_>, host: &Host) -> Result<Self>;

    /// What the device is made of. Control thread, once, right after create.
    fn describe(&self) -> Description;

    /// A guest read of `width` (1, 2, 4, 8) bytes. Any vCPU thread; must not block. The host masks the result to `width`.
    fn read(&self, region: u32, offset: u64, width: u32) -> u64 {
        let _ = (region, offset, width);
        u64::MAX
    }

    /// A guest write of the low `width` bytes of `value`. Any vCPU thread; must not block.
    fn write(&self, region: u32, offset: u64, width: u32, value: u64) {
        let _ = (region, offset, width, value);
    }

    /// The guest reads a capability marked live: `cap` is its index in the description. Any vCPU thread.
    fn read_capability(&self, cap: u32, offset: u32, width: u32) -> u32 {
        let _ = (cap, offset, width);
        u32::MAX
    }

    /// The guest writes to a live capability.
    fn write_capability(&self, cap: u32, offset: u32, width: u32, value: u32) {
        let _ = (cap, offset, width, value);
    }

    /// The guest is about to run for the first time. Control thread.
    ///
    /// # Errors
    /// The VM does not start.
    fn start(&self) -> Result<()> {
        Ok(())
    }

    /// Quiesce: on return no thread of the device touches guest memory or raises interrupts. Control thread; no vCPU runs.
    ///
    /// # Errors
    /// The device can't be quiesced.
    fn pause(&self) -> Result<()> {
        Ok(())
    }

    /// Undoes [`Device::pause`].
    ///
    /// # Errors
    /// The device can't go on.
    fn resume(&self) -> Result<()> {
        Ok(())
    }

    /// Back to power-on state. Control thread; paused before and after.
    ///
    /// # Errors
    /// The device can't be reset.
    fn reset(&self) -> Result<()>;

    /// The guest will not run again: finish what is in flight, end threads, flush. Control thread.
    fn stop(&self) {}

    /// A block backend that the device was created with has become larger: asks for its size ([`crate::BlockDevice::bytes`]), and
    /// tells the guest. Control thread; started, and vCPUs may run.
    fn resized(&self) {}

    /// A watched descriptor is ready or a timer has expired. I/O thread, never two at once for one device.
    fn ready(&self, token: u64, events: Events) {
        let _ = (token, events);
    }

    /// The device's state as bytes, in [`Device::STATE_VERSION`]. Control thread; paused.
    ///
    /// # Errors
    /// The state can't be saved now.
    fn save(&self) -> Result<Vec<u8>> {
        anyhow::bail!("this device has no state to save")
    }

    /// Takes saved state. Control thread; created.
    ///
    /// # Errors
    /// The bytes are not state of that version.
    fn load(&self, version: u32, state: &[u8]) -> Result<()> {
        let _ = state;
        anyhow::bail!("this device can't load state of version {version}")
    }
}

/// What a device is made of.
#[derive(Clone, Debug, Default)]
pub struct Description {
    /// Windows of registers.
    pub regions: Vec<Region>,
    /// ISA interrupt pins; the index is the number for [`Host::set_pin`]. A PCI function lists none: its INTx is pin 0.
    pub pins: Vec<Pin>,
    /// ACPI hardware id under which the guest's tables list the device, for example `PNP0501`.
    pub acpi_hid: Option<String>,
    /// Set for a PCI function.
    pub pci: Option<PciDescription>,
}

/// A numbered window of guest-visible registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The device's own number for it.
    pub id: u32,
    /// Where the guest sees it.
    pub kind: RegionKind,
    /// Bytes; for a BAR a power of two.
    pub size: u64,
}

/// Where the guest sees a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// I/O ports from this one on.
    Pio(u64),
    /// Guest physical addresses from this one on.
    Mmio(u64),
    /// Memory BAR of this number, below 4 GiB.
    Bar32(u32),
    /// Memory BAR of this number and the next, anywhere.
    Bar64(u32),
    /// I/O BAR of this number.
    BarIo(u32),
}

impl Region {
    /// I/O ports from `port` on.
    #[must_use]
    pub const fn pio(id: u32, port: u64, size: u64) -> Self {
        Self {
            id,
            kind: RegionKind::Pio(port),
            size,
        }
    }
}

/// An ISA interrupt pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin {
    /// ISA IRQ, 0 to 15.
    pub irq: u32,
    /// How it interrupts.
    pub trigger: Trigger,
}

/// How a pin interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Each rising edge.
    Edge,
    /// For as long as it is high; the line may be shared.
    Level,
}

/// What a PCI function is. The host owns configuration space, BAR placement, MSI-X table and masking.
#[derive(Clone, Debug, Default)]
pub struct PciDescription {
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
    /// Whether it has an INTx pin.
    pub intx: bool,
    /// MSI-X vectors, 0 to 2048.
    pub msix_vectors: u16,
    /// BAR number that the host makes for the MSI-X table.
    pub msix_bar: u32,
    /// Capabilities, in the order in which the guest finds them.
    pub capabilities: Vec<Capability>,
}

/// A capability in PCI configuration space.
#[derive(Clone, Debug, Default)]
pub struct Capability {
    /// Capability id; 0x09 is vendor specific.
    pub id: u8,
    /// The bytes after id and next pointer.
    pub body: Vec<u8>,
    /// The guest's accesses go to [`Device::read_capability`] and [`Device::write_capability`]; otherwise it is read-only.
    pub live: bool,
}

//! The modern virtio PCI transport (virtio 1.2 section 4.1).

use crate::io::{read8, read16, read32, write8, write16, write32};
use crate::pci::{Bar, Function, Msix};
use crate::virtqueue::Queue;
use crate::{clock, interrupts, memory};

/// Device status bits (2.1).
pub const ACKNOWLEDGE: u8 = 1;
/// The driver knows the device.
pub const DRIVER: u8 = 2;
/// The driver is ready.
pub const DRIVER_OK: u8 = 4;
/// The features are agreed.
pub const FEATURES_OK: u8 = 8;
/// The device has failed and wants a reset.
pub const NEEDS_RESET: u8 = 0x40;

/// Feature bits of the ring and transport (6).
pub const F_INDIRECT: u64 = 1 << 28;
/// Event index.
pub const F_EVENT_INDEX: u64 = 1 << 29;
/// The modern interface.
pub const F_VERSION_1: u64 = 1 << 32;

/// MSI-X entry "none" (4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;

/// A modern device with MSI-X.
pub struct Device {
    /// Its MSI-X table.
    pub msix: Msix,
    common: u64,
    notify: u64,
    notify_multiplier: u32,
    isr: u64,
    config: u64,
}

impl Device {
    /// Finds the structures by the vendor capabilities. The error says what is missing or wrong.
    pub fn find(function: Function) -> Result<Self, &'static str> {
        let mut places = [0u64; 6];
        let mut multiplier = 0;
        let mut wrong = None;
        function.capabilities(|at, id| {
            let kind = function.read8(at + 3);
            if id != 9 || !(1..=4).contains(&kind) || places[usize::from(kind)] != 0 {
                return;
            }
            let (offset, length) = (function.read32(at + 8), function.read32(at + 12));
            match function.bar(function.read8(at + 4)) {
                Some(Bar {
                    io: false,
                    address,
                    size,
                    ..
                }) if u64::from(offset) + u64::from(length) <= size => {
                    places[usize::from(kind)] = memory::map(address) + u64::from(offset);
                }
                // Notifications by port: another capability has them in memory.
                Some(Bar { io: true, .. }) if kind == 2 => return,
                Some(Bar { io: false, .. }) => wrong = Some("a capability reaches beyond its BAR"),
                _ => wrong = Some("a capability names no memory BAR"),
            }
            if kind == 2 {
                multiplier = function.read32(at + 16);
            }
        });
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        if places[1..=4].contains(&0) {
            return Err("a capability (common, notify, ISR, device) is missing");
        }
        Ok(Device {
            msix: function.msix().ok_or("no MSI-X")?,
            common: places[1],
            notify: places[2],
            notify_multiplier: multiplier,
            isr: places[3],
            config: places[4],
        })
    }

    /// Status register.
    pub fn status(&self) -> u8 {
        read8(self.common + 0x14)
    }

    /// Sets the status register.
    pub fn set_status(&self, status: u8) {
        write8(self.common + 0x14, status);
    }

    /// Resets the device and waits until it says so.
    pub fn reset(&self) -> bool {
        self.set_status(0);
        clock::wait_until(1000, || self.status() == 0)
    }

    /// The features it offers.
    pub fn features(&self) -> u64 {
        let half = |select| {
            write32(self.common, select);
            u64::from(read32(self.common + 4))
        };
        half(0) | half(1) << 32
    }

    /// Resets, then agrees on features; false if the device refuses them.
    pub fn negotiate(&self, features: u64) -> bool {
        if !self.reset() {
            return false;
        }
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        for select in 0..2u32 {
            write32(self.common + 8, select);
            write32(self.common + 0x0c, (features >> (32 * select)) as u32);
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    /// Number of queues.
    pub fn queues(&self) -> u16 {
        read16(self.common + 0x12)
    }

    /// Largest size of a queue.
    pub fn queue_size(&self, index: u16) -> u16 {
        write16(self.common + 0x16, index);
        read16(self.common + 0x18)
    }

    /// Sets a queue up, with an MSI-X entry if it uses one, and enables it; false if a register doesn't keep its value.
    pub fn enable_queue(&self, index: u16, queue: &Queue, entry: Option<u16>) -> bool {
        let entry = entry.unwrap_or(NO_VECTOR);
        write16(self.common + 0x16, index);
        write16(self.common + 0x18, queue.size);
        write16(self.common + 0x1a, entry);
        let (descriptors, available, used) = queue.addresses();
        for (offset, address) in [(0x20, descriptors), (0x28, available), (0x30, used)] {
            // Two halves, as 4.1.3.1 wants of a driver.
            write32(self.common + offset, address as u32);
            write32(self.common + offset + 4, (address >> 32) as u32);
        }
        let kept = read16(self.common + 0x18) == queue.size
            && read16(self.common + 0x1a) == entry
            && u64::from(read32(self.common + 0x20)) == descriptors;
        write16(self.common + 0x1c, 1);
        kept && read16(self.common + 0x1c) == 1
    }

    /// Assigns an MSI-X entry to configuration changes; false if the device can't.
    pub fn set_config_entry(&self, entry: u16) -> bool {
        write16(self.common + 0x10, entry);
        read16(self.common + 0x10) == entry
    }

    /// Where to write a queue's index to notify it.
    pub fn doorbell(&self, index: u16) -> u64 {
        write16(self.common + 0x16, index);
        self.notify + u64::from(read16(self.common + 0x1e)) * u64::from(self.notify_multiplier)
    }

    /// Configuration generation.
    pub fn generation(&self) -> u8 {
        read8(self.common + 0x15)
    }

    /// ISR status; reading clears it.
    pub fn isr(&self) -> u8 {
        read8(self.isr)
    }

    /// Device configuration, four bytes.
    pub fn config32(&self, offset: u64) -> u32 {
        read32(self.config + offset)
    }

    /// Device configuration, two bytes.
    pub fn config16(&self, offset: u64) -> u16 {
        read16(self.config + offset)
    }

    /// MSI-X entry 0 for configuration, 1.. for the queues; vectors as `interrupts` names them.
    pub fn route_interrupts(&self, queues: u16) {
        self.msix.set(0, interrupts::CONFIG);
        for queue in 0..queues {
            self.msix.set(queue + 1, interrupts::QUEUE + queue as u8);
        }
        self.msix.control(true, false);
    }
}

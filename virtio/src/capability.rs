//! The vendor capabilities by which a driver finds the modern structures (section 4.1.4), and the window that reaches
//! them through configuration space alone (section 4.1.4.9).

use vmm_plugin_api::Capability;

use crate::{legacy, modern};

/// BAR of all structures of the modern interface.
pub(crate) const BAR: u32 = 2;
/// Bytes of that BAR.
pub(crate) const BAR_SIZE: u64 = 0x4000;
pub(crate) const DEVICE: u64 = 0x1000;
pub(crate) const NOTIFY: u64 = 0x2000;
pub(crate) const ISR: u64 = 0x3000;
/// Each queue has a notification address of its own, so that each is a doorbell of its own.
pub(crate) const NOTIFY_STRIDE: u64 = 4;

const ID_VENDOR: u8 = 0x09;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// The capabilities, [`WINDOW`] first. `ports`: with the legacy interface.
///
/// Its notification register is then a place for modern notifications too, and the better one: the write of a port that the
/// hypervisor completes needs no look at the guest's instruction, as one to memory does. A driver takes the first capability
/// of a type that it can use (section 4.1.4.1), and so the one in memory if the port BAR has no address, or if it knows no ports.
pub(crate) fn all(queues: usize, config_len: usize, ports: bool) -> Vec<Capability> {
    let stride = (NOTIFY_STRIDE as u32).to_le_bytes();
    let notify = queues as u64 * NOTIFY_STRIDE;
    let mut all = vec![Capability {
        live: true,
        ..vendor(PCI_CFG, BAR, 0, 0, &[0; 4])
    }];
    if ports {
        // Multiplier 0: one address for all queues, whose indexes are the values.
        all.push(vendor(NOTIFY_CFG, legacy::BAR, legacy::NOTIFY, 2, &[0; 4]));
    }
    all.extend([
        vendor(COMMON_CFG, BAR, 0, modern::LENGTH, &[]),
        vendor(NOTIFY_CFG, BAR, NOTIFY, notify, &stride),
        vendor(ISR_CFG, BAR, ISR, 1, &[]),
        vendor(DEVICE_CFG, BAR, DEVICE, config_len as u64, &[]),
    ]);
    all
}

/// Index of the `VIRTIO_PCI_CAP_PCI_CFG` capability in [`all`].
pub(crate) const WINDOW: u32 = 0;

/// `struct virtio_pci_cap` without id and next pointer.
fn vendor(kind: u8, bar: u32, offset: u64, length: u64, more: &[u8]) -> Capability {
    let mut body = vec![16 + more.len() as u8, kind, bar as u8, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(length as u32).to_le_bytes());
    body.extend_from_slice(more);
    Capability {
        id: ID_VENDOR,
        body,
        live: false,
    }
}

/// The registers of the window: the body of its capability.
pub(crate) struct Window([u8; Self::LENGTH]);

/// The access to a region that an access to the window's data means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) bar: u32,
    pub(crate) offset: u64,
    pub(crate) width: u32,
}

impl Window {
    const LENGTH: usize = 18;
    const DATA: usize = 14;

    pub(crate) fn new() -> Self {
        let mut body = [0; Self::LENGTH];
        (body[0], body[1], body[2]) = (20, PCI_CFG, BAR as u8);
        Self(body)
    }

    pub(crate) fn read(&self, offset: u32, width: u32) -> u32 {
        modern::field(&self.0, offset.into(), width) as u32
    }

    /// What an access to `width` bytes at `offset` of the body reaches: `None` when it does not touch the data, or the
    /// driver has set up no valid access. `ports`: with the legacy interface, of which only what a capability names is reached.
    pub(crate) fn target(&self, offset: u32, width: u32, ports: bool) -> Option<Access> {
        if offset as usize + (width as usize) <= Self::DATA {
            return None;
        }
        let (bar, at, length) = (self.0[2], self.read(6, 4), self.read(10, 4));
        let valid = matches!(length, 1 | 2 | 4) && at.is_multiple_of(length);
        let end = u64::from(at) + u64::from(length);
        let there = match u32::from(bar) {
            BAR => end <= BAR_SIZE,
            legacy::BAR => ports && u64::from(at) == legacy::NOTIFY && length == 2,
            _ => false,
        };
        (valid && there).then_some(Access {
            bar: bar.into(),
            offset: at.into(),
            width: length,
        })
    }

    /// Stores what the driver may write: BAR, offset, length and data.
    pub(crate) fn write(&mut self, offset: u32, width: u32, value: u32) {
        let bytes = value.to_le_bytes();
        for (at, byte) in (offset as usize..).zip(bytes).take(width as usize) {
            if at == 2 || (6..Self::LENGTH).contains(&at) {
                self.0[at] = byte;
            }
        }
    }

    pub(crate) fn set_data(&mut self, value: u32) {
        self.0[Self::DATA..].copy_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn data(&self) -> u32 {
        self.read(Self::DATA as u32, 4)
    }
}

//! The legacy register layout in I/O space (section 4.1.4.10), which virtio 0.9.5 drivers use.

use crate::modern::field;
use crate::registers::{Effect, Registers};

/// Queue alignment and the unit of the queue address (section 2.7.2).
const PAGE: u64 = 4096;

/// Region ids are BAR numbers.
pub(crate) const BAR: u32 = 0;
/// Bytes of that BAR.
pub(crate) const BAR_SIZE: u64 = 0x200;
/// Where the queue notification register is.
pub(crate) const NOTIFY: u64 = 16;
/// Where the ISR status byte is.
pub(crate) const ISR: u64 = 19;
/// Where the MSI-X fields are while MSI-X is enabled.
pub(crate) const VECTORS: std::ops::Range<u64> = 20..24;

/// Where the device configuration begins: behind the MSI-X fields while MSI-X is enabled.
pub(crate) fn config_offset(msix: bool) -> u64 {
    if msix { VECTORS.end } else { VECTORS.start }
}

/// Reads from the header. The ISR byte and what lies behind the header are the caller's.
pub(crate) fn read(
    registers: &mut Registers,
    offset: u64,
    width: u32,
    status: u8,
    config_vector: u16,
) -> u64 {
    let mut image = [0u8; VECTORS.end as usize];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &registers.offered_legacy().to_le_bytes());
    put(4, &(registers.accepted as u32).to_le_bytes());
    put(12, &registers.selected_max().to_le_bytes());
    put(14, &registers.queue_select.to_le_bytes());
    put(18, &[status]);
    put(20, &config_vector.to_le_bytes());
    if let Some(queue) = registers.selected() {
        let page = if queue.enabled {
            queue.descriptors / PAGE
        } else {
            0
        };
        put(8, &(page as u32).to_le_bytes());
        put(22, &queue.vector.to_le_bytes());
    }
    field(&image, offset, width)
}

/// Writes to the header. Notifications and the configuration vector are the caller's.
pub(crate) fn write(registers: &mut Registers, offset: u64, width: u32, value: u64) -> Effect {
    match (offset, width) {
        (4, 4) => registers.accept_legacy(value as u32),
        (8, 4) => return write_page(registers, value as u32),
        (14, 2) => registers.queue_select = value as u16,
        (18, 1) if value as u8 == 0 => return Effect::Reset,
        (18, 1) => return registers.write_legacy_status(value as u8),
        (22, 2) => return registers.set_queue_vector(value as u16),
        _ => {}
    }
    Effect::None
}

/// The queue address. Legacy drivers use a queue before they set DRIVER_OK (section 3.1.2), so it is served from here on.
fn write_page(registers: &mut Registers, page: u32) -> Effect {
    let index = registers.queue_select;
    let Some(queue) = registers.selected() else {
        return Effect::None;
    };
    queue.enabled = page != 0;
    queue.served = false;
    if page == 0 {
        return Effect::Stop(index);
    }
    let size = u64::from(queue.size);
    queue.descriptors = u64::from(page) * PAGE;
    queue.available = queue.descriptors + 16 * size;
    queue.used = (queue.available + 6 + 2 * size).next_multiple_of(PAGE);
    Effect::Start(index)
}

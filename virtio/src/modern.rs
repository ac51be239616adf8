//! The common configuration structure (section 4.1.4.3).

use crate::registers::{Effect, Registers};

/// Bytes of the structure without the fields of features that are not offered.
pub(crate) const LENGTH: u64 = 0x38;

/// Reads `width` bytes at `offset`. `status` and `config_vector` are what those fields hold.
pub(crate) fn read(
    registers: &mut Registers,
    offset: u64,
    width: u32,
    status: u8,
    config_vector: u16,
) -> u64 {
    let mut image = [0u8; LENGTH as usize + 8];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &registers.device_select.to_le_bytes());
    put(
        4,
        &registers
            .offered_half(registers.device_select)
            .to_le_bytes(),
    );
    put(8, &registers.driver_select.to_le_bytes());
    let accepted = match registers.driver_select {
        0 => registers.accepted as u32,
        1 => (registers.accepted >> 32) as u32,
        _ => 0,
    };
    put(12, &accepted.to_le_bytes());
    put(16, &config_vector.to_le_bytes());
    put(18, &(registers.queues.len() as u16).to_le_bytes());
    put(20, &[status, registers.generation]);
    put(22, &registers.queue_select.to_le_bytes());
    let index = registers.queue_select;
    if let Some(queue) = registers.selected() {
        put(24, &queue.size.to_le_bytes());
        put(26, &queue.vector.to_le_bytes());
        put(28, &u16::from(queue.enabled).to_le_bytes());
        put(30, &index.to_le_bytes());
        put(32, &queue.descriptors.to_le_bytes());
        put(40, &queue.available.to_le_bytes());
        put(48, &queue.used.to_le_bytes());
    }
    field(&image, offset, width)
}

/// `width` little-endian bytes of `image` at `offset`; what lies behind it reads as 0.
pub(crate) fn field(image: &[u8], offset: u64, width: u32) -> u64 {
    let mut value = [0; 8];
    let from = usize::try_from(offset)
        .unwrap_or(usize::MAX)
        .min(image.len());
    let bytes = image[from..].iter().take(width as usize);
    for (to, byte) in value.iter_mut().zip(bytes) {
        *to = *byte;
    }
    u64::from_le_bytes(value)
}

/// Writes a field. The driver has to use the field's own width, or halves for 64-bit fields (section 4.1.3.1); other
/// writes are ignored. The configuration vector is the caller's.
pub(crate) fn write(registers: &mut Registers, offset: u64, width: u32, value: u64) -> Effect {
    match (offset, width) {
        (0, 4) => registers.device_select = value as u32,
        (8, 4) => registers.driver_select = value as u32,
        (12, 4) => registers.accept_half(value as u32),
        (20, 1) if value as u8 == 0 => return Effect::Reset,
        (20, 1) => return registers.write_status(value as u8),
        (22, 2) => registers.queue_select = value as u16,
        (26, 2) => return registers.set_queue_vector(value as u16),
        (28, 2) if value == 1 => return registers.enable_queue(),
        (24, 2) | (32..LENGTH, 4 | 8) => write_queue(registers, offset, width, value),
        _ => {}
    }
    Effect::None
}

/// Size and addresses of the selected queue; fixed once it is enabled (section 4.1.4.3.2).
fn write_queue(registers: &mut Registers, offset: u64, width: u32, value: u64) {
    let Some(queue) = registers.selected().filter(|q| !q.enabled) else {
        return;
    };
    let address = match offset & !7 {
        24 => {
            queue.size = value as u16;
            return;
        }
        32 => &mut queue.descriptors,
        40 => &mut queue.available,
        _ => &mut queue.used,
    };
    match (offset & 7, width) {
        (0, 8) => *address = value,
        (0, 4) => *address = *address & !0xffff_ffff | value & 0xffff_ffff,
        (4, 4) => *address = *address & 0xffff_ffff | value << 32,
        _ => {}
    }
}

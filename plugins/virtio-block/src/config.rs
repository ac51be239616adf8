//! What the device says of itself: feature bits and configuration space (section 5.2.3, 5.2.4).

use vmm_plugin_api::BlockInfo;
use vmm_plugin_api::abi::block::{BLOCK_DISCARD, BLOCK_READ_ONLY, BLOCK_WRITE_ZEROES};

use crate::request::SECTOR;
use crate::volatile_cache;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
pub(crate) const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Bytes of the configuration space up to and including the write-zeroes fields.
const LENGTH: usize = 60;

pub(crate) fn features(info: &BlockInfo, queues: u16) -> u64 {
    let when = |yes: bool, bit: u64| if yes { bit } else { 0 };
    let has = |feature: u32| info.features & feature != 0;
    let writable = !has(BLOCK_READ_ONLY);
    let trims = writable && max_trim_sectors(info) > 0;
    F_SEG_MAX
        | F_BLK_SIZE
        | F_TOPOLOGY
        | when(!writable, F_RO)
        | when(volatile_cache(info), F_FLUSH)
        | when(queues > 1, F_MQ)
        | when(trims && has(BLOCK_DISCARD), F_DISCARD)
        | when(trims && has(BLOCK_WRITE_ZEROES), F_WRITE_ZEROES)
}

/// Most sectors in one discard or write-zeroes request.
pub(crate) fn max_trim_sectors(info: &BlockInfo) -> u32 {
    let whole = info.max_discard / info.logical.max(1) * info.logical;
    whole / SECTOR as u32
}

/// `struct virtio_blk_config`.
pub(crate) fn space(info: &BlockInfo, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut space = vec![0; LENGTH];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    let sectors = SECTOR as u32;
    // Two descriptors of a chain are the request's header and status.
    let segments = u32::from(queue_size - 2).min(info.max_segments.max(1));
    let per_physical = (info.physical / info.logical.max(1)).max(1);
    put(0, &(info.bytes / SECTOR).to_le_bytes());
    put(12, &segments.to_le_bytes());
    put(20, &info.logical.to_le_bytes());
    if per_physical.is_power_of_two() {
        put(24, &[per_physical.trailing_zeros() as u8]);
    }
    put(26, &u16::try_from(per_physical).unwrap_or(1).to_le_bytes());
    put(34, &queues.to_le_bytes());
    let trim = max_trim_sectors(info);
    // One range in each request.
    put(36, &trim.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(
        44,
        &(info.physical.max(info.logical) / sectors).to_le_bytes(),
    );
    put(48, &trim.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[1]);
    space
}

//! One guest request, checked (section 5.2.6).

use vmm_plugin_api::abi::block::{BLOCK_DISCARD, BLOCK_READ_ONLY, BLOCK_WRITE_ZEROES};
use vmm_plugin_api::{BlockInfo, BlockOp, Chain, GuestSlice};

use crate::config::max_trim_sectors;

/// Unit of sector numbers, whatever the block size is.
pub(crate) const SECTOR: u64 = 512;

pub(crate) const S_OK: u8 = 0;
pub(crate) const S_IOERR: u8 = 1;
pub(crate) const S_UNSUPP: u8 = 2;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Flag of a discard or write-zeroes range: space may be freed.
const FLAG_UNMAP: u32 = 1;

/// What the device does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Move the chain's data: its writable buffers for a read, its readable ones for a write.
    Transfer { op: BlockOp, offset: u64, len: u64 },
    /// Without data.
    Control { op: BlockOp, offset: u64, len: u64 },
    /// Give the serial number.
    Serial,
    /// Nothing but this status.
    Status(u8),
}

fn bytes(segments: &[GuestSlice]) -> u64 {
    segments.iter().map(|s| s.len() as u64).sum()
}

/// Byte offset and length of a range of sectors, if the backend has it and can address it.
fn range(info: &BlockInfo, sector: u64, len: u64) -> Option<(u64, u64)> {
    let offset = sector.checked_mul(SECTOR)?;
    let unit = u64::from(info.logical.max(1));
    let fits = offset.checked_add(len)? <= info.bytes;
    (fits && offset.is_multiple_of(unit) && len.is_multiple_of(unit)).then_some((offset, len))
}

/// Reads the request's header from `chain`, whose status byte is already taken off; what stays in it is data.
pub(crate) fn parse(info: &BlockInfo, write_through: bool, chain: &mut Chain) -> Action {
    let mut header = [0; 16];
    if !chain.take_front(&mut header) {
        return Action::Status(S_IOERR);
    }
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let read_only = info.features & BLOCK_READ_ONLY != 0;
    let failed = Action::Status(S_IOERR);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        T_IN => transfer(range(info, sector, bytes(chain.writable())), BlockOp::Read),
        // Section 5.2.6.2: a write to a read-only device fails and writes nothing.
        T_OUT | T_DISCARD | T_WRITE_ZEROES if read_only => failed,
        T_OUT => {
            let op = BlockOp::Write { fua: write_through };
            transfer(range(info, sector, bytes(chain.readable())), op)
        }
        T_FLUSH => Action::Control {
            op: BlockOp::Flush,
            offset: 0,
            len: 0,
        },
        T_GET_ID => Action::Serial,
        T_DISCARD if info.features & BLOCK_DISCARD != 0 => trim(info, chain, false),
        T_WRITE_ZEROES if info.features & BLOCK_WRITE_ZEROES != 0 => trim(info, chain, true),
        _ => Action::Status(S_UNSUPP),
    }
}

fn transfer(range: Option<(u64, u64)>, op: BlockOp) -> Action {
    match range {
        Some((_, 0)) => Action::Status(S_OK),
        Some((offset, len)) => Action::Transfer { op, offset, len },
        None => Action::Status(S_IOERR),
    }
}

/// Discard or write zeroes: one `struct virtio_blk_discard_write_zeroes`, as the configuration space says.
fn trim(info: &BlockInfo, chain: &mut Chain, zero: bool) -> Action {
    let mut data = [0; 16];
    if bytes(chain.readable()) != 16 || !chain.take_front(&mut data) {
        return Action::Status(S_IOERR);
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = data;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes(flags);
    // Section 5.2.6.2: unknown flags, and unmap with a discard, are not supported.
    if flags & !(if zero { FLAG_UNMAP } else { 0 }) != 0 {
        return Action::Status(S_UNSUPP);
    }
    if sectors > max_trim_sectors(info) {
        return Action::Status(S_IOERR);
    }
    let op = if zero {
        BlockOp::WriteZeroes {
            unmap: flags & FLAG_UNMAP != 0,
        }
    } else {
        BlockOp::Discard
    };
    match range(info, sector, u64::from(sectors) * SECTOR) {
        Some((_, 0)) => Action::Status(S_OK),
        Some((offset, len)) => Action::Control { op, offset, len },
        None => Action::Status(S_IOERR),
    }
}

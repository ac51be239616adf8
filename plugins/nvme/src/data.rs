//! Where a command's data lies in guest memory: PRP entries and lists (section 4.3), SGLs (section 4.4).
//!
//! Whatever the guest writes there, the work is bounded by the length of the transfer and by [`MAX_DESCRIPTORS`].

use vmm_plugin_api::{GuestMemory, GuestSlice};

use crate::command::DataPointer;
use crate::status::Status;

/// Bytes of a memory page: the controller supports no other size (`CAP.MPSMIN`, `CAP.MPSMAX`).
pub(crate) const PAGE: u64 = 4096;
/// Most bytes that one command transfers.
pub(crate) const MAX_TRANSFER: u64 = 1 << 20;
/// Most SGL descriptors of one command.
pub(crate) const MAX_DESCRIPTORS: usize = 1024;

/// Who writes the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// The controller reads it.
    FromGuest,
    /// The controller writes it.
    ToGuest,
}

/// Puts the `len` bytes that `data` points at into `segments`, neighbours as one.
///
/// # Errors
/// What the command completes with: the pointers break a rule, or lead out of guest memory.
pub(crate) fn map(
    memory: GuestMemory,
    data: DataPointer,
    len: u64,
    direction: Direction,
    segments: &mut Vec<GuestSlice>,
) -> Result<(), Status> {
    segments.clear();
    let mut add = |address: u64, len: u64| {
        let slice = match direction {
            Direction::FromGuest => memory.readable(address, len),
            Direction::ToGuest => memory.writable(address, len),
        };
        segments.push(slice.map_err(|_| Status::DATA_TRANSFER_ERROR)?);
        Ok(())
    };
    let mut run = (0u64, 0u64);
    walk(memory, data, len, &mut |address, len| {
        if run.1 > 0 && run.0.wrapping_add(run.1) == address {
            run.1 += len;
            return Ok(());
        }
        let before = std::mem::replace(&mut run, (address, len));
        if before.1 == 0 {
            return Ok(());
        }
        add(before.0, before.1)
    })?;
    if run.1 > 0 {
        add(run.0, run.1)?;
    }
    Ok(())
}

/// Marks the pages of a finished transfer to the guest as written.
pub(crate) fn mark(memory: GuestMemory, data: DataPointer, len: u64) {
    // A guest that has changed the list in the meantime breaks the rules, and only what it sees itself.
    let _ = walk(memory, data, len, &mut |address, len| {
        memory.mark_written(address, len);
        Ok(())
    });
}

/// Takes address and length of each part, in order. An address and length that it is given do not wrap.
type Visit<'a> = dyn FnMut(u64, u64) -> Result<(), Status> + 'a;

fn walk(
    memory: GuestMemory,
    data: DataPointer,
    len: u64,
    visit: &mut Visit<'_>,
) -> Result<(), Status> {
    if len == 0 {
        return Ok(());
    }
    match data {
        DataPointer::Prp(first, second) => prp(memory, first, second, len, visit),
        DataPointer::Sgl(descriptor) => sgl(memory, descriptor, len, visit),
    }
}

fn prp(
    memory: GuestMemory,
    first: u64,
    second: u64,
    len: u64,
    visit: &mut Visit<'_>,
) -> Result<(), Status> {
    if !first.is_multiple_of(4) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    let part = len.min(PAGE - first % PAGE);
    visit(first, part)?;
    let mut left = len - part;
    if left == 0 {
        return Ok(());
    }
    if left <= PAGE {
        return page(second, left, visit);
    }
    // Section 4.3: the second entry points to a list, which need not begin at a page.
    if !second.is_multiple_of(8) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    let mut list = second;
    let mut bytes = [0; PAGE as usize];
    loop {
        let room = (PAGE - list % PAGE) / 8;
        let wanted = left.div_ceil(PAGE);
        let entries = &mut bytes[..8 * room.min(wanted) as usize];
        memory
            .read(list, entries)
            .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        let mut entries = entries
            .as_chunks::<8>()
            .0
            .iter()
            .map(|e| u64::from_le_bytes(*e));
        let direct = if wanted > room { room - 1 } else { wanted };
        for entry in entries.by_ref().take(direct as usize) {
            let part = left.min(PAGE);
            page(entry, part, visit)?;
            left -= part;
        }
        // The last entry of a full page points to the next list, which begins at a page: a list that leads back to itself
        // ends with the transfer.
        let Some(next) = entries.next() else {
            return Ok(());
        };
        if !next.is_multiple_of(PAGE) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        list = next;
    }
}

/// An entry that has to be a whole page's address.
fn page(entry: u64, len: u64, visit: &mut Visit<'_>) -> Result<(), Status> {
    if !entry.is_multiple_of(PAGE) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    visit(entry, len)
}

/// What an SGL descriptor is (figure 113): type and subtype.
const DATA_BLOCK: u8 = 0x00;
const SEGMENT: u8 = 0x20;
const LAST_SEGMENT: u8 = 0x30;
/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

fn sgl(
    memory: GuestMemory,
    first: [u8; 16],
    len: u64,
    visit: &mut Visit<'_>,
) -> Result<(), Status> {
    let mut left = len;
    let mut budget = MAX_DESCRIPTORS;
    let (kind, mut address, mut bytes) = descriptor(&first);
    let mut last = match kind {
        DATA_BLOCK => {
            block(address, bytes, &mut left, visit)?;
            return exhausted(left);
        }
        SEGMENT => false,
        LAST_SEGMENT => true,
        _ => return Err(Status::SGL_TYPE_INVALID),
    };
    loop {
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR) {
            return Err(Status::INVALID_SGL_SEGMENT);
        }
        let count = bytes / DESCRIPTOR;
        budget = usize::try_from(count)
            .ok()
            .and_then(|count| budget.checked_sub(count))
            .ok_or(Status::TOO_MANY_SGL_DESCRIPTORS)?;
        let segment = memory
            .readable(address, bytes)
            .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        let mut next = None;
        for index in 0..count {
            let mut entry = [0; DESCRIPTOR as usize];
            segment.read((index * DESCRIPTOR) as usize, &mut entry);
            let (kind, address, bytes) = descriptor(&entry);
            match kind {
                DATA_BLOCK => block(address, bytes, &mut left, visit)?,
                SEGMENT | LAST_SEGMENT if !last && index + 1 == count => {
                    next = Some((kind == LAST_SEGMENT, address, bytes));
                }
                SEGMENT | LAST_SEGMENT => return Err(Status::INVALID_SGL_SEGMENT),
                _ => return Err(Status::SGL_TYPE_INVALID),
            }
        }
        match next {
            Some(next) => (last, address, bytes) = next,
            None if last => return exhausted(left),
            // Section 4.4: only a last segment may end without a pointer to the next one.
            None => return Err(Status::INVALID_SGL_SEGMENT),
        }
    }
}

/// Type and subtype, address and length of a descriptor.
fn descriptor(bytes: &[u8; 16]) -> (u8, u64, u64) {
    let [
        a0,
        a1,
        a2,
        a3,
        a4,
        a5,
        a6,
        a7,
        l0,
        l1,
        l2,
        l3,
        _,
        _,
        _,
        kind,
    ] = *bytes;
    let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
    (kind, address, u32::from_le_bytes([l0, l1, l2, l3]).into())
}

fn block(address: u64, len: u64, left: &mut u64, visit: &mut Visit<'_>) -> Result<(), Status> {
    // A longer list than the transfer is not supported (`SGLS` bit 18).
    *left = left.checked_sub(len).ok_or(Status::SGL_LENGTH_INVALID)?;
    if len == 0 {
        return Ok(());
    }
    if address.checked_add(len).is_none() {
        return Err(Status::DATA_TRANSFER_ERROR);
    }
    visit(address, len)
}

fn exhausted(left: u64) -> Result<(), Status> {
    if left == 0 {
        Ok(())
    } else {
        Err(Status::SGL_LENGTH_INVALID)
    }
}

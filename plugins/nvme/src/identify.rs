//! Identify (section 5.15): what the controller and the namespace say of themselves.

use crate::VENDOR;
use crate::command::Command;
use crate::data::{MAX_TRANSFER, PAGE};
use crate::error_log;
use crate::events;
use crate::features::WARNING_TEMPERATURE;
use crate::io::NAMESPACE;
use crate::registers::VERSION;
use crate::shared::Shared;
use crate::status::Status;

/// Bytes of every identify structure.
const BYTES: usize = 4096;
/// The controller's own identifier in its subsystem (`CNTLID`).
const CONTROLLER: u16 = 1;
/// What the controller is called (`MN`).
const MODEL: &str = "vmm-host NVMe disk";
/// Kelvin at which a real one would be in danger (`CCTEMP`).
const CRITICAL_TEMPERATURE: u16 = 353;

type Page = [u8; BYTES];

/// The page that the command asks for.
///
/// # Errors
/// There is no such page.
pub(crate) fn page(shared: &Shared, command: &Command) -> Result<Page, Status> {
    let namespace = command.namespace();
    match command.dword(10) & 0xff {
        // There is no namespace management, so that there are no attributes common to all.
        0x00 if namespace == NAMESPACE => Ok(namespace_page(shared)),
        0x01 => Ok(controller(shared)),
        0x02 if namespace < u32::MAX - 1 => Ok(list(&[NAMESPACE], namespace)),
        0x03 if namespace == NAMESPACE => Ok(descriptors(shared)),
        0x00 | 0x02 | 0x03 => Err(Status::INVALID_NAMESPACE),
        // The controllers that the namespace is attached to, and those of the subsystem.
        0x12 if namespace != NAMESPACE => Err(Status::INVALID_NAMESPACE),
        0x12 | 0x13 => Ok(controllers((command.dword(10) >> 16) as u16)),
        _ => Err(Status::INVALID_FIELD),
    }
}

/// Writes `bytes` at `at`.
fn put(page: &mut Page, at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A field of ASCII, filled up with spaces (section 1.5).
fn text(page: &mut Page, at: usize, len: usize, text: &[u8]) {
    page[at..at + len].fill(b' ');
    put(page, at, &text[..text.len().min(len)]);
}

/// Figure 251.
fn controller(shared: &Shared) -> Page {
    let mut page = [0; BYTES];
    let p = &mut page;
    let namespace = shared.namespace();
    put(p, 0, &VENDOR.to_le_bytes());
    put(p, 2, &VENDOR.to_le_bytes());
    put(p, 4, &shared.serial);
    text(p, 24, 40, MODEL.as_bytes());
    text(p, 64, 8, env!("CARGO_PKG_VERSION").as_bytes());
    // MDTS: a power of two of pages.
    put(p, 77, &[(MAX_TRANSFER / PAGE).trailing_zeros() as u8]);
    put(p, 78, &CONTROLLER.to_le_bytes());
    put(p, 80, &VERSION.to_le_bytes());
    // OAES: changes of namespaces. CNTRLTYPE: an I/O controller.
    put(p, 92, &(1u32 << 8).to_le_bytes());
    put(p, 111, &[1]);
    // OACS: shadow doorbells. AERL. FRMW: one slot, read-only. LPA: effects log, log pages at an offset. ELPE.
    put(p, 256, &(1u16 << 8).to_le_bytes());
    put(p, 259, &[events::LIMIT as u8 - 1, 0b11, 0b110]);
    put(p, 262, &[error_log::ENTRIES as u8 - 1]);
    put(p, 266, &WARNING_TEMPERATURE.to_le_bytes());
    put(p, 268, &CRITICAL_TEMPERATURE.to_le_bytes());
    // SQES, CQES: 64 and 16 bytes, no others.
    put(p, 512, &[0x66, 0x44]);
    put(p, 516, &1u32.to_le_bytes());
    // ONCS: compare, dataset management, write zeroes, select in Get Features.
    let oncs =
        1u16 | u16::from(namespace.discards()) << 2 | u16::from(namespace.zeroes()) << 3 | 1 << 4;
    put(p, 520, &oncs.to_le_bytes());
    // VWC: flush takes all namespaces at once; whether there is a cache.
    put(p, 525, &[0b110 | u8::from(shared.cached())]);
    // SGLS: without demands on alignment.
    put(p, 536, &1u32.to_le_bytes());
    let uuid = uuid_text(&uuid(shared, "subsystem"));
    let name = format!("nqn.2014-08.org.nvmexpress:uuid:{uuid}");
    put(p, 768, name.as_bytes());
    // Power state 0: 25 W at most.
    put(p, 2048, &2500u16.to_le_bytes());
    page
}

/// Figure 249.
fn namespace_page(shared: &Shared) -> Page {
    let mut page = [0; BYTES];
    let p = &mut page;
    let namespace = shared.namespace();
    let blocks = namespace.blocks().to_le_bytes();
    for at in [0, 8, 16] {
        put(p, at, &blocks);
    }
    // NSFEAT: the preferred sizes of writes and deallocations below mean something.
    put(p, 24, &[1 << 4]);
    // DLFEAT: deallocation by write zeroes; deallocated blocks read as anything.
    put(p, 33, &[u8::from(namespace.zeroes()) << 3]);
    // NPWG, NPWA, NPDG, NPDA: what the backend writes without a read before it.
    let unit = (u64::from(namespace.info.physical) / namespace.block()).clamp(1, 0x1_0000);
    let unit = (unit as u32 - 1) as u16;
    for at in [64, 66, 68, 70] {
        put(p, at, &unit.to_le_bytes());
    }
    // NSATTR: write protected.
    put(p, 99, &[u8::from(namespace.read_only())]);
    // LBAF 0: LBADS.
    put(p, 130, &[namespace.block().trailing_zeros() as u8]);
    page
}

/// The numbers above `after`.
fn list(numbers: &[u32], after: u32) -> Page {
    let mut page = [0; BYTES];
    let listed = numbers.iter().filter(|number| **number > after);
    for (place, number) in page.as_chunks_mut::<4>().0.iter_mut().zip(listed) {
        *place = number.to_le_bytes();
    }
    page
}

/// Section 4.9: controllers from `first` on.
fn controllers(first: u16) -> Page {
    let mut page = [0; BYTES];
    if first <= CONTROLLER {
        put(&mut page, 0, &1u16.to_le_bytes());
        put(&mut page, 2, &CONTROLLER.to_le_bytes());
    }
    page
}

/// Figure 253: the namespace's UUID.
fn descriptors(shared: &Shared) -> Page {
    const UUID: u8 = 3;
    let mut page = [0; BYTES];
    put(&mut page, 0, &[UUID, 16]);
    put(&mut page, 4, &uuid(shared, "namespace"));
    page
}

/// A UUID that is the same whenever the VM runs, and another for each disk of a VM and for each `what`: version 8 (RFC 9562
/// section 5.8), made of the backend's name and the serial number.
fn uuid(shared: &Shared, what: &str) -> [u8; 16] {
    let parts = [
        what.as_bytes(),
        shared.backend.name().as_bytes(),
        &shared.serial,
    ];
    // FNV-1a, which any later version computes in the same way.
    let half = |salt: u8| {
        let bytes = parts.iter().flat_map(|part| part.iter().chain(&[0xff]));
        let hash = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        std::iter::once(&salt)
            .chain(bytes)
            .fold(0xcbf2_9ce4_8422_2325, hash)
    };
    let mut uuid = [0; 16];
    uuid[..8].copy_from_slice(&half(0).to_le_bytes());
    uuid[8..].copy_from_slice(&half(1).to_le_bytes());
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::new();
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text
}

//! Log pages (section 5.14).

use crate::admin;
use crate::command::Command;
use crate::features::Features;
use crate::io::{self, ALL_NAMESPACES, NAMESPACE};
use crate::shared::{Shared, lock};
use crate::status::Status;

const ERROR: u8 = 0x01;
const SMART: u8 = 0x02;
const FIRMWARE: u8 = 0x03;
pub(crate) const CHANGED_NAMESPACES: u8 = 0x04;
const EFFECTS: u8 = 0x05;

/// Kelvin: a disk that has no temperature of its own says that of a room.
pub(crate) const TEMPERATURE: u16 = 296;
/// Bytes in a data unit of the SMART log.
const DATA_UNIT: u64 = 512_000;

/// The whole page that the command asks for. `changed`: the namespace has, since the guest has read so.
///
/// # Errors
/// There is no such page.
pub(crate) fn page(
    shared: &Shared,
    features: &Features,
    changed: bool,
    command: &Command,
) -> Result<Vec<u8>, Status> {
    let page = command.dword(10) as u8;
    match page {
        ERROR => Ok(lock(&shared.errors).page()),
        SMART => {
            // Of the controller only: `LPA` bit 0.
            if !matches!(command.namespace(), 0 | NAMESPACE | ALL_NAMESPACES) {
                return Err(Status::INVALID_NAMESPACE);
            }
            Ok(smart(shared, features))
        }
        FIRMWARE => Ok(firmware()),
        CHANGED_NAMESPACES => Ok(changed_namespaces(changed)),
        EFFECTS => Ok(effects(shared)),
        _ => Err(Status::INVALID_LOG_PAGE),
    }
}

/// Figure 196.
fn smart(shared: &Shared, features: &Features) -> Vec<u8> {
    let mut page = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    // Critical warning: past a temperature threshold; the medium takes no writes.
    let warning = u8::from(features.temperature_warning()) << 1
        | u8::from(shared.namespace().read_only()) << 3;
    put(0, &[warning]);
    put(1, &TEMPERATURE.to_le_bytes());
    // Available spare, and the least that it may be, in percent.
    put(3, &[100, 10]);
    let counters = &shared.counters;
    let units = |bytes: u64| bytes.div_ceil(DATA_UNIT);
    let numbers = [
        (32, units(counters.read_bytes.get())),
        (48, units(counters.write_bytes.get())),
        (64, counters.reads.get()),
        (80, counters.writes.get()),
        (128, shared.host.clock() / 3_600_000_000_000),
        (
            160,
            shared
                .media_errors
                .load(std::sync::atomic::Ordering::Relaxed),
        ),
        (176, lock(&shared.errors).count()),
    ];
    for (at, number) in numbers {
        put(at, &number.to_le_bytes());
    }
    page
}

/// Figure 198: slot 1 is active, and has the controller's version.
fn firmware() -> Vec<u8> {
    let mut page = vec![0; 512];
    page[0] = 1;
    page[8..16].fill(b' ');
    let version = env!("CARGO_PKG_VERSION").as_bytes();
    let len = version.len().min(8);
    page[8..8 + len].copy_from_slice(&version[..len]);
    page
}

/// Section 5.14.1.4: identifiers of namespaces.
fn changed_namespaces(changed: bool) -> Vec<u8> {
    let mut page = vec![0; 4096];
    if changed {
        page[..4].copy_from_slice(&NAMESPACE.to_le_bytes());
    }
    page
}

/// Figure 200: what each command changes.
fn effects(shared: &Shared) -> Vec<u8> {
    const SUPPORTED: u32 = 1;
    const CONTENT: u32 = 1 << 1;
    let mut page = vec![0; 4096];
    let mut put = |at: usize, effects: u32| {
        page[at..at + 4].copy_from_slice(&effects.to_le_bytes());
    };
    for opcode in admin::COMMANDS {
        put(4 * usize::from(opcode), SUPPORTED);
    }
    let namespace = shared.namespace();
    let io = [
        (io::FLUSH, true, false),
        (io::WRITE, true, true),
        (io::READ, true, false),
        (io::COMPARE, true, false),
        (io::WRITE_ZEROES, namespace.zeroes(), true),
        (io::DATASET_MANAGEMENT, namespace.discards(), true),
    ];
    for (opcode, supported, changes) in io {
        if supported {
            let content = if changes { CONTENT } else { 0 };
            put(1024 + 4 * usize::from(opcode), SUPPORTED | content);
        }
    }
    page
}

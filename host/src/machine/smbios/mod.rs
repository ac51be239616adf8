//! SMBIOS tables: how the guest learns who made its machine, and of what (DMTF DSP0134, version 3.2).
//!
//! Firmware gets them as two files; for direct boot they lie in the ROM area below 1 MiB, where `dmidecode` and kernels
//! search. What the VM file says of the machine's identity is in [`Identity`]; the rest is what the machine has.

mod memory;
mod processor;
mod structure;

use structure::Structure;

pub use processor::Processors;

/// The fw_cfg file with the entry point.
pub const ANCHOR_FILE: &str = "etc/smbios/smbios-anchor";
/// The fw_cfg file with the structures.
pub const TABLES_FILE: &str = "etc/smbios/smbios-tables";

/// Length of the 64-bit entry point (section 5.2.2).
pub const ANCHOR_LEN: usize = 24;
const ANCHOR_CHECKSUM: usize = 5;
const ANCHOR_ADDRESS: usize = 16;

/// The longest text of an identity, and of an OEM string.
pub const TEXT_MAX: usize = 255;
/// The longest OEM string.
pub const OEM_TEXT_MAX: usize = 1023;
/// The most OEM strings: all together they fit the ROM area.
pub const OEM_STRINGS_MAX: usize = 32;

// Handles: the type in the upper byte and a number in the lower, but for processors and caches, which may be thousands.
const FIRMWARE: u16 = 0x000;
const SYSTEM: u16 = 0x100;
const CHASSIS: u16 = 0x300;
const SLOTS: u16 = 0x900;
const OEM_STRINGS: u16 = 0xb00;
const MEMORY_ARRAY: u16 = 0x1000;
const MEMORY_MODULE: u16 = 0x1100;
const MAPPED: u16 = 0x1300;
const BOOT: u16 = 0x2000;
const END: u16 = 0x7f00;
const PROCESSORS: u16 = 0x4000;
/// Four for each processor.
const CACHES: u16 = 0x8000;

/// When what the tables say last changed. Not the date of a build, which would differ from build to build.
const DATE: &str = "11/24/2026";

/// Who the machine is. An empty text means "not specified".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Manufacturer of system, chassis and firmware.
    pub vendor: String,
    /// Product name.
    pub product: String,
    /// Version of the product.
    pub version: String,
    /// Serial number of system and chassis.
    pub serial: String,
    /// UUID in the order in which it is written; all zeros: there is none.
    pub uuid: [u8; 16],
    /// SKU number of system and chassis.
    pub sku: String,
    /// Product family.
    pub family: String,
    /// Asset tag of the chassis.
    pub asset_tag: String,
    /// Free texts, which tools in the guest look for.
    pub oem_strings: Vec<String>,
    /// Version of the firmware.
    pub firmware_version: String,
}

impl Default for Identity {
    /// What no VM file says otherwise. It names this project, and no release of it: a guest sees the same machine after an
    /// update of the host.
    fn default() -> Self {
        Self {
            vendor: "vmm-host".to_owned(),
            product: "i440FX PC".to_owned(),
            version: String::new(),
            serial: String::new(),
            uuid: [0; 16],
            sku: String::new(),
            family: String::new(),
            asset_tag: String::new(),
            oem_strings: Vec::new(),
            firmware_version: "1".to_owned(),
        }
    }
}

/// What the tables say about this machine.
pub(super) struct Contents<'a> {
    pub identity: &'a Identity,
    pub processors: &'a Processors,
    /// RAM: first address and length, by ascending address.
    pub ram: &'a [(u64, u64)],
    /// Device numbers on bus 0 that have something in them.
    pub slots: &'a [u8],
    /// Whether the guest is started by UEFI firmware.
    pub uefi: bool,
}

/// Entry point and structures.
#[derive(Clone, Debug)]
pub struct Blobs {
    /// [`ANCHOR_FILE`], for tables at address 0: firmware, which makes its own entry point, does not look.
    pub anchor: Vec<u8>,
    /// [`TABLES_FILE`].
    pub tables: Vec<u8>,
}

impl Blobs {
    /// The entry point for tables at `address`.
    #[must_use]
    pub fn anchor_for(&self, address: u64) -> Vec<u8> {
        let mut anchor = self.anchor.clone();
        anchor[ANCHOR_ADDRESS..ANCHOR_LEN].copy_from_slice(&address.to_le_bytes());
        anchor[ANCHOR_CHECKSUM] = 0;
        let sum = anchor
            .iter()
            .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        anchor[ANCHOR_CHECKSUM] = sum.wrapping_neg();
        anchor
    }
}

/// Makes entry point and structures.
pub(super) fn build(contents: &Contents<'_>) -> Blobs {
    let mut tables = Vec::new();
    put_firmware(contents, &mut tables);
    put_system(contents.identity, &mut tables);
    put_chassis(contents.identity, &mut tables);
    contents.processors.put(&mut tables);
    for &device in contents.slots {
        put_slot(device, &mut tables);
    }
    put_oem_strings(&contents.identity.oem_strings, &mut tables);
    memory::put(contents.ram, &mut tables);
    // No errors detected at boot.
    Structure::new(32, BOOT).bytes(&[0; 7]).put(&mut tables);
    Structure::new(127, END).put(&mut tables);
    // Version 3.2, no revision of the document, entry point revision 1.
    let mut anchor = b"_SM3_\0\x18\x03\x02\x00\x01\0".to_vec();
    anchor.extend((tables.len() as u32).to_le_bytes());
    anchor.extend(0_u64.to_le_bytes());
    let mut blobs = Blobs { anchor, tables };
    blobs.anchor = blobs.anchor_for(0);
    blobs
}

/// Type 0.
fn put_firmware(contents: &Contents<'_>, tables: &mut Vec<u8>) {
    let uefi = u8::from(contents.uefi);
    Structure::new(0, FIRMWARE)
        .text(&contents.identity.vendor)
        .text(&contents.identity.firmware_version)
        .word(0xe000)
        .text(DATE)
        // 128 KiB below 1 MiB.
        .bytes(&[1])
        // PCI; with firmware there is a choice of what to boot.
        .qword(1 << 7 | u64::from(uefi) << 16)
        // ACPI; UEFI, and that this is a virtual machine.
        .bytes(&[1, uefi << 3 | 1 << 4])
        // Neither release numbers nor an embedded controller.
        .bytes(&[0xff; 4])
        .word(0)
        .put(tables);
}

/// Type 1.
fn put_system(identity: &Identity, tables: &mut Vec<u8>) {
    let mut uuid = identity.uuid;
    // The first three fields are little-endian (section 7.2.1).
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    Structure::new(1, SYSTEM)
        .text(&identity.vendor)
        .text(&identity.product)
        .text(&identity.version)
        .text(&identity.serial)
        .bytes(&uuid)
        // Woken up by the power switch.
        .bytes(&[6])
        .text(&identity.sku)
        .text(&identity.family)
        .put(tables);
}

/// Type 3.
fn put_chassis(identity: &Identity, tables: &mut Vec<u8>) {
    Structure::new(3, CHASSIS)
        .text(&identity.vendor)
        // A shape that the list doesn't have.
        .bytes(&[1])
        .text(&identity.version)
        .text(&identity.serial)
        .text(&identity.asset_tag)
        // States of boot, power supply and temperature: safe. Security: unknown.
        .bytes(&[3, 3, 3, 2])
        .dword(0)
        // Neither height, power cords nor contained elements.
        .bytes(&[0; 4])
        .text(&identity.sku)
        .put(tables);
}

/// Type 9.
fn put_slot(device: u8, tables: &mut Vec<u8>) {
    Structure::new(9, SLOTS + u16::from(device))
        .text(&format!("PCI slot {device}"))
        // PCI, 32 bits, in use, of another length.
        .bytes(&[6, 5, 4, 1])
        .word(u16::from(device))
        // 3.3 V; nothing of the second byte.
        .bytes(&[1 << 2, 0])
        // Segment and bus 0.
        .word(0)
        .bytes(&[0, device << 3])
        // No peers.
        .bytes(&[0, 0])
        .put(tables);
}

/// Type 11, if there is anything to say.
fn put_oem_strings(strings: &[String], tables: &mut Vec<u8>) {
    if strings.is_empty() {
        return;
    }
    let mut structure = Structure::new(11, OEM_STRINGS).bytes(&[strings.len() as u8]);
    for text in strings {
        structure.string(text);
    }
    structure.put(tables);
}

#[cfg(test)]
mod tests;

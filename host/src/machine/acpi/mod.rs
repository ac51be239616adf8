//! ACPI tables: how the guest learns of CPUs, interrupt wiring, PCI windows and power management.
//!
//! The set is small and of fixed shape: RSDP, XSDT, FADT, MADT, MCFG, FACS, and a DSDT with CPUs, the PCI root and the
//! fixed devices. Firmware gets it as [`Blobs`] to link; for direct boot it lies in the ROM area below 1 MiB, where a
//! guest without boot protocol searches too.

mod aml;
mod dsdt;
mod isa;
mod links;
mod loader;
mod tables;
mod windows;

use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, facs::FACS};
use anyhow::{Result, ensure};

use super::{Board, ECAM_BASE};

pub use loader::{Blobs, LOADER_FILE, RSDP_FILE, TABLES_FILE};
pub(super) use windows::Windows;

use loader::Blob;

const OEM_ID: [u8; 6] = *b"VMMHST";
const OEM_TABLE_ID: [u8; 8] = *b"VMM-HOST";
const OEM_REVISION: u32 = 1;

/// There is no bridge, so there is no further bus. Linux looks at every device of every bus that the tables tell of:
/// thousands of exits for 256 of them.
const LAST_BUS: u8 = 0;

/// XSDT: offset of the first pointer (ACPI 6.4 table 5.8).
const XSDT_ENTRIES: usize = 36;
/// RSDP: offsets of checksum, XSDT address and extended checksum, and the length that the first one covers
/// (ACPI 6.4 table 5.3).
const RSDP_CHECKSUM: usize = 8;
const RSDP_XSDT: usize = 24;
const RSDP_EXTENDED_CHECKSUM: usize = 32;
const RSDP_ACPI1_LEN: usize = 20;

/// A device at fixed ports that the guest should find by ACPI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IsaDevice {
    /// Whose it is, for messages.
    pub name: String,
    /// Hardware id: `PNP0501` (EISA form) or eight letters and digits.
    pub hid: String,
    /// Port ranges: first port, how many.
    pub ports: Vec<(u16, u16)>,
    /// Interrupt: line, and whether it is level triggered.
    pub irq: Option<(u8, bool)>,
}

/// What the tables say about this machine.
pub(super) struct Contents<'a> {
    /// Local APIC id of each CPU. A CPU's number is its UID.
    pub apic_ids: &'a [u32],
    pub windows: &'a Windows,
    pub board: Board,
    /// Ports of the board that belong to no listed device: first port, how many.
    pub board_ports: &'a [(u16, u16)],
    pub isa: &'a [IsaDevice],
}

/// Checks a hardware id before it goes into AML (ACPI 6.4 section 6.1.5).
///
/// # Errors
/// Neither `AAA####` nor eight letters and digits.
pub(super) fn check_hid(hid: &str) -> Result<()> {
    let bytes = hid.as_bytes();
    let eisa = bytes.len() == 7
        && bytes[..3].iter().all(u8::is_ascii_uppercase)
        && bytes[3..].iter().all(u8::is_ascii_hexdigit);
    let acpi = bytes.len() == 8
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit());
    ensure!(
        eisa || acpi,
        "\"{hid}\" is no ACPI hardware id: expected one like PNP0501 or QEMU0001"
    );
    Ok(())
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Where direct boot puts the tables, of which [`link`] leaves the RSDP to its caller.
pub(super) struct Place {
    /// First address of the tables, without the RSDP; a multiple of 64.
    pub tables: u64,
    /// First address that they must leave free.
    pub end: u64,
}

/// Makes all tables.
pub(super) fn build(contents: &Contents<'_>) -> Blobs {
    let mut blobs = Blobs::default();
    // The guest writes to the FACS; at the front it is aligned for that.
    let facs = blobs.add(&bytes(&FACS::new()), loader::TABLES_ALIGN as usize);
    let dsdt = blobs.add(&dsdt::dsdt(contents), 16);
    blobs.seal(dsdt);
    let fadt = tables::fadt(facs as u32, dsdt as u32, contents.board);
    let fadt = blobs.add(&fadt, 16);
    for (field, width) in tables::FADT_POINTERS {
        blobs.pointer(Blob::Tables, fadt + field, width);
    }
    blobs.seal(fadt);
    let madt = blobs.add(&tables::madt(contents.apic_ids, contents.board), 16);
    blobs.seal(madt);
    let mut listed = vec![fadt, madt];
    if contents.board.pci {
        let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        mcfg.add_ecam(ECAM_BASE, 0, 0, LAST_BUS);
        let mcfg = blobs.add(&bytes(&mcfg), 16);
        blobs.seal(mcfg);
        listed.push(mcfg);
    }
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for &table in &listed {
        xsdt.add_entry(table as u64);
    }
    let xsdt = blobs.add(&bytes(&xsdt), 16);
    for entry in 0..listed.len() {
        blobs.pointer(Blob::Tables, xsdt + XSDT_ENTRIES + 8 * entry, 8);
    }
    blobs.seal(xsdt);
    blobs.rsdp = bytes(&Rsdp::new(OEM_ID, xsdt as u64));
    blobs.pointer(Blob::Rsdp, RSDP_XSDT, 8);
    let (first, all) = (RSDP_ACPI1_LEN, blobs.rsdp.len());
    blobs.checksum(Blob::Rsdp, RSDP_CHECKSUM, 0, first);
    blobs.checksum(Blob::Rsdp, RSDP_EXTENDED_CHECKSUM, 0, all);
    blobs.write_loader();
    blobs
}

/// Links the tables for direct boot.
///
/// # Errors
/// They don't fit, which takes more than a thousand CPUs.
pub(super) fn link(contents: &Contents<'_>, place: &Place) -> Result<Blobs> {
    let mut blobs = build(contents);
    let end = place.tables + blobs.tables.len() as u64;
    ensure!(
        end <= place.end,
        "the ACPI tables for {} CPUs end at {end:#x}, beyond {:#x}",
        contents.apic_ids.len(),
        place.end
    );
    blobs.link(place.tables)?;
    Ok(blobs)
}

#[cfg(test)]
mod tests;

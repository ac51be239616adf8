//! ACPI tables: how the guest learns of CPUs, interrupt wiring, PCI windows and power management.
//!
//! The set is small and of fixed shape: RSDP, XSDT, FADT, MADT, MCFG, FACS, and a DSDT with the PCI root and the
//! fixed devices. They lie in the ROM area below 1 MiB, where a guest without boot protocol searches too.

mod dsdt;
mod tables;

use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, facs::FACS};
use anyhow::{Result, ensure};

use super::e820::TABLES;
use super::{Board, ECAM_BASE};
use crate::pci::Apertures;

/// End of the area that the tables may use.
const AREA_END: u64 = 0x10_0000;
/// PCI buses are 0 to this. Linux asks for 32 devices on each bus that the tables speak of, which is an exit or two each.
const LAST_BUS: u8 = 0;
const OEM_ID: [u8; 6] = *b"VMMHST";
const OEM_TABLE_ID: [u8; 8] = *b"VMM-HOST";
const OEM_REVISION: u32 = 1;

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
    pub cpus: u32,
    pub board: Board,
    pub apertures: &'a Apertures,
    pub isa: &'a [IsaDevice],
}

/// All tables as one block of guest memory.
pub(super) struct Tables {
    /// Guest address of `bytes`, and of the RSDP, which comes first.
    pub base: u64,
    pub bytes: Vec<u8>,
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

/// Lays the tables out from [`TABLES`] on.
///
/// # Errors
/// They don't fit, which takes thousands of CPUs.
pub(super) fn build(contents: &Contents<'_>) -> Result<Tables> {
    let mut block = Vec::new();
    // The XSDT's pointers are only known at the end; room for the RSDP is kept at the front.
    let mut place = |table: &[u8], align: usize| {
        block.resize(block.len().next_multiple_of(align), 0);
        let address = TABLES + block.len() as u64;
        block.extend_from_slice(table);
        address
    };
    let rsdp_at = place(&[0; 36], 16);
    // The FACS is shared with the guest and aligned for that (ACPI 6.4 section 5.2.10).
    let facs = place(&bytes(&FACS::new()), 64);
    let dsdt = place(&dsdt::dsdt(contents), 16);
    let fadt = place(&tables::fadt(facs, dsdt, contents.board), 16);
    let madt = place(&tables::madt(contents.cpus, contents.board), 16);
    let mcfg = contents.board.pci.then(|| {
        let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        mcfg.add_ecam(ECAM_BASE, 0, 0, LAST_BUS);
        place(&bytes(&mcfg), 16)
    });
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [Some(fadt), Some(madt), mcfg].into_iter().flatten() {
        xsdt.add_entry(table);
    }
    let xsdt = place(&bytes(&xsdt), 16);
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    block[..rsdp.len()].copy_from_slice(&rsdp);
    let end = rsdp_at + block.len() as u64;
    ensure!(
        end <= AREA_END,
        "the ACPI tables for {} CPUs end at {end:#x}, beyond {AREA_END:#x}",
        contents.cpus
    );
    Ok(Tables {
        base: rsdp_at,
        bytes: block,
    })
}

#[cfg(test)]
mod tests;

//! The tables as blobs for firmware, with the script that links them: firmware puts each blob where it likes, adds the
//! blobs' addresses to the pointers between them, and computes the checksums. Direct boot does the same to its own copy.
//!
//! The script's format is QEMU's "linker/loader" (hw/acpi/bios-linker-loader.c), which OVMF and SeaBIOS execute.

use anyhow::{Context, Result, ensure};

/// The fw_cfg file with every table but the RSDP.
pub const TABLES_FILE: &str = "etc/acpi/tables";
/// The fw_cfg file with the RSDP.
pub const RSDP_FILE: &str = "etc/acpi/rsdp";
/// The fw_cfg file with the script.
pub const LOADER_FILE: &str = "etc/table-loader";

/// Alignment of the tables' blob: the FACS, which is its first table, asks for most (ACPI 6.4 section 5.2.10).
pub(super) const TABLES_ALIGN: u32 = 64;
/// Alignment of the RSDP (ACPI 6.4 section 5.2.5.1).
pub(super) const RSDP_ALIGN: u32 = 16;
/// Checksum's place in every table's header (ACPI 6.4 section 5.2.6).
const HEADER_CHECKSUM: usize = 9;

const COMMAND_LEN: usize = 128;
const NAME_LEN: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Anywhere, and 0xf0000 to 0xfffff, where a guest without boot protocol searches.
const ZONE_HIGH: u8 = 1;
const ZONE_FSEG: u8 = 2;

/// One of the two blobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blob {
    Tables,
    Rsdp,
}

impl Blob {
    fn file(self) -> [u8; NAME_LEN] {
        let name = match self {
            Blob::Tables => TABLES_FILE,
            Blob::Rsdp => RSDP_FILE,
        };
        let mut file = [0; NAME_LEN];
        file[..name.len()].copy_from_slice(name.as_bytes());
        file
    }
}

/// A field that is only known once the blobs have their places.
#[derive(Clone, Copy, Debug)]
pub(super) enum Link {
    /// `width` bytes at `at` hold an offset into the tables, to which their address is to be added.
    Pointer { blob: Blob, at: usize, width: u8 },
    /// The byte at `at` makes the sum of `len` bytes from `start` on 0.
    Checksum {
        blob: Blob,
        at: usize,
        start: usize,
        len: usize,
    },
}

/// The tables, not yet linked.
#[derive(Clone, Debug, Default)]
pub struct Blobs {
    /// [`TABLES_FILE`].
    pub tables: Vec<u8>,
    /// [`RSDP_FILE`].
    pub rsdp: Vec<u8>,
    /// [`LOADER_FILE`].
    pub loader: Vec<u8>,
    links: Vec<Link>,
}

impl Blobs {
    /// Adds a table and returns its offset. Its checksum is that of [`Blobs::seal`], once its pointers are set.
    pub(super) fn add(&mut self, table: &[u8], align: usize) -> usize {
        self.tables
            .resize(self.tables.len().next_multiple_of(align), 0);
        let offset = self.tables.len();
        self.tables.extend_from_slice(table);
        offset
    }

    /// Says that `width` bytes at `at`, which hold an offset into the tables, are a pointer.
    pub(super) fn pointer(&mut self, blob: Blob, at: usize, width: u8) {
        self.links.push(Link::Pointer { blob, at, width });
    }

    /// Has the checksum of the table at `start`, to the end of the blob, computed. To be called after its pointers.
    pub(super) fn seal(&mut self, start: usize) {
        let len = self.tables.len() - start;
        self.checksum(Blob::Tables, start + HEADER_CHECKSUM, start, len);
    }

    /// Has one checksum computed, in the order of the calls.
    pub(super) fn checksum(&mut self, blob: Blob, at: usize, start: usize, len: usize) {
        // Firmware sums up with the field itself.
        self.bytes(blob)[at] = 0;
        self.links.push(Link::Checksum {
            blob,
            at,
            start,
            len,
        });
    }

    fn bytes(&mut self, blob: Blob) -> &mut Vec<u8> {
        match blob {
            Blob::Tables => &mut self.tables,
            Blob::Rsdp => &mut self.rsdp,
        }
    }

    /// Writes the script.
    pub(super) fn write_loader(&mut self) {
        let mut script = Vec::with_capacity((2 + self.links.len()) * COMMAND_LEN);
        command(&mut script, ALLOCATE, |out| {
            out.extend(Blob::Tables.file());
            out.extend(TABLES_ALIGN.to_le_bytes());
            out.push(ZONE_HIGH);
        });
        command(&mut script, ALLOCATE, |out| {
            out.extend(Blob::Rsdp.file());
            out.extend(RSDP_ALIGN.to_le_bytes());
            out.push(ZONE_FSEG);
        });
        for link in &self.links {
            match *link {
                Link::Pointer { blob, at, width } => command(&mut script, ADD_POINTER, |out| {
                    out.extend(blob.file());
                    out.extend(Blob::Tables.file());
                    out.extend((at as u32).to_le_bytes());
                    out.push(width);
                }),
                Link::Checksum {
                    blob,
                    at,
                    start,
                    len,
                } => command(&mut script, ADD_CHECKSUM, |out| {
                    out.extend(blob.file());
                    for number in [at, start, len] {
                        out.extend((number as u32).to_le_bytes());
                    }
                }),
            }
        }
        self.loader = script;
    }

    /// Does firmware's part: makes both blobs what they are at these addresses.
    ///
    /// # Errors
    /// An address doesn't fit a pointer.
    pub(super) fn link(&mut self, tables_at: u64) -> Result<()> {
        for link in std::mem::take(&mut self.links) {
            match link {
                Link::Pointer { blob, at, width } => {
                    let field = self
                        .bytes(blob)
                        .get_mut(at..at + usize::from(width))
                        .context("an ACPI table ends before its pointer")?;
                    let mut value = [0; 8];
                    value[..field.len()].copy_from_slice(field);
                    let value = (u64::from_le_bytes(value) + tables_at).to_le_bytes();
                    ensure!(
                        value[field.len()..].iter().all(|byte| *byte == 0),
                        "the ACPI tables at {tables_at:#x} are out of reach of a pointer of {width} bytes"
                    );
                    field.copy_from_slice(&value[..field.len()]);
                }
                Link::Checksum {
                    blob,
                    at,
                    start,
                    len,
                } => {
                    let bytes = self.bytes(blob);
                    let sum = bytes
                        .get(start..start + len)
                        .context("an ACPI table ends before its checksum does")?
                        .iter()
                        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
                    bytes[at] = sum.wrapping_neg();
                }
            }
        }
        Ok(())
    }
}

/// Appends one command, padded to its fixed length.
fn command(script: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = script.len();
    script.extend(kind.to_le_bytes());
    body(script);
    script.resize(start + COMMAND_LEN, 0);
}

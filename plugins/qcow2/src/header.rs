//! The header of an image (qcow2 specification, "Header"), and which images are refused for it.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use vmm_plugin_api::Result;

use crate::file::DiskFile;
use crate::layout::Geometry;

const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Header of version 2; version 3 has more.
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// The longest L1 table, as in QEMU.
const MAX_L1_BYTES: u64 = 32 << 20;
/// The longest refcount table, as in QEMU.
pub const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// Where incompatible features are in the file.
pub const INCOMPATIBLE_AT: u64 = 72;
/// Where autoclear features are in the file.
pub const AUTOCLEAR_AT: u64 = 88;
/// Where the refcount table's offset (8 bytes) and number of clusters (4 bytes) are in the file.
pub const REFCOUNT_TABLE_AT: u64 = 48;
/// Refcounts may be wrong.
const DIRTY: u64 = 1 << 0;
/// Anything may be wrong.
pub const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// Header extensions.
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;

/// A format that a backing file may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes and nothing else.
    Raw,
    /// Another qcow2 image.
    Qcow2,
}

impl Format {
    /// The format of that name.
    ///
    /// # Errors
    /// It is another one.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            // Old programs call the format by the way the file is reached.
            "raw" | "file" | "host_device" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => {
                bail!("its backing file has the format `{other}`; only raw and qcow2 are supported")
            }
        }
    }
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1951, without a header.
    Deflate,
    /// RFC 8878.
    Zstd,
}

/// What an image says about itself. Offsets are aligned to clusters, and tables are within the file.
#[derive(Clone, Debug)]
pub struct Header {
    /// Cluster size, version and size of the disk.
    pub geometry: Geometry,
    /// Entries of the L1 table.
    pub l1_entries: u64,
    /// Where it is.
    pub l1_at: u64,
    /// Where the refcount table is.
    pub refcount_table_at: u64,
    /// How many clusters it has.
    pub refcount_table_clusters: u64,
    /// Logarithm of the bits in a refcount.
    pub refcount_order: u32,
    /// Incompatible features.
    pub incompatible: u64,
    /// Features that a program clears which does not know them, or does not keep them up to date.
    pub autoclear: u64,
    /// How clusters are compressed.
    pub compression: Compression,
    /// Name of the backing file, and its format if the image says so.
    pub backing: Option<(PathBuf, Option<String>)>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    field.map_or(0, u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

impl Header {
    /// Reads and checks the header of the image in `file`.
    ///
    /// # Errors
    /// It is no image, a damaged one, or it uses what is not supported.
    pub fn read(file: &DiskFile) -> Result<Self> {
        let mut first = [0; V3_BYTES];
        let start = usize::try_from(file.len()).map_or(V3_BYTES, |len| len.min(V3_BYTES));
        file.read(&mut first[..start], 0)
            .context("cannot read its header")?;
        ensure!(
            first.starts_with(MAGIC),
            "it is no qcow2 image: it does not start with `QFI\\xfb`; for a raw image set `type = \"file\"`"
        );
        let version = u32_at(&first, 4);
        ensure!(
            version == 2 || version == 3,
            "it has version {version} of the format; 2 and 3 are supported"
        );
        ensure!(
            start == V3_BYTES || version == 2 && start >= V2_BYTES,
            "it is cut short: only {start} bytes are left of it"
        );
        if version == 2 {
            first[V2_BYTES..].fill(0);
        }
        let cluster_bits = u32_at(&first, 20);
        ensure!(
            (9..=21).contains(&cluster_bits),
            "its header is damaged: clusters of 2^{cluster_bits} bytes; 2^9 to 2^21 are possible"
        );
        // All of the header is in the first cluster.
        let length = file.len().min(1 << cluster_bits);
        let mut bytes = vec![0; length as usize];
        file.read(&mut bytes, 0).context("cannot read its header")?;
        let header_bytes = match version {
            2 => V2_BYTES,
            _ => u32_at(&first, 100) as usize,
        };
        ensure!(
            header_bytes >= V2_BYTES
                && header_bytes <= bytes.len()
                && (version == 2 || header_bytes >= V3_BYTES),
            "its header is damaged: it claims to have {header_bytes} bytes"
        );
        let name = backing_name(&bytes)?;
        let (format, features) = extensions(&bytes, header_bytes, &name)?;
        let incompatible = u64_at(&first, 72);
        supported(&first, incompatible, features)?;
        let compression = match bytes.get(104) {
            Some(&kind) if incompatible & COMPRESSION_TYPE != 0 && header_bytes > V3_BYTES => {
                match kind {
                    0 => Compression::Deflate,
                    1 => Compression::Zstd,
                    kind => bail!(
                        "it has clusters compressed in a way ({kind}) that is not supported; convert it: qemu-img convert -O qcow2"
                    ),
                }
            }
            _ => Compression::Deflate,
        };
        let header = Self {
            geometry: Geometry {
                cluster_bits,
                zero_flag: version == 3,
                size: u64_at(&first, 24),
            },
            l1_entries: u32_at(&first, 36).into(),
            l1_at: u64_at(&first, 40),
            refcount_table_at: u64_at(&first, 48),
            refcount_table_clusters: u32_at(&first, 56).into(),
            refcount_order: if version == 2 { 4 } else { u32_at(&first, 96) },
            incompatible,
            autoclear: u64_at(&first, 88),
            compression,
            backing: name.map(|name| (name, format)),
        };
        header.check(file.len())?;
        Ok(header)
    }

    /// Whether sizes are possible and tables are where they can be.
    fn check(&self, file_bytes: u64) -> Result<()> {
        let geometry = self.geometry;
        ensure!(
            geometry.size > 0,
            "it is a disk of 0 bytes; give it a size: qemu-img resize"
        );
        ensure!(
            geometry.size <= i64::MAX as u64 && geometry.size.is_multiple_of(512),
            "its header is damaged: a disk of {} bytes",
            geometry.size
        );
        ensure!(
            self.l1_entries * 8 <= MAX_L1_BYTES && self.l1_entries >= geometry.l1_entries(),
            "its header is damaged: an L1 table of {} entries for a disk of {} bytes, which needs {}",
            self.l1_entries,
            geometry.size,
            geometry.l1_entries()
        );
        ensure!(
            self.refcount_order <= 6,
            "its header is damaged: refcounts of 2^{} bits",
            self.refcount_order
        );
        let refcount_bytes = self.refcount_table_clusters << geometry.cluster_bits;
        ensure!(
            (1..=MAX_REFCOUNT_TABLE.max(geometry.cluster())).contains(&refcount_bytes),
            "its header is damaged: a refcount table of {} clusters",
            self.refcount_table_clusters
        );
        for (what, at, bytes) in [
            ("L1 table", self.l1_at, self.l1_entries * 8),
            ("refcount table", self.refcount_table_at, refcount_bytes),
        ] {
            ensure!(
                at != 0 && geometry.within(at) == 0,
                "its header is damaged: the {what} is at {at:#x}"
            );
            ensure!(
                at.checked_add(bytes).is_some_and(|end| end <= file_bytes),
                "it is cut short or damaged: the {what} is at {at:#x} to {:#x}, the file ends at {file_bytes:#x}",
                at.saturating_add(bytes)
            );
        }
        Ok(())
    }

    /// Whether the image may be written to.
    ///
    /// # Errors
    /// It is marked as damaged, or as in use when its last user ended.
    pub fn check_writable(&self, path: &Path) -> Result<()> {
        let path = path.display();
        ensure!(
            self.incompatible & CORRUPT == 0,
            "it is marked as corrupt; save what can be read (qemu-img convert), or try to mend it: qemu-img check -r all '{path}'; `read_only = true` opens it as it is"
        );
        ensure!(
            self.incompatible & DIRTY == 0,
            "it was not closed and its refcounts are out of date (lazy refcounts); bring them up to date: qemu-img check -r all '{path}'"
        );
        Ok(())
    }
}

/// What is known by name and refused, and what is not known.
fn supported(first: &[u8], incompatible: u64, features: Option<&[u8]>) -> Result<()> {
    match u32_at(first, 32) {
        0 => {}
        1 => bail!(
            "it is encrypted (AES), which is not supported; convert it: qemu-img convert -O qcow2"
        ),
        2 => bail!(
            "it is encrypted (LUKS), which is not supported; convert it: qemu-img convert -O qcow2"
        ),
        other => bail!("its header is damaged: encryption method {other}"),
    }
    ensure!(
        incompatible & EXTERNAL_DATA == 0,
        "its data is in an external data file (data_file), which is not supported; convert it: qemu-img convert -O qcow2"
    );
    ensure!(
        incompatible & EXTENDED_L2 == 0,
        "it has extended L2 entries (extended_l2=on), which are not supported; convert it: qemu-img convert -O qcow2 -o extended_l2=off"
    );
    let unknown = incompatible & !(DIRTY | CORRUPT | COMPRESSION_TYPE);
    if unknown == 0 {
        return Ok(());
    }
    let bit = unknown.trailing_zeros();
    // Entries of 48 bytes: type, bit, name padded with zeroes ("Feature name table").
    let entries = features
        .into_iter()
        .flat_map(|table| table.chunks_exact(48));
    let name = entries
        .filter(|entry| entry[0] == 0 && u32::from(entry[1]) == bit)
        .map(|entry| {
            String::from_utf8_lossy(&entry[2..])
                .trim_end_matches('\0')
                .to_owned()
        })
        .next();
    match name {
        Some(name) => {
            bail!("it uses the feature {name:?} (incompatible bit {bit}), which is not supported")
        }
        None => bail!("it uses a feature that is not known (incompatible bit {bit})"),
    }
}

/// The backing file's name.
fn backing_name(bytes: &[u8]) -> Result<Option<PathBuf>> {
    let (at, len) = (u64_at(bytes, 8), u32_at(bytes, 16));
    if at == 0 {
        return Ok(None);
    }
    let name = usize::try_from(at)
        .ok()
        .filter(|_| (1..=1023).contains(&len))
        .and_then(|at| bytes.get(at..at.checked_add(len as usize)?));
    let name =
        name.context("its header is damaged: the backing file's name is outside of the header")?;
    ensure!(
        !name.contains(&0),
        "its header is damaged: the backing file's name has a zero byte"
    );
    Ok(Some(std::ffi::OsStr::from_bytes(name).into()))
}

/// The backing file's format and the table of feature names.
fn extensions<'a>(
    bytes: &'a [u8],
    from: usize,
    backing: &Option<PathBuf>,
) -> Result<(Option<String>, Option<&'a [u8]>)> {
    let end = match backing {
        Some(_) => usize::try_from(u64_at(bytes, 8))
            .unwrap_or(usize::MAX)
            .min(bytes.len()),
        None => bytes.len(),
    };
    let (mut format, mut features) = (None, None);
    let mut at = from;
    while at + 8 <= end {
        let (kind, len) = (u32_at(bytes, at), u32_at(bytes, at + 4) as usize);
        if kind == 0 {
            break;
        }
        let body = bytes.get(at + 8..end).and_then(|rest| rest.get(..len));
        let body = body.with_context(|| {
            format!("its header is damaged: an extension ({kind:#x}) of {len} bytes does not fit")
        })?;
        match kind {
            EXT_BACKING_FORMAT => format = Some(String::from_utf8_lossy(body).into_owned()),
            EXT_FEATURE_NAMES => features = Some(body),
            _ => {}
        }
        at += 8 + len.next_multiple_of(8);
    }
    Ok((format, features))
}

//! The volume: a FAT file system that is as large as its files need.
//!
//! A cluster is one sector, so that the number of clusters alone decides the kind of FAT: 12, 16 or 32 bits for an entry.
//! (Microsoft's FAT specification, "FAT Type Determination".) The same input makes the same bytes: dates are DOS's first.

use std::io::{Cursor, Write};

use anyhow::Context;
use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use vmm_plugin_api::Result;

use crate::seed::File;

/// By this name cloud-init finds it. Eleven bytes, filled up with blanks.
const LABEL: &[u8; 11] = b"cidata     ";
/// Entries of the root directory of FAT12 and FAT16; each has 32 bytes.
const ROOT_ENTRIES: u32 = 512;
/// Copies of the FAT.
const FATS: u32 = 2;
/// Some drivers draw the line between two kinds of FAT a few clusters beside the specification's: volumes keep away from it.
const DOUBT: u32 = 16;
/// The first number of clusters that is FAT16, and FAT32.
const KINDS: [u32; 2] = [4085, 65525];
/// Fewer clusters than this fatfs does not make.
const CLUSTERS_MIN: u32 = 7;
/// Clusters beyond the files'. FAT32's root directory is one of them.
const CLUSTERS_FREE: u32 = 2;
/// Sectors in a track of volumes that are too large to be one track.
const TRACK: u16 = 32;

/// Lays out the files as a volume with sectors of `sector` bytes (512, 1024, 2048 or 4096).
///
/// # Errors
/// There is not enough memory.
pub fn make(files: [File<'_>; 3], sector: u32) -> Result<Vec<u8>> {
    let lengths = files.iter().map(|(_, contents)| contents.len());
    let layout = Layout::new(lengths, sector)?;
    let size = layout.sectors as usize * sector as usize;
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(size)
        .with_context(|| format!("no memory for a volume of {} MiB", size >> 20))?;
    bytes.resize(size, 0);

    let mut disk = Cursor::new(&mut bytes[..]);
    let options = FormatVolumeOptions::new()
        .bytes_per_sector(sector as u16)
        .bytes_per_cluster(sector)
        .max_root_dir_entries(ROOT_ENTRIES as u16)
        .fats(FATS as u8)
        .sectors_per_track(layout.track)
        .fat_type(layout.kind)
        .volume_label(*LABEL);
    fatfs::format_volume(&mut disk, options).context("cannot format the volume")?;
    disk.set_position(0);
    let fs = FileSystem::new(&mut disk, FsOptions::new()).context("cannot open the volume")?;
    for (name, contents) in files {
        fs.root_dir()
            .create_file(name)
            .and_then(|mut file| file.write_all(&contents).and_then(|()| file.flush()))
            .with_context(|| {
                format!(
                    "cannot put {name} ({} bytes) into the volume",
                    contents.len()
                )
            })?;
    }
    fs.unmount().context("cannot finish the volume")?;
    Ok(bytes)
}

/// How a volume is divided.
struct Layout {
    kind: FatType,
    /// All of it, in sectors.
    sectors: u32,
    /// Sectors in a track, of which there is a whole number: mtools insists.
    track: u16,
}

impl Layout {
    /// For files of these lengths.
    fn new(lengths: impl Iterator<Item = usize>, sector: u32) -> Result<Self> {
        let data: usize = lengths.map(|len| len.div_ceil(sector as usize)).sum();
        let data = u32::try_from(data).context("the files are too long for a volume")?;
        let fewest = (data + CLUSTERS_FREE).max(CLUSTERS_MIN);
        let whole = |clusters: &u32| {
            let sectors = total(*clusters, sector);
            let clear = KINDS.iter().all(|kind| clusters.abs_diff(*kind) >= DOUBT);
            clear && sectors.is_multiple_of(track(sectors).into())
        };
        let clusters = (fewest..)
            .find(whole)
            .context("the files are too long for a volume")?;
        let sectors = total(clusters, sector);
        Ok(Self {
            kind: kind(clusters),
            sectors,
            track: track(sectors),
        })
    }
}

/// Sectors in a track: a small volume is one, as in propolis.
fn track(sectors: u32) -> u16 {
    u16::try_from(sectors).unwrap_or(TRACK)
}

fn kind(clusters: u32) -> FatType {
    match clusters {
        _ if clusters < KINDS[0] => FatType::Fat12,
        _ if clusters < KINDS[1] => FatType::Fat16,
        _ => FatType::Fat32,
    }
}

/// Sectors of a volume with so many clusters: those, the FATs, and what comes before and between.
fn total(clusters: u32, sector: u32) -> u32 {
    let root = ROOT_ENTRIES * 32 / sector;
    let (bits, rest) = match kind(clusters) {
        FatType::Fat12 => (12, 1 + root),
        FatType::Fat16 => (16, 1 + root),
        FatType::Fat32 => (32, 8),
    };
    // The first two entries stand for no cluster.
    let fat = (clusters + 2).div_ceil(sector * 8 / bits);
    rest + FATS * fat + clusters
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::borrow::Cow;

    /// A volume for one file of so many bytes, and what fatfs makes of it.
    fn volume(len: usize, sector: u32) -> (FatType, u32, u32) {
        let contents = vec![0x5a; len];
        let empty = |name| (name, Cow::Borrowed(&[][..]));
        let files = [
            ("user-data", Cow::Borrowed(&contents[..])),
            empty("meta-data"),
            empty("network-config"),
        ];
        let mut bytes = make(files, sector).unwrap();
        let size = bytes.len() as u32;
        let fs = FileSystem::new(Cursor::new(&mut bytes[..]), FsOptions::new()).unwrap();
        let clusters = fs.stats().unwrap().total_clusters();
        (fs.fat_type(), clusters, size / sector)
    }

    #[test]
    fn small_volumes_are_as_large_as_propolis_makes_them() {
        for (len, sectors) in [(0, 42), (5 * 512, 42), (6 * 512, 43), (300 * 512, 337)] {
            assert_eq!(volume(len, 512), (FatType::Fat12, sectors - 35, sectors));
        }
    }

    /// Around both lines between kinds, the clusters are as many as the layout says, and the kind is what that number means.
    #[test]
    fn the_kind_of_fat_follows_from_the_clusters_and_is_never_in_doubt() {
        let around = |clusters: u32, step| (clusters - 40..clusters + 24).step_by(step);
        for (files, sector) in [
            (around(KINDS[0], 1), 512),
            (around(KINDS[0], 9), 4096),
            (around(KINDS[1], 3), 512),
        ] {
            for clusters in files {
                let found = volume((clusters * sector) as usize, sector);
                assert_eq!(found.0, kind(found.1), "{clusters} clusters of {sector}");
                assert_eq!(found.2, total(found.1, sector), "{clusters} of {sector}");
                assert!(
                    KINDS.iter().all(|kind| found.1.abs_diff(*kind) >= DOUBT),
                    "{clusters} of {sector}: {found:?}"
                );
                assert!(found.1 < clusters + 80, "{clusters} of {sector}: {found:?}");
            }
        }
    }
}

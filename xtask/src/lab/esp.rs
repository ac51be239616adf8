//! FAT file systems that firmware reads, made by dosfstools and mtools.

use super::directory;
use super::images::succeed;
use crate::packages;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

/// The smallest that firmware takes for FAT16.
const SHELL_BYTES: u64 = 8 << 20;

/// Makes the disk of firmware's own shell: it has the script that the shell runs at start.
pub fn shell(image: &Path) -> Result<()> {
    format(image, SHELL_BYTES)?;
    let script = directory().join("startup.nsh");
    add(image, &script, "::/startup.nsh")
}

/// Makes an empty file system.
pub fn format(image: &Path, bytes: u64) -> Result<()> {
    let file =
        fs::File::create(image).with_context(|| format!("cannot create {}", image.display()))?;
    file.set_len(bytes)?;
    let mkfs = packages::program("mkfs.vfat", "dosfstools")?;
    succeed(Command::new(mkfs).args(["-n", "ESP"]).arg(image))
}

/// Copies a file into it.
pub fn add(image: &Path, file: &Path, to: &str) -> Result<()> {
    let mcopy = packages::program("mcopy", "mtools")?;
    succeed(Command::new(mcopy).arg("-i").arg(image).arg(file).arg(to))
}

//! Files that a VM file names: their directories, and how to open them without being held up.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Opens a file to be read as a whole. It may have been replaced since it was checked.
///
/// # Errors
/// It can't be read, or is no regular file: the text names it.
pub fn open_regular(path: &Path) -> Result<File> {
    let name = || format!("Cannot read {}", path.display());
    // Opening a FIFO would otherwise wait for somebody to write to it.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .with_context(name)?;
    let regular = file.metadata().with_context(name)?.is_file();
    ensure!(regular, "{} is not a regular file", path.display());
    Ok(file)
}

/// Where a file of this name is.
#[must_use]
pub fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

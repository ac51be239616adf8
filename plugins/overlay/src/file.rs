//! The overlay's file: made, or opened and compared with the base.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use vmm_block_file::{Image, take_lock};

use crate::layout::{HEADER_BYTES, Layout};

/// What is to become of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Made if need be, kept.
    Keep,
    /// Opened for reading and shared.
    Read,
    /// Made without a name, gone with its last descriptor.
    ThrowAway,
}

/// Opens the file at `path`, or makes it, for an overlay of `layout` over the base that `identity` stands for.
///
/// # Errors
/// What is wrong with the file, or with the base for it, and what to do.
pub fn open(path: &Path, usage: Use, layout: &Layout, identity: u64) -> Result<Arc<Image>> {
    let name = path.display();
    let file = match usage {
        Use::ThrowAway => unnamed(path)?,
        Use::Keep => named(path, true)?,
        Use::Read => named(path, false)?,
    };
    if usage != Use::ThrowAway {
        take_lock(&file, path, usage == Use::Read)?;
        adopt(&file, path, usage, layout, identity)?;
    }
    let long = || format!("cannot make `{name}` {} bytes long", layout.file_bytes());
    let len = file.metadata()?.len();
    if usage != Use::Read && len < layout.file_bytes() {
        file.set_len(layout.file_bytes()).with_context(long)?;
    }
    let image = Image::made(
        file,
        path,
        layout.file_bytes(),
        usage == Use::Read,
        usage == Use::ThrowAway,
    );
    if image.in_memory() && usage != Use::Read {
        log::warn!(
            "`{name}` lies on a filesystem in memory: what the guest writes takes memory of this machine"
        );
    }
    Ok(Arc::new(image))
}

fn named(path: &Path, write: bool) -> Result<File> {
    let name = path.display();
    if let Ok(metadata) = std::fs::metadata(path) {
        ensure!(
            metadata.is_file(),
            "`{name}` is no plain file; `path` names the file that the overlay keeps its writes in"
        );
    }
    let opened = File::options()
        .read(true)
        .write(write)
        .create(write)
        .mode(0o644)
        .open(path);
    opened.with_context(|| match write {
        true => format!("cannot open or make `{name}` for the overlay's writes"),
        false => {
            format!("cannot open the overlay `{name}`; without `read_only = true` it would be made")
        }
    })
}

/// A file in the folder of `path` that has no name any more.
fn unnamed(path: &Path) -> Result<File> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = folder.join(format!(".overlay-{}-{count}", std::process::id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&name);
    let file = file.with_context(|| {
        format!(
            "cannot make a file for the overlay's writes in `{}`",
            folder.display()
        )
    })?;
    std::fs::remove_file(&name).with_context(|| format!("cannot remove `{}`", name.display()))?;
    Ok(file)
}

/// Checks the header of a file that has one, or gives an empty file its header.
fn adopt(file: &File, path: &Path, usage: Use, layout: &Layout, identity: u64) -> Result<()> {
    let name = path.display();
    let mut header = [0; HEADER_BYTES];
    let mut got = 0;
    while got < HEADER_BYTES {
        match file.read_at(&mut header[got..], got as u64) {
            Ok(0) => break,
            Ok(count) => got += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).with_context(|| format!("cannot read `{name}`")),
        }
    }
    let len = file.metadata()?.len();
    // Empty, or left over by a power cut while it was made.
    if len <= HEADER_BYTES as u64 && header.iter().all(|byte| *byte == 0) {
        if usage == Use::Read {
            bail!("`{name}` is empty, not an overlay; without `read_only = true` it becomes one");
        }
        return (|| {
            file.write_all_at(&layout.header(identity), 0)?;
            file.sync_all()?;
            // The name has to survive as well.
            let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
            File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
        })()
        .with_context(|| format!("cannot start the overlay `{name}`"));
    }
    if let Err(error) = layout.check(identity, &header) {
        bail!("`{name}` {error}");
    }
    ensure!(
        usage != Use::Read || len >= layout.file_bytes(),
        "`{name}` has been cut to {len} bytes; it needs {}",
        layout.file_bytes()
    );
    Ok(())
}

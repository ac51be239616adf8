//! Opens a file that holds a disk, with the lock that keeps others from writing to it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use rustix::fs::{Mode, OFlags};
use vmm_plugin_api::Result;

use crate::lock::take_lock;
use crate::system;

/// Opens and locks the file or block device at `path`: for this process alone, or, with `read_only`, shared with others that
/// read. Also tells whether it is a device. `direct` bypasses the page cache. For formats that read and write where they like: a
/// raw device is refused.
///
/// # Errors
/// What is wrong with the file, or who has it, and what to do.
pub fn open_locked(path: &Path, read_only: bool, direct: bool) -> Result<(File, bool)> {
    let (file, is_device) = open_disk(path, read_only, direct)?;
    ensure!(
        !system::is_raw(file.as_fd()),
        "`{}` is a raw device, which only takes whole blocks; give the block device of the same name, in /dev/dsk or /dev/zvol/dsk",
        path.display()
    );
    Ok((file, is_device))
}

/// The same for a disk that is read and written in its own blocks, on a raw device too.
pub fn open_disk(path: &Path, read_only: bool, direct: bool) -> Result<(File, bool)> {
    let is_device = check_kind(path)?;
    let file = open(path, read_only, direct)?;
    ensure!(
        !system::is_raw(file.as_fd()) || system::device_blocks(file.as_fd()).is_some(),
        neither(path)
    );
    take_lock(&file, path, read_only)?;
    Ok((file, is_device))
}

fn neither(path: &Path) -> String {
    format!("`{}` is neither a file nor a block device", path.display())
}

/// Whether it is a device that may be a disk; an error if it is neither that nor a file. Asked before open, which may wait for a FIFO.
fn check_kind(path: &Path) -> Result<bool> {
    let kind = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(error).with_context(|| {
                format!(
                    "no disk image at `{0}`; mend `path`, or make an empty image: truncate -s 1G '{0}'",
                    path.display()
                )
            });
        }
        Err(error) => {
            return Err(error).with_context(|| format!("cannot look at `{}`", path.display()));
        }
    };
    if kind.is_dir() {
        bail!(
            "`{}` is a directory; `path` has to name an image file or a block device",
            path.display()
        );
    }
    let may_be_disk = system::may_be_disk(kind);
    ensure!(kind.is_file() || may_be_disk, neither(path));
    Ok(may_be_disk)
}

fn open(path: &Path, read_only: bool, direct: bool) -> Result<File> {
    let access = if read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    let error = match system::open(path, OFlags::CLOEXEC | access, direct) {
        Ok(file) => return Ok(file.into()),
        Err(error) => error,
    };
    let name = path.display();
    let readable =
        || rustix::fs::open(path, OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty()).is_ok();
    let advice = match error {
        rustix::io::Errno::INVAL if direct => {
            format!("the filesystem of `{name}` has no direct I/O; remove `direct`")
        }
        rustix::io::Errno::ACCESS | rustix::io::Errno::PERM | rustix::io::Errno::ROFS
            if !read_only && readable() =>
        {
            format!(
                "`{name}` can't be written to; set `read_only = true`, or allow it: chmod u+w '{name}'"
            )
        }
        rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
            format!("no permission to open `{name}`; run as its owner, or change its mode or group")
        }
        _ => format!("cannot open `{name}`"),
    };
    Err(io::Error::from(error)).context(advice)
}

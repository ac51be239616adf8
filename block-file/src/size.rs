//! How large an image is: made as large as the VM file wants it, measured, and measured again while a VM uses it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, bail, ensure};
use vmm_plugin_api::{DiskSize, Result};

use crate::system;

/// Nothing of the image is lost.
const INTACT: u64 = u64::MAX;

/// Bytes in the file or device.
fn measure(file: &File, path: &Path) -> Result<u64> {
    system::bytes(file.as_fd())
        .with_context(|| format!("cannot find the size of `{}`", path.display()))
}

/// What [`grow`] has to know of the image besides its file.
#[derive(Clone, Copy)]
pub struct Kind {
    /// A block device, whose size is not ours to change.
    pub is_device: bool,
    /// Opened for reading.
    pub read_only: bool,
    /// Bytes in a block.
    pub block: u32,
}

/// Grows the file to `wanted` bytes, without taking space for them; one of that size stays as it is.
///
/// # Errors
/// It is larger, or can't be grown: its size, the one that is wanted, and what to do. It is as it was.
pub fn grow(file: &File, path: &Path, kind: Kind, wanted: u64) -> Result<()> {
    let name = path.display();
    let block = u64::from(kind.block);
    ensure!(
        wanted > 0 && wanted.is_multiple_of(block),
        "`size` is {wanted} bytes; use a multiple of `block_size` ({block})"
    );
    let present = measure(file, path)?;
    if present == wanted {
        return Ok(());
    }
    ensure!(
        present < wanted,
        "`{name}` has {present} bytes, more than `size` ({wanted}), and is not cut; use `size = {present}`, or remove `size`"
    );
    ensure!(
        !kind.is_device,
        "`{name}` is a block device of {present} bytes, and `size` is {wanted}; make the device larger by its own tools, or remove `size`"
    );
    ensure!(
        !kind.read_only,
        "`{name}` has {present} bytes, and `size` is {wanted}; with `read_only = true` it is not grown: remove `size`, or grow it first: truncate -s {wanted} '{name}'"
    );
    let result = loop {
        match rustix::fs::ftruncate(file, wanted) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result,
        }
    };
    if let Err(error) = result {
        let advice = match error {
            rustix::io::Errno::FBIG => {
                "; its filesystem has no files of that size, or this process may not make them (ulimit -f)"
            }
            rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT => {
                "; there is no room on its filesystem"
            }
            _ => "",
        };
        let text = format!("cannot grow `{name}` from {present} to {wanted} bytes{advice}");
        return Err(io::Error::from(error)).context(text);
    }
    log::info!("`{name}` has been grown from {present} to {wanted} bytes, as `size` says");
    if let Ok(system) = rustix::fs::fstatvfs(file) {
        let free = system.f_bavail.saturating_mul(system.f_frsize);
        if free < wanted - present {
            log::warn!(
                "`{name}` may take {} bytes more, and its filesystem has {free}: when that is full, the guest's writes fail",
                wanted - present
            );
        }
    }
    Ok(())
}

/// Bytes in the image at first: whole blocks.
pub fn whole(file: &File, path: &Path, block: u32) -> Result<u64> {
    let name = path.display();
    let bytes = measure(file, path)?;
    ensure!(
        bytes > 0,
        "`{name}` is empty; give it a size: `size = \"1G\"`, or truncate -s 1G '{name}'"
    );
    let surplus = bytes % u64::from(block);
    ensure!(
        surplus == 0,
        "`{name}` has {bytes} bytes, {surplus} more than a multiple of `block_size` ({block}): it may be cut short or no raw image; to pad it with zeroes: truncate -s {} '{name}'",
        bytes - surplus + u64::from(block)
    );
    Ok(bytes)
}

/// The size of an image in use. It follows a file that grows, and never gets smaller: what is lost of a file that shrinks
/// fails to be read and written, until the VM is started again.
#[derive(Debug)]
pub struct Extent {
    size: DiskSize,
    /// From this byte on the file has ended at some time. Never gets larger: zeroes that come back in place of data are no data.
    intact: AtomicU64,
}

impl Extent {
    /// Of an image that is `bytes` large at first.
    pub fn new(bytes: u64) -> Self {
        Self {
            size: DiskSize::new(bytes),
            intact: AtomicU64::new(INTACT),
        }
    }

    /// The size that the guest may use.
    pub fn bytes(&self) -> u64 {
        self.size.bytes()
    }

    /// Where the intact part ends; beyond every request if nothing is lost.
    pub fn intact(&self) -> u64 {
        self.intact.load(Ordering::Acquire)
    }

    /// Whether part of the image has been lost.
    pub fn lost(&self) -> bool {
        self.intact() != INTACT
    }

    /// Measures the file again and follows it as far as it has grown by whole blocks. Returns the size.
    ///
    /// # Errors
    /// It has shrunk, now or before.
    pub fn look_again(&self, file: &File, path: &Path, block: u32) -> Result<u64> {
        let bytes = measure(file, path)?;
        if bytes < self.bytes() {
            self.intact.fetch_min(bytes, Ordering::AcqRel);
        }
        if self.lost() {
            bail!(self.loss(path));
        }
        self.size.grow(bytes - bytes % u64::from(block));
        Ok(self.bytes())
    }

    /// A read has met the end of the file, or another error: finds out which, and says so once.
    pub fn failed(&self, file: &File, path: &Path) {
        let Ok(bytes) = measure(file, path) else {
            return;
        };
        if bytes < self.bytes() && self.intact.fetch_min(bytes, Ordering::AcqRel) == INTACT {
            log::error!("{}", self.loss(path));
        }
    }

    fn loss(&self, path: &Path) -> String {
        format!(
            "`{}` has been cut to {} bytes under the VM, whose disk has {}: what lay behind them is lost, and requests for it and every flush fail until the VM is started again; stop it and restore the image",
            path.display(),
            self.intact(),
            self.bytes()
        )
    }
}

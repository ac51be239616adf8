//! An open image: the checks before a VM may use it, and each operation done by the calling thread.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::ensure;
use vmm_plugin_api::abi::block::{
    BLOCK_DISCARD, BLOCK_READ_ONLY, BLOCK_VOLATILE_CACHE, BLOCK_WRITE_ZEROES,
};
use vmm_plugin_api::{BlockInfo, BlockOp, GuestSlice, Result};

use crate::mapped::Mapped;
use crate::open::open_disk;
use crate::size::{self, Extent};
use crate::system;
use crate::transfer::{Direction, bounced, transfer};
use crate::vanished::tell_if_deleted;

/// Longest scatter list; below every system's IOV_MAX.
pub const MAX_SEGMENTS: u32 = 256;
/// Longest discard or write-zeroes: where a filesystem can only zero by writing, this bounds one request's time.
pub const MAX_DISCARD: u32 = 128 << 20;
/// Bytes in a block of a CD.
const CD_BLOCK: u32 = 2048;
/// Zeroes written at once where a filesystem has no better way; aligned for direct I/O.
const ZEROES: usize = 64 << 10;

#[repr(align(4096))]
struct Zeroes([u8; ZEROES]);
static ZERO_BLOCK: Zeroes = Zeroes([0; ZEROES]);

/// The options, as the VM file gives them.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Image file or block device.
    pub path: PathBuf,
    /// Open it for reading and share it.
    pub read_only: bool,
    /// Bytes in a block.
    pub block_size: u32,
    /// Bytes that a smaller file is grown to.
    pub size: Option<u64>,
    /// Flushes do nothing.
    pub skip_flush: bool,
    /// Bypass the page cache.
    pub direct: bool,
    /// Punch holes.
    pub discard: bool,
}

/// An open, locked image.
pub struct Image {
    file: File,
    path: PathBuf,
    info: BlockInfo,
    extent: Extent,
    skip_flush: bool,
    /// Alignment that direct I/O wants of addresses and lengths.
    direct: Option<usize>,
    discard: bool,
    in_memory: bool,
    /// How it is read if it lives in memory.
    mapped: Option<Mapped>,
    /// It had a name when it was opened.
    named: bool,
    /// The device's cache keeps writes only for as long as this is open.
    write_through: bool,
    /// A flush has failed: the kernel has dropped the pages it could not write, and would call the next flush a success. Or the file
    /// has lost its end.
    flush_failed: AtomicBool,
}

impl Image {
    /// Opens, locks and measures the image.
    ///
    /// # Errors
    /// What is wrong with the file or the options, and what to do.
    pub fn open(settings: &Settings) -> Result<Self> {
        let (path, block) = (settings.path.as_path(), settings.block_size);
        ensure!(
            block.is_power_of_two() && (512..=65536).contains(&block),
            "`block_size` is {block}; use a power of two from 512 to 65536"
        );
        let (file, is_device) = open_disk(path, settings.read_only, settings.direct)?;
        let (logical, physical) = block_sizes(&file, is_device)?;
        ensure!(
            block.is_multiple_of(logical),
            "`{}` has blocks of {logical} bytes; set `block_size = {logical}`",
            path.display()
        );
        ensure!(
            block != CD_BLOCK || settings.read_only || logical == CD_BLOCK,
            "`block_size = {CD_BLOCK}` makes a CD of `{}`, which can't be written to; add `read_only = true`, or use another block size",
            path.display()
        );
        if let Some(wanted) = settings.size {
            let kind = size::Kind {
                is_device,
                read_only: settings.read_only,
                block,
            };
            size::grow(&file, path, kind, wanted)?;
        }
        let bytes = size::whole(&file, path, block)?;
        let direct = if settings.direct || system::is_raw(file.as_fd()) {
            Some(direct_alignment(file.as_fd(), path, block)?)
        } else {
            None
        };
        let discard =
            settings.discard && !settings.read_only && system::can_punch(file.as_fd(), bytes);
        let mut features = 0;
        for (bit, on) in [
            (BLOCK_READ_ONLY, settings.read_only),
            (BLOCK_WRITE_ZEROES, !settings.read_only),
            (BLOCK_DISCARD, discard),
            (
                BLOCK_VOLATILE_CACHE,
                !settings.read_only && !settings.skip_flush,
            ),
        ] {
            features |= if on { bit } else { 0 };
        }
        let info = BlockInfo {
            bytes,
            logical: block,
            physical: physical.clamp(block, block.max(65536)),
            features,
            max_segments: MAX_SEGMENTS,
            alignment: 1,
            max_discard: if settings.read_only { 0 } else { MAX_DISCARD },
        };
        let in_memory = !is_device && system::in_memory(file.as_fd());
        // The guest flushes what has to last.
        let write_through = !settings.read_only && system::write_back(file.as_fd());
        let through_cache = in_memory && direct.is_none();
        Ok(Self {
            in_memory,
            mapped: through_cache.then(|| Mapped::new(&file, bytes)).flatten(),
            file,
            path: path.to_owned(),
            info,
            extent: Extent::new(bytes),
            skip_flush: settings.skip_flush,
            direct,
            discard,
            named: true,
            write_through,
            flush_failed: AtomicBool::new(false),
        })
    }

    /// Around a file that its backend has made, checked and locked itself: `bytes` long, in blocks of 512 bytes. If
    /// `skip_flush`, flushes do nothing.
    pub fn made(file: File, path: &Path, bytes: u64, read_only: bool, skip_flush: bool) -> Self {
        let discard = !read_only && system::can_punch(file.as_fd(), bytes);
        let mut features = if read_only {
            BLOCK_READ_ONLY
        } else {
            BLOCK_WRITE_ZEROES
        };
        if discard {
            features |= BLOCK_DISCARD;
        }
        if !read_only && !skip_flush {
            features |= BLOCK_VOLATILE_CACHE;
        }
        let info = BlockInfo {
            bytes,
            logical: 512,
            physical: 4096,
            features,
            max_segments: MAX_SEGMENTS,
            alignment: 1,
            max_discard: if read_only { 0 } else { MAX_DISCARD },
        };
        let in_memory = system::in_memory(file.as_fd());
        Self {
            in_memory,
            mapped: in_memory.then(|| Mapped::new(&file, bytes)).flatten(),
            named: rustix::fs::fstat(&file).is_ok_and(|stat| stat.st_nlink > 0),
            file,
            path: path.to_owned(),
            info,
            extent: Extent::new(bytes),
            skip_flush,
            write_through: false,
            direct: None,
            discard,
            flush_failed: AtomicBool::new(false),
        }
    }

    /// Size at first, units, features.
    pub fn info(&self) -> BlockInfo {
        self.info
    }

    /// The size that has been seen last, and which part of it is intact.
    pub fn extent(&self) -> &Extent {
        &self.extent
    }

    /// Looks at the size of the file again; the disk follows it as far as it has grown by whole blocks. Returns its size in bytes.
    ///
    /// # Errors
    /// The file has shrunk: what is lost, which fails from now on.
    pub fn look_again(&self) -> Result<u64> {
        self.extent
            .look_again(&self.file, &self.path, self.info.logical)
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether nothing ever waits for the file.
    pub fn in_memory(&self) -> bool {
        self.in_memory
    }

    /// Whether transfers go through the page cache.
    pub fn buffered(&self) -> bool {
        self.direct.is_none()
    }

    /// Whether flushes are to be dropped.
    pub fn skips_flush(&self) -> bool {
        self.skip_flush
    }

    /// Whether a request that may free space (`unmap`) is to do so.
    pub fn frees(&self, unmap: bool) -> bool {
        unmap && self.discard
    }

    /// Whether direct I/O can't take the list as it is.
    pub fn misaligned(&self, list: &[GuestSlice]) -> bool {
        self.direct.is_some_and(|unit| {
            let fits = |s: &GuestSlice| (s.as_ptr() as usize | s.len()).is_multiple_of(unit);
            !list.iter().all(fits)
        })
    }

    /// Does an operation that fits [`Image::info`], as far as it has not been done: the first `done` bytes have been
    /// transferred already. 0 or `-errno`.
    pub fn perform(
        &self,
        op: BlockOp,
        offset: u64,
        len: u64,
        list: &[GuestSlice],
        done: usize,
    ) -> i32 {
        let code = match op {
            BlockOp::Read if done == 0 && self.read_mapped(offset, list) => 0,
            BlockOp::Read => self.transfer(Direction::Read, offset, list, done),
            BlockOp::Write { fua } => match self.transfer(Direction::Write, offset, list, done) {
                0 if fua => self.flush(),
                code => code,
            },
            BlockOp::Flush => self.flush(),
            BlockOp::Discard => system::discard(self.fd(), offset, len),
            BlockOp::WriteZeroes { unmap } => self.write_zeroes(offset, len, unmap),
        };
        if let Some(mapped) = &self.mapped {
            match op {
                BlockOp::Write { .. } if code == 0 => mapped.written(offset, len),
                BlockOp::Discard | BlockOp::WriteZeroes { .. } => mapped.freed(offset, len),
                _ => {}
            }
        }
        code
    }

    fn read_mapped(&self, offset: u64, list: &[GuestSlice]) -> bool {
        let mapped = self.mapped.as_ref();
        mapped.is_some_and(|mapped| mapped.read(self.fd(), offset, list))
    }

    fn transfer(&self, way: Direction, offset: u64, list: &[GuestSlice], done: usize) -> i32 {
        let code = match self.direct {
            Some(unit) if self.misaligned(list) => bounced(self.fd(), way, offset, list, unit),
            _ => transfer(self.fd(), way, offset + done as u64, list, done),
        };
        if code == -libc::EIO {
            self.extent.failed(&self.file, &self.path);
        }
        code
    }

    /// Waits until what has been written is on stable storage.
    fn flush(&self) -> i32 {
        if self.skip_flush {
            return 0;
        }
        let code = loop {
            match system::flush(self.fd()) {
                Ok(()) => break 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => break -error.raw_os_error(),
            }
        };
        self.flushed(code)
    }

    /// What to answer to a flush whose system call has given `code`. After one failure, and once the file has been cut, all fail: what
    /// was lost then can't come back, so no later flush may claim that all earlier writes are safe.
    pub fn flushed(&self, code: i32) -> i32 {
        if code < 0 && !self.flush_failed.swap(true, Ordering::AcqRel) {
            log::error!(
                "`{}`: flush failed: {}; data the guest has written may be lost, so every flush fails from now on",
                self.path.display(),
                io::Error::from_raw_os_error(-code)
            );
        }
        if code == 0 && (self.flush_failed.load(Ordering::Acquire) || self.extent.lost()) {
            return -libc::EIO;
        }
        code
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> i32 {
        if self.frees(unmap) && system::punch(self.fd(), offset, len) == 0 {
            return 0;
        }
        match system::zero(self.fd(), offset, len) {
            // A device may want larger units than a block; writing works always.
            code if code == -libc::ENOTSUP || code == -libc::EINVAL => {
                self.store_zeroes(offset, len)
            }
            code => code,
        }
    }

    fn store_zeroes(&self, offset: u64, len: u64) -> i32 {
        let mut done = 0;
        while done < len {
            let piece = usize::try_from(len - done).map_or(ZEROES, |left| left.min(ZEROES));
            match rustix::io::pwrite(self.fd(), &ZERO_BLOCK.0[..piece], offset + done) {
                Ok(0) => return -libc::EIO,
                Ok(written) => done += written as u64,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return -error.raw_os_error(),
            }
        }
        0
    }
}

/// Logical and physical block size.
fn block_sizes(file: &File, is_device: bool) -> Result<(u32, u32)> {
    if is_device && let Some(sizes) = system::device_blocks(file.as_fd()) {
        return Ok(sizes);
    }
    let stat = rustix::fs::fstat(file)?;
    let preferred = u32::try_from(stat.st_blksize).unwrap_or(4096);
    Ok((
        512,
        if preferred.is_power_of_two() {
            preferred
        } else {
            4096
        },
    ))
}

/// Alignment for direct I/O; an error if blocks are too small for it.
fn direct_alignment(file: BorrowedFd<'_>, path: &Path, block: u32) -> Result<usize> {
    let (memory, offset) = system::direct_alignment(file).unwrap_or((block, block));
    ensure!(
        offset > 0,
        "the filesystem of `{}` has no direct I/O; remove `direct`",
        path.display()
    );
    ensure!(
        block.is_multiple_of(offset),
        "direct I/O on `{}` needs blocks of {offset} bytes; set `block_size = {offset}` or remove `direct`",
        path.display()
    );
    Ok(memory.max(offset) as usize)
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.write_through {
            system::write_through(self.fd());
        }
        if self.named && self.info.features & BLOCK_READ_ONLY == 0 {
            tell_if_deleted(&self.file, &self.path);
        }
    }
}

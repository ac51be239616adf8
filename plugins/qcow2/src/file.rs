//! A file of the chain: reads and writes of its tables, and transfers between it and guest memory.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::Context;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use vmm_block_file::{
    Direction, Mapped, can_punch, cut_short, flush, in_memory, open_locked, punch, read_cached,
    tell_if_deleted, transfer,
};
use vmm_plugin_api::{GuestSlice, Result};

/// Zeroes that are written at once.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
/// A file grows by multiples of this.
const STEP: u64 = 1 << 20;

/// An open, locked file or block device.
pub struct DiskFile {
    file: File,
    path: PathBuf,
    len: AtomicU64,
    fixed: bool,
    read_only: bool,
    in_memory: bool,
    /// How guest data is read if it lives in memory, up to the length it had at first.
    mapped: Option<Mapped>,
    skip_flush: bool,
    /// A flush has failed: the kernel has dropped the pages it could not write, and would call the next flush a success. Or the file
    /// has lost its end.
    lost: AtomicBool,
    /// What tests look at and make fail.
    #[cfg(test)]
    pub trace: crate::trace::Trace,
}

impl DiskFile {
    /// Opens and locks it; shared with others that read if `read_only`. Flushes do nothing if `skip_flush`.
    ///
    /// # Errors
    /// As [`open_locked`].
    pub fn open(path: &Path, read_only: bool, skip_flush: bool) -> Result<Self> {
        let (file, is_device) = open_locked(path, read_only, false)?;
        let len = rustix::fs::seek(&file, SeekFrom::End(0))
            .with_context(|| format!("cannot find the size of `{}`", path.display()))?;
        let in_memory = !is_device && in_memory(file.as_fd());
        Ok(Self {
            in_memory,
            mapped: in_memory.then(|| Mapped::new(&file, len)).flatten(),
            file,
            path: path.to_owned(),
            len: AtomicU64::new(len),
            fixed: is_device,
            read_only,
            skip_flush,
            lost: AtomicBool::new(false),
            #[cfg(test)]
            trace: crate::trace::Trace::default(),
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in it.
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Whether nothing ever waits for it.
    pub fn in_memory(&self) -> bool {
        self.in_memory
    }

    /// Whether ranges can be given back to the filesystem.
    pub fn can_punch(&self) -> bool {
        can_punch(self.file.as_fd(), self.len())
    }

    /// Device and number, by which a file is known that has several names.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::fstat(&self.file)?;
        #[allow(clippy::unnecessary_cast)] // the types differ between systems
        Ok((stat.st_dev as u64, stat.st_ino as u64))
    }

    /// Fills `to` from `at` on; an error if the file has ended.
    pub fn read(&self, mut to: &mut [u8], mut at: u64) -> io::Result<()> {
        while !to.is_empty() {
            match rustix::io::pread(&self.file, &mut *to, at) {
                Ok(0) => {
                    self.look_for_end();
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(moved) => {
                    to = &mut to[moved..];
                    at += moved as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Something has been stored there.
    fn written(&self, at: u64, end: u64) {
        if let Some(mapped) = &self.mapped {
            mapped.written(at, end - at);
        }
        self.len.fetch_max(end, Ordering::AcqRel);
    }

    /// Stores all of `from` at `at`.
    pub fn write(&self, mut from: &[u8], mut at: u64) -> io::Result<()> {
        let first = at;
        #[cfg(test)]
        self.trace.write(at, from)?;
        while !from.is_empty() {
            match rustix::io::pwrite(&self.file, from, at) {
                Ok(0) => return Err(Errno::IO.into()),
                Ok(moved) => {
                    from = &from[moved..];
                    at += moved as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.written(first, at);
        Ok(())
    }

    /// Stores `bytes` zeroes at `at`.
    pub fn write_zeroes(&self, mut at: u64, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 {
            let piece = bytes.min(ZEROES.len() as u64);
            self.write(&ZEROES[..piece as usize], at)?;
            (at, bytes) = (at + piece, bytes - piece);
        }
        Ok(())
    }

    /// Fills guest memory from `at` on; an error if the file has ended.
    pub fn read_list(&self, at: u64, list: &[GuestSlice]) -> io::Result<()> {
        if let Some(mapped) = &self.mapped
            && mapped.read(self.file.as_fd(), at, list)
        {
            return Ok(());
        }
        let code = transfer(self.file.as_fd(), Direction::Read, at, list, 0);
        if code == -libc::EIO {
            self.look_for_end();
        }
        result(code)
    }

    /// After a read that failed: what was safe is lost if the file has lost its end.
    fn look_for_end(&self) {
        if !self.lost() && cut_short(&self.file, &self.path, self.len()) {
            self.lost.store(true, Ordering::Release);
        }
    }

    /// The same, if it does not have to wait for a disk; false if it would have to.
    pub fn read_list_cached(&self, at: u64, list: &[GuestSlice]) -> bool {
        match self.in_memory {
            true => self.read_list(at, list).is_ok(),
            false => read_cached(self.file.as_fd(), at, list),
        }
    }

    /// Stores guest memory at `at`.
    pub fn write_list(&self, at: u64, list: &[GuestSlice]) -> io::Result<()> {
        #[cfg(test)]
        self.trace.write_list(at, list)?;
        result(transfer(self.file.as_fd(), Direction::Write, at, list, 0))?;
        let bytes: usize = list.iter().map(GuestSlice::len).sum();
        self.written(at, at + bytes as u64);
        Ok(())
    }

    /// Makes it reach up to `end` at least; what is new reads as zeroes.
    ///
    /// # Errors
    /// `ENOSPC` on a device; what the filesystem says.
    pub fn grow(&self, end: u64) -> io::Result<()> {
        if end <= self.len() {
            return Ok(());
        }
        if self.fixed {
            return Err(Errno::NOSPC.into());
        }
        let len = end.next_multiple_of(STEP);
        #[cfg(test)]
        self.trace.grow(len)?;
        rustix::fs::ftruncate(&self.file, len)?;
        self.len.fetch_max(len, Ordering::AcqRel);
        Ok(())
    }

    /// Gives a range back to the filesystem. That it can't be done is no loss but of space.
    pub fn punch(&self, at: u64, bytes: u64) {
        #[cfg(test)]
        self.trace.punch(at, bytes);
        let code = punch(self.file.as_fd(), at, bytes);
        if code != 0 {
            log::debug!("`{}`: no hole at {at:#x}: {code}", self.path.display());
        }
        if let Some(mapped) = &self.mapped {
            mapped.freed(at, bytes);
        }
    }

    /// Waits until what was written is on stable storage.
    ///
    /// # Errors
    /// It can't be. After one failure all fail: what was lost then can't come back, so no later flush may claim that all earlier
    /// writes are safe.
    pub fn sync(&self) -> io::Result<()> {
        if self.lost() {
            return Err(Errno::IO.into());
        }
        if self.skip_flush {
            return Ok(());
        }
        let error = loop {
            #[cfg(test)]
            if let Err(error) = self.trace.sync() {
                break error;
            }
            match flush(self.file.as_fd()) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => break io::Error::from(error),
            }
        };
        self.lost.store(true, Ordering::Release);
        log::error!(
            "`{}`: flush failed: {error}; data the guest has written may be lost, so every write and flush fails from now on",
            self.path.display()
        );
        Err(error)
    }

    /// Whether a flush has failed, or the file has lost its end.
    pub fn lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        if !self.read_only {
            tell_if_deleted(&self.file, &self.path);
        }
    }
}

fn result(code: i32) -> io::Result<()> {
    match code {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}

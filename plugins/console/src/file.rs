//! `type = "file"`: output to a file.

use std::os::fd::BorrowedFd;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, open};
use vmm_plugin_api::{CharBackend, Host, Options};

use crate::sink::Sink;

/// A file that grows.
pub(crate) struct LogFile(Sink);

impl CharBackend for LogFile {
    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let path = options.str("path")?;
        let how = if options.bool("append")? {
            OFlags::APPEND
        } else {
            OFlags::TRUNC
        };
        // Nonblocking, so that a fifo without a reader is an error instead of a wait without end.
        let flags = OFlags::WRONLY
            | OFlags::CREATE
            | OFlags::CLOEXEC
            | OFlags::NOCTTY
            | OFlags::NONBLOCK
            | how;
        let file = open(path, flags, Mode::from_raw_mode(0o644))
            .with_context(|| format!("can't open {path} for writing"))?;
        Ok(Self(Sink::new(host, path.to_owned(), file)?))
    }

    fn read(&self, _buf: &mut [u8]) -> Option<usize> {
        None
    }

    fn write(&self, buf: &[u8]) -> usize {
        self.0.write(buf)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

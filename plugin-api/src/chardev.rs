//! Byte streams, from both sides: the trait of a backend, and the handle by which a device uses one.

#![allow(unsafe_code)] // calls the backend's table

use std::os::fd::BorrowedFd;

use anyhow::bail;
use vmm_abi::chardev::CharTable;
use vmm_abi::{Obj, Opt};

use crate::export::text;
use crate::iface::interface;
use crate::{Events, Host, Options, Result};

/// A kind of console or stream: what `type =` in a `[char_dev]` table names.
pub trait CharBackend: Sized + Send + Sync + 'static {
    /// Makes it from validated options; may watch descriptors at once. Control thread.
    ///
    /// # Errors
    /// What the operator can mend: the text names it.
    fn create(options: &Options<'_>, host: &Host) -> Result<Self>;

    /// Takes input into `buf`; `None`: there is none now. Never blocks. What is not taken waits. Any thread, one at a time.
    fn read(&self, buf: &mut [u8]) -> Option<usize>;

    /// Takes output; returns how much. Never blocks: without a client, bytes are kept or dropped as the options say. Any thread,
    /// one at a time.
    fn write(&self, buf: &[u8]) -> usize;

    /// Readable while [`CharBackend::read`] would give something; `None`: there is never input.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// A watched descriptor is ready or a timer has expired. I/O thread.
    fn ready(&self, token: u64, events: Events) {
        let _ = (token, events);
    }
}

/// A character backend in the hands of a device.
pub struct CharDevice {
    obj: Obj,
    table: &'static CharTable,
    name: String,
}

// SAFETY: the ABI allows reads and writes from any thread, one at a time each way, which its one device sees to.
unsafe impl Send for CharDevice {}
// SAFETY: as above.
unsafe impl Sync for CharDevice {}

impl CharDevice {
    pub(crate) fn from_object(opt: &Opt) -> Result<Self> {
        let name = text(&opt.text).to_owned();
        let Some(table) = interface(&opt.obj, vmm_abi::chardev::CHAR) else {
            bail!("`{name}` is not a character backend");
        };
        Ok(Self {
            obj: opt.obj,
            table,
            name,
        })
    }

    /// The backend's name in the VM file.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes input; `None`: there is none now. Never blocks.
    pub fn read(&self, buf: &mut [u8]) -> Option<usize> {
        // SAFETY: a call by the table's contract on a live object.
        let got = unsafe { (self.table.read)(self.obj.this, buf.as_mut_ptr(), buf.len()) };
        usize::try_from(got).ok().map(|n| n.min(buf.len()))
    }

    /// Gives output; returns how much was taken. Never blocks.
    pub fn write(&self, buf: &[u8]) -> usize {
        // SAFETY: a call by the table's contract on a live object.
        let put = unsafe { (self.table.write)(self.obj.this, buf.as_ptr(), buf.len()) };
        usize::try_from(put).unwrap_or(0).min(buf.len())
    }

    /// Readable while [`CharDevice::read`] would give something; `None`: there is never input.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: a call by the table's contract; the descriptor lives as long as the backend, which outlives its device.
        let fd = unsafe { (self.table.fd)(self.obj.this) };
        // SAFETY: as above.
        (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
    }
}

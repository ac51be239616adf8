//! Where nothing is mapped: other systems, whose kernels do not say which files live in memory, and other processors, for which there
//! is no copy that survives a file that is cut.

use std::convert::Infallible;
use std::fs::File;
use std::os::fd::BorrowedFd;

use vmm_plugin_api::GuestSlice;

/// There is none.
#[derive(Debug)]
pub struct Mapped(Infallible);

impl Mapped {
    /// None.
    pub fn new(_file: &File, _bytes: u64) -> Option<Self> {
        None
    }

    /// Never called.
    pub fn read(&self, _file: BorrowedFd<'_>, _offset: u64, _list: &[GuestSlice]) -> bool {
        match self.0 {}
    }

    /// Never called.
    pub fn written(&self, _offset: u64, _len: u64) {
        match self.0 {}
    }

    /// Never called.
    pub fn freed(&self, _offset: u64, _len: u64) {
        match self.0 {}
    }
}

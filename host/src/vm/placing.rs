//! A kernel on its way into guest memory, on a thread of its own: zeroed pages and a copied kernel are most of what a start
//! takes, and need nothing of the machine around them.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Result, anyhow};

use crate::boot::{self, Image, Placed};
use crate::memory::GuestMemory;
use crate::thread;

/// What direct boot puts into memory.
pub(super) struct KernelFiles {
    pub kernel: Image,
    pub initrd: Option<Image>,
}

impl KernelFiles {
    /// Places them in `memory`, which is all zeros, or has been `used` by a guest.
    pub fn place(&self, memory: &GuestMemory, used: bool) -> Result<Placed> {
        boot::place(memory, &self.kernel, self.initrd.as_ref(), used)
    }

    /// Gives back what placing them has left behind.
    pub fn tidy(&self) {
        self.kernel.tidy();
        self.initrd.iter().for_each(Image::tidy);
    }
}

/// The thread that does it.
pub(super) struct Placing(JoinHandle<Result<Placed>>);

impl Placing {
    /// Begins in fresh memory.
    pub fn begin(files: Arc<KernelFiles>, memory: Arc<GuestMemory>) -> io::Result<Self> {
        let place = move || files.place(&memory, false);
        let thread = thread::spawn("kernel", place)?;
        Ok(Self(thread))
    }

    /// Waits for its end.
    pub fn placed(self) -> Result<Placed> {
        self.0
            .join()
            .map_err(|_| anyhow!("The thread that loads the kernel has panicked"))?
    }
}

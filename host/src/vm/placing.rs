//! A kernel on its way into guest memory, if it is a large one on a thread of its own: zeroed pages and a copied kernel are most of what a
//! start takes, and need nothing of the machine around them.

use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Result, anyhow};

use crate::boot::{self, Image, Placed};
use crate::memory::GuestMemory;
use crate::thread;

/// What is placed sooner than a thread begins, in bytes.
const SMALL: u64 = 1 << 20;

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

    fn bytes(&self) -> u64 {
        self.kernel.bytes() + self.initrd.as_ref().map_or(0, Image::bytes)
    }

    /// Gives back what placing them has left behind.
    pub fn tidy(&self) {
        self.kernel.tidy();
        self.initrd.iter().for_each(Image::tidy);
    }
}

/// One that has begun.
pub(super) enum Placing {
    Done(Box<Result<Placed>>),
    Thread(JoinHandle<Result<Placed>>),
}

impl Placing {
    /// Begins in fresh memory.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn begin(files: Arc<KernelFiles>, memory: Arc<GuestMemory>) -> Result<Self> {
        let small = files.bytes() <= SMALL;
        let place = move || files.place(&memory, false);
        if small {
            return Ok(Self::Done(Box::new(place())));
        }
        Ok(Self::Thread(thread::spawn("kernel", place)?))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The files can't be placed.
    pub fn placed(self) -> Result<Placed> {
        match self {
            Self::Done(placed) => *placed,
            Self::Thread(thread) => thread
                .join()
                .map_err(|_| anyhow!("The thread that loads the kernel has panicked"))?,
        }
    }
}

//! What can go wrong with a request, and what is done when an image turns out to be damaged.

use std::io;
use std::sync::atomic::Ordering;

use crate::header::{CORRUPT, INCOMPATIBLE_AT};
use crate::image::Image;

/// Why a request can't be done.
#[derive(Debug)]
pub enum Trouble {
    /// The system says so.
    Io(io::Error),
    /// The image contradicts itself: how.
    Damaged(String),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Image {
    /// What the guest is told about `trouble`: `-errno`. Damage is logged once, and the image is marked as corrupt, so that
    /// nobody writes to it before it has been checked.
    pub fn report(&self, trouble: &Trouble) -> i32 {
        let what = match trouble {
            Trouble::Io(error) => return -error.raw_os_error().unwrap_or(libc::EIO),
            Trouble::Damaged(what) => what,
        };
        if !self.damaged.swap(true, Ordering::AcqRel) {
            let path = self.file.path().display();
            let writes = match self.writer {
                Some(_) => "; nothing is written to it any more",
                None => "",
            };
            log::error!("`{path}` is damaged: {what}{writes}; check it: qemu-img check '{path}'");
            if self.writer.is_some()
                && self.geometry.zero_flag
                && let Err(error) = self.mark_corrupt()
            {
                log::error!("`{path}` can't be marked as corrupt: {error}");
            }
        }
        -libc::EIO
    }

    /// Sets the corrupt bit, which version 3 has.
    fn mark_corrupt(&self) -> io::Result<()> {
        let mut features = [0; 8];
        self.file.read(&mut features, INCOMPATIBLE_AT)?;
        let features = u64::from_be_bytes(features) | CORRUPT;
        self.file.write(&features.to_be_bytes(), INCOMPATIBLE_AT)?;
        self.file.sync()
    }

    /// Whether anything may still be written.
    ///
    /// # Errors
    /// The image is damaged, or a flush has failed.
    pub fn check_sound(&self) -> io::Result<()> {
        match self.damaged.load(Ordering::Acquire) || self.file.lost() {
            true => Err(io::Error::from_raw_os_error(libc::EIO)),
            false => Ok(()),
        }
    }
}

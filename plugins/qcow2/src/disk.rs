//! The disk that an image is, as devices see it, and each request done by the calling thread.

use std::sync::{Arc, PoisonError, RwLock};

use anyhow::ensure;
use vmm_plugin_api::abi::block::{
    BLOCK_DISCARD, BLOCK_READ_ONLY, BLOCK_VOLATILE_CACHE, BLOCK_WRITE_ZEROES,
};
use vmm_plugin_api::{BlockInfo, BlockOp, GuestSlice, Result};

use crate::clear::Clear;
use crate::damage::Trouble;
use crate::image::{Image, Writer};
use crate::open::Settings;
use crate::scratch::{Target, Work};
use crate::write::Data;

/// Longest scatter list; below every system's IOV_MAX.
pub const MAX_SEGMENTS: u32 = 256;
/// Longest discard or write-zeroes, which bounds one request's time.
const MAX_DISCARD: u32 = 128 << 20;

/// A disk in an image.
pub struct Disk {
    image: Image,
    info: BlockInfo,
}

/// A request, apart from its token.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// What to do.
    pub op: BlockOp,
    /// Where on the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The scatter list.
    pub segments: &'a [GuestSlice],
}

impl Disk {
    /// Opens the image for a guest that sees blocks of `block` bytes.
    ///
    /// # Errors
    /// What is wrong with which file or option, and what to do.
    pub fn open(settings: &Settings, block: u32) -> Result<Self> {
        ensure!(
            block.is_power_of_two() && (512..=65536).contains(&block),
            "`block_size` is {block}; use a power of two from 512 to 65536"
        );
        let image = Image::open(settings)?;
        let bytes = image.geometry.size;
        ensure!(
            bytes.is_multiple_of(block.into()),
            "`{0}` is a disk of {bytes} bytes, which is no multiple of `block_size` ({block}); make it larger: qemu-img resize '{0}' {1}",
            settings.path.display(),
            bytes.next_multiple_of(block.into())
        );
        let features = match &image.writer {
            None => BLOCK_READ_ONLY,
            // With `skip_flush` as well: a flush brings tables to the file, from where they survive the end of this process.
            Some(writer) if writer.discard => {
                BLOCK_VOLATILE_CACHE | BLOCK_WRITE_ZEROES | BLOCK_DISCARD
            }
            Some(_) => BLOCK_VOLATILE_CACHE | BLOCK_WRITE_ZEROES,
        };
        let info = BlockInfo {
            bytes,
            logical: block,
            physical: block.max(4096),
            features,
            max_segments: MAX_SEGMENTS,
            alignment: 1,
            max_discard: if features & BLOCK_READ_ONLY == 0 {
                MAX_DISCARD
            } else {
                0
            },
        };
        Ok(Self { image, info })
    }

    /// Size, units, features.
    pub fn info(&self) -> BlockInfo {
        self.info
    }

    /// What is done to the file.
    #[cfg(test)]
    pub fn trace(&self) -> &crate::trace::Trace {
        &self.image.file.trace
    }

    /// The lock for a queue's requests.
    pub fn join(&self) -> Arc<RwLock<()>> {
        self.image
            .writer
            .as_ref()
            .map_or_else(Arc::default, Writer::join)
    }

    /// The queue with that lock has ended.
    pub fn leave(&self, user: &Arc<RwLock<()>>) {
        if let Some(writer) = &self.image.writer {
            writer.leave(user);
        }
    }

    /// Whether nothing ever waits for the image's file.
    pub fn in_memory(&self) -> bool {
        self.image.file.in_memory()
    }

    /// Does a request that fits [`Disk::info`], if that takes no waiting. 0 or `-errno`, or `None`.
    pub fn perform_at_once(&self, request: Request<'_>, user: &RwLock<()>) -> Option<i32> {
        let Request {
            op,
            offset,
            len,
            segments,
        } = request;
        // Others wait for this lock only while clusters are freed.
        let _using = user.try_read().ok()?;
        match op {
            BlockOp::Read => self.image.read_at_once(offset, segments, len).then_some(0),
            BlockOp::Write { fua: false } => {
                let result = self.image.write_at_once(offset, segments, len)?;
                Some(result.map_or_else(|error| self.image.report(&error.into()), |()| 0))
            }
            _ => None,
        }
    }

    /// Does a request that fits [`Disk::info`]. 0 or `-errno`.
    pub fn perform(&self, request: Request<'_>, user: &RwLock<()>, work: &mut Work) -> i32 {
        match self.attempt(request, user, work) {
            Ok(()) => 0,
            Err(trouble) => self.image.report(&trouble),
        }
    }

    fn attempt(
        &self,
        request: Request<'_>,
        user: &RwLock<()>,
        work: &mut Work,
    ) -> Result<(), Trouble> {
        let Request {
            op,
            offset,
            len,
            segments,
        } = request;
        let using = || user.read().unwrap_or_else(PoisonError::into_inner);
        let image = &self.image;
        let writer = match (op, &image.writer) {
            (BlockOp::Read, _) => {
                let _using = using();
                return image.read(offset, Target::Guest(segments), work);
            }
            (_, Some(writer)) => writer,
            (BlockOp::Flush, None) => return Ok(()),
            (_, None) => return Err(std::io::Error::from_raw_os_error(libc::EROFS).into()),
        };
        if op == BlockOp::Flush {
            return image.commit(writer);
        }
        image.commit_if_much(writer)?;
        let guard = using();
        match op {
            BlockOp::Write { .. } => {
                image.write(writer, offset, len, Data::Guest(segments), work)?
            }
            BlockOp::Discard => image.discard(writer, offset, len, work)?,
            BlockOp::WriteZeroes { unmap } => {
                let how = if unmap && writer.discard {
                    Clear::Free
                } else {
                    Clear::Keep
                };
                image.write_zeroes(writer, offset, len, how, work)?;
            }
            BlockOp::Read | BlockOp::Flush => {}
        }
        drop(guard);
        match op {
            BlockOp::Write { fua: true } => image.commit(writer),
            _ => Ok(()),
        }
    }
}

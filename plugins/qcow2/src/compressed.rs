//! Compressed clusters, which are only read: a write puts a cluster of its own in their place.

use std::io::{self, Read};

use flate2::{Decompress, FlushDecompress};
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use crate::file::DiskFile;
use crate::header::Compression;

/// The most memory that compressed data may ask for to look back into; the largest cluster has 2 MiB.
const MAX_WINDOW: u64 = 8 << 20;

/// Decompresses for one thread, and keeps the last cluster: guests read in smaller pieces than that.
#[derive(Default)]
pub struct Decompressor {
    packed: Vec<u8>,
    plain: Vec<u8>,
    /// Which cluster `plain` has: address of the file's description, offset. No compressed data is ever written, so what an
    /// offset has stays the same as long as somebody refers to it.
    holds: Option<(usize, u64)>,
    inflate: Option<Box<Decompress>>,
    zstd: Option<Box<FrameDecoder>>,
}

impl Decompressor {
    /// The `cluster` bytes that are compressed in at most `bytes` bytes of `file` at `at`.
    ///
    /// # Errors
    /// The file can't be read; `InvalidData`: it is no compressed data.
    pub fn cluster(
        &mut self,
        file: &DiskFile,
        compression: Compression,
        (at, bytes): (u64, u64),
        cluster: u64,
    ) -> io::Result<&[u8]> {
        let name = (std::ptr::from_ref(file) as usize, at);
        if self.holds == Some(name) && self.plain.len() as u64 == cluster {
            return Ok(&self.plain);
        }
        self.holds = None;
        // The length is a whole number of sectors, which the end of the file need not be.
        let there = bytes.min(file.len().saturating_sub(at));
        self.packed.resize(there as usize, 0);
        file.read(&mut self.packed, at)?;
        self.plain.resize(cluster as usize, 0);
        match compression {
            Compression::Deflate => self.inflate()?,
            Compression::Zstd => self.unpack()?,
        }
        self.holds = Some(name);
        Ok(&self.plain)
    }

    fn inflate(&mut self) -> io::Result<()> {
        let inflate = self
            .inflate
            .get_or_insert_with(|| Box::new(Decompress::new(false)));
        inflate.reset(false);
        let finish = FlushDecompress::Finish;
        // Behind the data there may be anything, up to the end of the sector.
        let outcome = inflate.decompress(&self.packed, &mut self.plain, finish);
        if outcome.is_err() || inflate.total_out() != self.plain.len() as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(())
    }

    fn unpack(&mut self) -> io::Result<()> {
        let zstd = self.zstd.get_or_insert_with(|| {
            let mut decoder = FrameDecoder::new();
            decoder.set_max_window_size(MAX_WINDOW);
            Box::new(decoder)
        });
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidData);
        let decoder = StreamingDecoder::new_with_decoder(self.packed.as_slice(), &mut **zstd);
        decoder
            .map_err(|_| invalid(()))?
            .read_exact(&mut self.plain)
            .map_err(|_| invalid(()))
    }
}

//! What a thread needs beside a request: buffers that it keeps, and lists of parts of guest memory. After the first requests of a
//! kind they have their size, and nothing is allocated any more.

use std::io;

use vmm_plugin_api::GuestSlice;

use crate::compressed::Decompressor;
use crate::file::DiskFile;

/// Bytes that are copied at once where part of a cluster is written.
pub const COPY: usize = 64 << 10;

/// Where data that is read goes.
pub enum Target<'a> {
    /// Into guest memory.
    Guest(&'a [GuestSlice]),
    /// Into a buffer of ours.
    Bytes(&'a mut [u8]),
}

impl Target<'_> {
    /// Bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Guest(list) => total(list),
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// Sets all to zero.
    pub fn clear(&mut self) {
        match self {
            Self::Guest(list) => list.iter().for_each(|slice| slice.fill(0)),
            Self::Bytes(bytes) => bytes.fill(0),
        }
    }

    /// Copies from `bytes`, which are as many.
    pub fn copy_from(&mut self, mut bytes: &[u8]) {
        match self {
            Self::Guest(list) => {
                for slice in *list {
                    let count = slice.write(0, bytes);
                    bytes = &bytes[count..];
                }
            }
            Self::Bytes(to) => to.copy_from_slice(bytes),
        }
    }

    /// Reads all from `at` on. What is beyond the end of the file is zero.
    pub fn read(&mut self, file: &DiskFile, at: u64, work: &mut Work) -> io::Result<()> {
        let there = file.len().saturating_sub(at);
        let len = self.len();
        if there < len {
            work.part(self, there, len - there, |mut rest, _| rest.clear());
            return match there {
                0 => Ok(()),
                _ => work.part(self, 0, there, |mut first, _| first.read_all(file, at)),
            };
        }
        self.read_all(file, at)
    }

    fn read_all(&mut self, file: &DiskFile, at: u64) -> io::Result<()> {
        match self {
            Self::Guest(list) => file.read_list(at, list),
            Self::Bytes(bytes) => file.read(bytes, at),
        }
    }
}

/// A thread's buffers.
#[derive(Default)]
pub struct Work {
    /// Lists not in use.
    lists: Vec<Vec<GuestSlice>>,
    /// Parts of clusters on their way from the backing file.
    pub copy: Vec<u8>,
    /// Entries as they were before clusters were allocated for them.
    pub old: Vec<u64>,
    /// Decompresses, and has the last cluster that it did.
    pub decompressor: Decompressor,
}

impl Work {
    /// Calls `f` with the `len` bytes of `target` after its first `skip`.
    pub fn part<T>(
        &mut self,
        target: &mut Target<'_>,
        skip: u64,
        len: u64,
        f: impl FnOnce(Target<'_>, &mut Self) -> T,
    ) -> T {
        match target {
            Target::Guest(list) => {
                self.part_of(list, skip, len, |part, work| f(Target::Guest(part), work))
            }
            Target::Bytes(bytes) => {
                let (from, to) = (skip as usize, (skip + len) as usize);
                f(Target::Bytes(&mut bytes[from..to]), self)
            }
        }
    }

    /// Calls `f` with the `len` bytes of `list` after its first `skip`.
    pub fn part_of<T>(
        &mut self,
        list: &[GuestSlice],
        skip: u64,
        len: u64,
        f: impl FnOnce(&[GuestSlice], &mut Self) -> T,
    ) -> T {
        if skip == 0 && len == total(list) {
            return f(list, self);
        }
        let mut part = self.lists.pop().unwrap_or_default();
        cut(list, skip, len, &mut part);
        let result = f(&part, self);
        part.clear();
        self.lists.push(part);
        result
    }
}

fn total(list: &[GuestSlice]) -> u64 {
    list.iter().map(|slice| slice.len() as u64).sum()
}

/// Puts the `len` bytes of `list` after its first `skip` into `part`.
fn cut(list: &[GuestSlice], skip: u64, len: u64, part: &mut Vec<GuestSlice>) {
    let (mut skip, mut left) = (skip as usize, len as usize);
    for slice in list {
        if left == 0 {
            return;
        }
        if skip >= slice.len() {
            skip -= slice.len();
            continue;
        }
        let piece = slice.part(skip, left);
        (skip, left) = (0, left - piece.len());
        part.push(piece);
    }
}

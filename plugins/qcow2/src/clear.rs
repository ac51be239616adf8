//! Discards, and writes of zeroes that change tables alone.

use crate::damage::Trouble;
use crate::image::{Image, Writer};
use crate::layout::{COPIED, Mapping, OFFSET, ZERO};
use crate::scratch::Work;
use crate::write::Data;

/// What is to become of clusters.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Clear {
    /// Nobody needs what is in them.
    Discard,
    /// They read as zeroes; those that are allocated stay so.
    Keep,
    /// They read as zeroes and take no space.
    Free,
}

impl Image {
    /// Makes `len` bytes at `at`, which are on the disk, read as zeroes. What is no whole cluster is written.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn write_zeroes(
        &self,
        writer: &Writer,
        at: u64,
        len: u64,
        how: Clear,
        work: &mut Work,
    ) -> Result<(), Trouble> {
        let (from, to) = self.whole_clusters(at, len);
        if from >= to {
            return self.write(writer, at, len, Data::Zeroes, work);
        }
        let end = at + len;
        self.write(writer, at, from - at, Data::Zeroes, work)?;
        self.clear(writer, from, to, how, work)?;
        self.write(writer, to.min(end), end - to.min(end), Data::Zeroes, work)
    }

    /// Forgets the whole clusters of `len` bytes at `at`, which are on the disk.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn discard(
        &self,
        writer: &Writer,
        at: u64,
        len: u64,
        work: &mut Work,
    ) -> Result<(), Trouble> {
        let (from, to) = self.whole_clusters(at, len);
        self.clear(writer, from, to, Clear::Discard, work)
    }

    /// Start of the first and end of the last cluster that are covered as far as the disk goes.
    fn whole_clusters(&self, at: u64, len: u64) -> (u64, u64) {
        let cluster = self.geometry.cluster();
        let end = at + len;
        let to = if end == self.geometry.size {
            end
        } else {
            end - end % cluster
        };
        (at.next_multiple_of(cluster), to)
    }

    fn clear(
        &self,
        writer: &Writer,
        from: u64,
        to: u64,
        how: Clear,
        work: &mut Work,
    ) -> Result<(), Trouble> {
        let g = self.geometry;
        let mut at = from;
        while at < to {
            self.check_sound()?;
            let reach = g.slice_reach();
            let end = to.min((at / reach + 1) * reach);
            let none = self.l1_entry(g.l1_index(at)) & OFFSET == 0;
            if none && (self.backing.is_none() || how == Clear::Discard) {
                at = to.min((at / g.table_reach() + 1) * g.table_reach());
                continue;
            }
            let mut meta = writer.meta();
            let table = self.own_table(writer, &mut meta, g.l1_index(at))?;
            let (piece, first) = g.l2_index(at);
            let slice = self.slice(table, piece)?;
            let count = (end - at).div_ceil(g.cluster()) as usize;
            let mut stuck = None;
            for index in first..first + count {
                let mapping = self.decode(slice.get(index))?;
                let Some(entry) = self.cleared(mapping, slice.get(index), how) else {
                    stuck = Some(index);
                    break;
                };
                self.replace(&mut meta, &slice, index, entry)?;
            }
            drop(meta);
            at = match stuck {
                None => end,
                // Version 2 has no entry that says so: zeroes have to be written.
                Some(index) => {
                    let start = at + (index - first) as u64 * g.cluster();
                    let len = g.cluster().min(to - start);
                    self.write(writer, start, len, Data::Zeroes, work)?;
                    start + len
                }
            };
        }
        Ok(())
    }

    /// The entry for a cluster after it has been cleared; `None` if there is no such entry.
    fn cleared(&self, mapping: Mapping, entry: u64, how: Clear) -> Option<u64> {
        let behind = self.backing.is_some();
        match (mapping, how) {
            // What shows through is as good as anything; without a backing file it is zero already.
            (Mapping::Unallocated, Clear::Discard) => Some(entry),
            (Mapping::Unallocated, _) if !behind => Some(entry),
            (Mapping::Zero { .. }, Clear::Keep) => Some(entry),
            (Mapping::Data { host, owned: true }, Clear::Keep) => {
                self.geometry.zero_flag.then_some(host | COPIED | ZERO)
            }
            _ if !behind => Some(0),
            _ if self.geometry.zero_flag => Some(ZERO),
            // What was there before must not come back.
            (_, Clear::Discard) => Some(entry),
            _ => None,
        }
    }
}

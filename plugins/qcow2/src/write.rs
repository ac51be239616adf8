//! Writes: in place where a cluster is the image's own, into a new cluster elsewhere.
//!
//! A new cluster is filled first, with what the guest writes and what was there around it, without a lock. Only then the table
//! refers to it, if it still says what it said before; otherwise somebody else has been here, and it is done again.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_plugin_api::GuestSlice;

use crate::damage::Trouble;
use crate::image::{Image, Meta, Writer};
use crate::layout::{COPIED, Mapping, OFFSET};
use crate::refcounts::{Claim, insert};
use crate::scratch::{COPY, Target, Work};
use crate::slices::Slice;

/// What is written.
#[derive(Clone, Copy)]
pub enum Data<'a> {
    /// Guest memory.
    Guest(&'a [GuestSlice]),
    /// Zeroes.
    Zeroes,
}

/// Entries of an L2 table, in a row, for clusters that are to be written to.
struct Place {
    table: u64,
    piece: u64,
    index: usize,
}

impl Image {
    /// Writes `len` bytes at `at`, which are on the disk.
    ///
    /// # Errors
    /// No space, the file can't be read or written, damage. Some of it may have been written.
    pub fn write(
        &self,
        writer: &Writer,
        at: u64,
        len: u64,
        data: Data<'_>,
        work: &mut Work,
    ) -> Result<(), Trouble> {
        let mut done = 0;
        while done < len {
            self.check_sound()?;
            let from = at + done;
            let Some(extent) = self.extent(from, len - done, true)? else {
                return Err(io::Error::from_raw_os_error(libc::EIO).into());
            };
            done += match (extent.mapping, data) {
                (Mapping::Data { host, owned: true }, _) => {
                    let host = host + self.geometry.within(from);
                    self.store(host, data, done, extent.len, work)?;
                    extent.len
                }
                (mapping, Data::Zeroes) if self.reads_zero(mapping, from) => extent.len,
                _ => self.write_new(writer, from, len - done, (data, done), work)?,
            };
        }
        Ok(())
    }

    /// Writes at once where no table has to change and none has to be brought in; `None` if that is not so.
    pub fn write_at_once(&self, at: u64, list: &[GuestSlice], len: u64) -> Option<io::Result<()>> {
        self.check_sound().ok()?;
        let extent = self.extent(at, len, false).ok()??;
        match extent.mapping {
            Mapping::Data { host, owned: true } if extent.len == len => {
                Some(self.file.write_list(host + self.geometry.within(at), list))
            }
            _ => None,
        }
    }

    fn store(
        &self,
        host: u64,
        data: Data<'_>,
        skip: u64,
        len: u64,
        work: &mut Work,
    ) -> io::Result<()> {
        match data {
            Data::Guest(list) => {
                work.part_of(list, skip, len, |part, _| self.file.write_list(host, part))
            }
            Data::Zeroes => self.file.write_zeroes(host, len),
        }
    }

    /// Whether a cluster with this mapping reads as zeroes from `at` on.
    fn reads_zero(&self, mapping: Mapping, at: u64) -> bool {
        match mapping {
            Mapping::Zero { .. } => true,
            Mapping::Unallocated => self
                .backing
                .as_ref()
                .is_none_or(|backing| at >= backing.size()),
            _ => false,
        }
    }

    /// Writes up to `most` bytes into new clusters; `data` comes with how much of it is done. Returns how much was written: 0 if
    /// somebody else has changed the table meanwhile.
    fn write_new(
        &self,
        writer: &Writer,
        at: u64,
        most: u64,
        (data, done): (Data<'_>, u64),
        work: &mut Work,
    ) -> Result<u64, Trouble> {
        let g = self.geometry;
        let head = g.within(at);
        let Some((place, claim)) = self.claim(writer, at, most, work)? else {
            return Ok(0);
        };
        let len = most.min(claim.count * g.cluster() - head);
        let filled = self
            .store_around(at, len, claim, work)
            .and_then(|()| Ok(self.store(claim.host + head, data, done, len, work)?));
        if let Err(trouble) = filled {
            // If that fails as well the clusters are leaked; the guest hears of the first trouble.
            writer.meta().refcounts.give_back(&self.file, claim).ok();
            return Err(trouble);
        }
        if self.link(writer, &place, claim, work)? {
            return Ok(len);
        }
        writer.meta().refcounts.give_back(&self.file, claim)?;
        Ok(0)
    }

    /// Takes clusters for as much of the `most` bytes at `at` as has none of its own, and notes the entries in `work.old`.
    fn claim(
        &self,
        writer: &Writer,
        at: u64,
        most: u64,
        work: &mut Work,
    ) -> Result<Option<(Place, Claim)>, Trouble> {
        let g = self.geometry;
        let (piece, index) = g.l2_index(at);
        let mut meta = writer.meta();
        let table = self.own_table(writer, &mut meta, g.l1_index(at))?;
        let slice = self.slice(table, piece)?;
        let wanted = (g.within(at) + most).div_ceil(g.cluster());
        work.old.clear();
        for index in (index..slice.len()).take(wanted as usize) {
            let entry = slice.get(index);
            if matches!(self.decode(entry)?, Mapping::Data { owned: true, .. }) {
                break;
            }
            work.old.push(entry);
        }
        if work.old.is_empty() {
            return Ok(None);
        }
        let wanted = work.old.len() as u64;
        let claim = meta
            .refcounts
            .allocate(&self.file, &writer.tables, wanted)?;
        work.old.truncate(claim.count as usize);
        Ok(Some((
            Place {
                table,
                piece,
                index,
            },
            claim,
        )))
    }

    /// Copies what is before and behind the `len` bytes at `at` into the new clusters.
    fn store_around(
        &self,
        at: u64,
        len: u64,
        claim: Claim,
        work: &mut Work,
    ) -> Result<(), Trouble> {
        let g = self.geometry;
        let head = g.within(at);
        let first = work.old.first().copied().unwrap_or(0);
        let last = work.old.last().copied().unwrap_or(0);
        self.copy(first, (at - head, head), claim.host, claim.fresh, work)?;
        let tail = claim.count * g.cluster() - head - len;
        self.copy(
            last,
            (at + len, tail),
            claim.host + head + len,
            claim.fresh,
            work,
        )
    }

    /// Copies `len` bytes of the disk from `at` on, which the entry `old` maps, to `host`. What is beyond the disk is zero.
    fn copy(
        &self,
        old: u64,
        (mut at, len): (u64, u64),
        mut host: u64,
        fresh: bool,
        work: &mut Work,
    ) -> Result<(), Trouble> {
        if len == 0 {
            return Ok(());
        }
        let mapping = self.decode(old)?;
        let end = (at + len).min(self.geometry.size.max(at));
        let beyond = at + len - end;
        if self.reads_zero(mapping, at) {
            if !fresh {
                self.file.write_zeroes(host, len)?;
            }
            return Ok(());
        }
        let mut buffer = std::mem::take(&mut work.copy);
        buffer.resize(COPY, 0);
        let mut copy = || {
            while at < end {
                let piece = (end - at).min(COPY as u64);
                let bytes = &mut buffer[..piece as usize];
                self.read_mapped(mapping, at, Target::Bytes(bytes), work)?;
                self.file.write(bytes, host)?;
                (at, host) = (at + piece, host + piece);
            }
            if !fresh {
                self.file.write_zeroes(host, beyond)?;
            }
            Ok(())
        };
        let copied = copy();
        work.copy = buffer;
        copied
    }

    /// Makes the table refer to the new clusters, if its entries are those in `work.old` still.
    fn link(
        &self,
        writer: &Writer,
        place: &Place,
        claim: Claim,
        work: &Work,
    ) -> Result<bool, Trouble> {
        let mut meta = writer.meta();
        let slice = self.slice(place.table, place.piece)?;
        let indices = || place.index..place.index + work.old.len();
        if indices()
            .zip(&work.old)
            .any(|(index, old)| slice.get(index) != *old)
        {
            return Ok(false);
        }
        let hosts = (claim.host..).step_by(self.geometry.cluster() as usize);
        for (index, host) in indices().zip(hosts) {
            self.replace(&mut meta, &slice, index, host | COPIED)?;
        }
        Ok(true)
    }

    /// Changes an entry; the clusters that it has referred to, unless it still does, are free once the file has the change.
    pub fn replace(
        &self,
        meta: &mut Meta,
        slice: &Arc<Slice>,
        index: usize,
        entry: u64,
    ) -> Result<(), Trouble> {
        let old = slice.get(index);
        if old == entry {
            return Ok(());
        }
        let (at, count) = self.decode(old)?.clusters(self.geometry);
        slice.set(index, entry);
        meta.changed(slice);
        if count > 0 && at != entry & OFFSET {
            meta.freed.push((at >> self.geometry.cluster_bits, count));
        }
        Ok(())
    }

    /// The L2 table of the L1 table's entry `index`, made or copied if the image has none of its own there.
    pub fn own_table(
        &self,
        writer: &Writer,
        meta: &mut Meta,
        index: usize,
    ) -> Result<u64, Trouble> {
        let entry = self.l1_entry(index);
        let old = entry & OFFSET;
        if old != 0 && entry & COPIED != 0 {
            return Ok(old);
        }
        let (g, file) = (self.geometry, &self.file);
        let claim = meta.refcounts.allocate(file, &writer.tables, 1)?;
        let filled = match old {
            0 if claim.fresh => Ok(()),
            0 => file.write_zeroes(claim.host, g.cluster()),
            // A snapshot's. Nothing in memory is newer: who changes a table makes it the image's own first.
            _ => (0..g.cluster())
                .step_by(g.slice_bytes() as usize)
                .try_for_each(|piece| {
                    let mut bytes = vec![0; g.slice_bytes() as usize];
                    file.read(&mut bytes, old + piece)?;
                    file.write(&bytes, claim.host + piece)
                }),
        };
        if let Err(error) = filled {
            meta.refcounts.give_back(file, claim)?;
            return Err(error.into());
        }
        let number = claim.host >> g.cluster_bits;
        insert(&writer.tables, number..number + 1);
        if let Some(slot) = self.l1.get(index) {
            slot.store(claim.host | COPIED, Ordering::Release);
        }
        meta.dirty_l1.push(index);
        if old != 0 {
            meta.freed.push((old >> g.cluster_bits, 1));
        }
        Ok(claim.host)
    }
}

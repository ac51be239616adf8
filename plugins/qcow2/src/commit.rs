//! How metadata reaches stable storage, so that an image is sound whenever power fails or the process is killed.
//!
//! 1. Refcounts are written, and what the tables say is copied: no reference is written whose cluster is not counted.
//! 2. A sync: counts, and the data that the tables refer to, are safe. So are new L2 tables, as zeroes.
//! 3. The copies are written: pieces of L2 tables and entries of the L1 table, in any order.
//! 4. A sync: the references are safe.
//! 5. Clusters that nothing refers to any more are counted down, once no request can be using them. From now on they can be
//!    used again.
//!
//! Whatever is left of this, nothing refers to a cluster that is not counted, and no cluster has two uses. Cluster that are
//! counted and not used are possible; `qemu-img check` calls them leaked.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use crate::damage::Trouble;
use crate::image::{Image, Writer};
use crate::slices::Slice;

/// Pieces of tables that may be newer in memory, and ranges of freed clusters that may wait, before they are written out without
/// a flush.
const MOST: usize = 512;

/// What is being written out. Keeps its memory.
#[derive(Default)]
pub struct Commit {
    slices: Vec<Arc<Slice>>,
    /// The slices' bytes, one after the other.
    bytes: Vec<u8>,
    /// Entries of the L1 table: index, value.
    l1: Vec<(usize, u64)>,
    freed: Vec<(u64, u64)>,
}

impl Image {
    /// Makes everything that has completed survive a power failure. The caller must not hold its queue's lock.
    ///
    /// # Errors
    /// It can't be: nothing is known about what has been written since the last time. Damage.
    pub fn commit(&self, writer: &Writer) -> Result<(), Trouble> {
        let mut commit = writer.commit.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_sound()?;
        self.collect(writer, &mut commit)?;
        if !commit.slices.is_empty() || !commit.l1.is_empty() {
            let stored = self.file.sync().and_then(|()| self.store_tables(&commit));
            if let Err(error) = stored {
                take_back(writer, &mut commit);
                return Err(error.into());
            }
        }
        // A failure leaves the file unable to take anything more, so nothing has to be taken back.
        self.file.sync()?;
        commit.slices.clear();
        commit.l1.clear();
        if commit.freed.is_empty() {
            return Ok(());
        }
        writer.wait_for_users();
        self.release(writer, &mut commit)
    }

    /// Writes metadata out when much has come together. The caller must not hold its queue's lock.
    ///
    /// # Errors
    /// As [`Image::commit`].
    pub fn commit_if_much(&self, writer: &Writer) -> Result<(), Trouble> {
        let meta = writer.meta();
        if meta.dirty.len() < MOST && meta.freed.len() < MOST {
            return Ok(());
        }
        drop(meta);
        self.commit(writer)
    }

    /// The first step.
    fn collect(&self, writer: &Writer, commit: &mut Commit) -> io::Result<()> {
        let mut meta = writer.meta();
        meta.refcounts.write(&self.file)?;
        commit.bytes.clear();
        commit.slices.append(&mut meta.dirty);
        for slice in &commit.slices {
            slice.dirty.store(false, Ordering::Release);
            slice.store(&mut commit.bytes);
        }
        for index in meta.dirty_l1.drain(..) {
            commit.l1.push((index, self.l1_entry(index)));
        }
        commit.freed.append(&mut meta.freed);
        Ok(())
    }

    /// The third step.
    fn store_tables(&self, commit: &Commit) -> io::Result<()> {
        let size = self.geometry.slice_bytes() as usize;
        for (slice, bytes) in commit.slices.iter().zip(commit.bytes.chunks_exact(size)) {
            self.file.write(bytes, slice.at)?;
        }
        for (index, entry) in &commit.l1 {
            let at = self.l1_at + *index as u64 * 8;
            self.file.write(&entry.to_be_bytes(), at)?;
        }
        Ok(())
    }

    /// The last step.
    fn release(&self, writer: &Writer, commit: &mut Commit) -> Result<(), Trouble> {
        let cluster = self.geometry.cluster();
        let mut meta = writer.meta();
        // Neighbours are given back to the filesystem together.
        commit.freed.sort_unstable();
        let (mut from, mut to) = (0, 0);
        let freed = std::mem::take(&mut commit.freed);
        for number in freed
            .iter()
            .flat_map(|(first, count)| *first..first + count)
        {
            if !writer.punch {
                meta.refcounts.release(&self.file, &writer.tables, number)?;
                continue;
            }
            // Before others can have it.
            if meta.refcounts.references(&self.file, number)? == 1 {
                if number != to {
                    self.punch(from, to, cluster);
                    from = number;
                }
                to = number + 1;
            }
            meta.refcounts.release(&self.file, &writer.tables, number)?;
        }
        self.punch(from, to, cluster);
        commit.freed = freed;
        commit.freed.clear();
        Ok(())
    }

    fn punch(&self, from: u64, to: u64, cluster: u64) {
        if from < to {
            self.file.punch(from * cluster, (to - from) * cluster);
        }
    }
}

/// What could not be written is newer in memory still.
fn take_back(writer: &Writer, commit: &mut Commit) {
    let mut meta = writer.meta();
    for slice in commit.slices.drain(..) {
        meta.changed(&slice);
    }
    meta.dirty_l1
        .extend(commit.l1.drain(..).map(|(index, _)| index));
    // The file may refer to them or not: they are released after the next success.
    meta.freed.append(&mut commit.freed);
}

/// Writes what is left when the VM ends. Counts that were lowered last are in the file as well, so that nothing is leaked.
impl Drop for Image {
    fn drop(&mut self) {
        let Some(writer) = &self.writer else { return };
        if self.check_sound().is_err() {
            return;
        }
        let result = self.commit(writer).and_then(|()| {
            writer.meta().refcounts.write(&self.file)?;
            Ok(self.file.sync()?)
        });
        if let Err(trouble) = result {
            let code = self.report(&trouble);
            log::error!(
                "`{}` could not be closed: {}; what the guest has not flushed may be lost",
                self.file.path().display(),
                io::Error::from_raw_os_error(-code)
            );
        }
    }
}

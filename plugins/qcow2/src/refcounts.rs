//! How often each cluster of the file is referred to (qcow2 specification, "Host cluster management"), and which are free.
//!
//! In memory a count is raised before something refers to the cluster, and lowered when nothing on stable storage does any more. So
//! counts may be written at any time: the worst that a crash leaves is a cluster that is counted and not used.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{PoisonError, RwLock};

use crate::damage::Trouble;
use crate::file::DiskFile;
use crate::header::{Header, MAX_REFCOUNT_TABLE, REFCOUNT_TABLE_AT};
use crate::layout::Geometry;

/// Most pieces of refcount blocks in memory; with clusters of 64 KiB they count 8 GiB.
const PIECES: usize = 64;
/// Offsets in entries of L1 and L2 end here.
const MAX_OFFSET: u64 = 1 << 56;

/// Clusters, by number, that hold tables: no data may be written to them, whatever an entry says.
pub type Tables = RwLock<HashSet<u64>>;

/// Clusters that nobody used before.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// Offset in the file.
    pub host: u64,
    /// How many, in a row.
    pub count: u64,
    /// They read as zeroes.
    pub fresh: bool,
}

/// A piece of a refcount block.
struct Piece {
    at: u64,
    bytes: Box<[u8]>,
    dirty: bool,
}

/// All refcounts of an image.
pub struct Refcounts {
    geometry: Geometry,
    /// Logarithm of the bits in a count.
    order: u32,
    /// Offsets of the blocks; 0: all clusters that the block would count are free.
    table: Vec<u64>,
    table_at: u64,
    table_clusters: u64,
    /// Blocks that the table in the file does not have yet.
    new_blocks: Vec<usize>,
    pieces: HashMap<u64, Piece>,
    /// No cluster before this one is free.
    first_free: u64,
    /// Neither this cluster nor one after it has ever had anything in it.
    first_fresh: u64,
}

impl Refcounts {
    /// The refcounts of an image whose refcount table has been read into `table`.
    pub fn new(header: &Header, table: Vec<u64>, file_bytes: u64) -> Self {
        Self {
            geometry: header.geometry,
            order: header.refcount_order,
            table,
            table_at: header.refcount_table_at,
            table_clusters: header.refcount_table_clusters,
            new_blocks: Vec::new(),
            pieces: HashMap::new(),
            first_free: 0,
            first_fresh: file_bytes.div_ceil(header.geometry.cluster()),
        }
    }

    /// Clusters that a block counts.
    fn per_block(&self) -> u64 {
        (self.geometry.cluster() * 8) >> self.order
    }

    /// Clusters that a piece of a block counts.
    fn per_piece(&self) -> u64 {
        (self.geometry.slice_bytes() * 8) >> self.order
    }

    /// The piece that counts `cluster`, and which of its counts; `None` without a block for it.
    fn piece(&mut self, file: &DiskFile, cluster: u64) -> io::Result<Option<(&mut Piece, usize)>> {
        let block = usize::try_from(cluster / self.per_block()).unwrap_or(usize::MAX);
        let Some(&block_at) = self.table.get(block).filter(|at| **at != 0) else {
            return Ok(None);
        };
        let number = cluster / self.per_piece();
        if !self.pieces.contains_key(&number) {
            if self.pieces.len() >= PIECES {
                self.give_up_piece(file)?;
            }
            let bytes = self.geometry.slice_bytes();
            let piece_at = number % (self.geometry.cluster() / bytes) * bytes;
            let mut piece = Piece {
                at: block_at + piece_at,
                bytes: vec![0; bytes as usize].into(),
                dirty: false,
            };
            file.read(&mut piece.bytes, piece.at)?;
            self.pieces.insert(number, piece);
        }
        let index = (cluster % self.per_piece()) as usize;
        Ok(self.pieces.get_mut(&number).map(|piece| (piece, index)))
    }

    fn give_up_piece(&mut self, file: &DiskFile) -> io::Result<()> {
        let clean = self.pieces.iter().find(|(_, piece)| !piece.dirty);
        if let Some(number) = clean.or(self.pieces.iter().next()).map(|(n, _)| *n)
            && let Some(piece) = self.pieces.get(&number)
        {
            if piece.dirty {
                file.write(&piece.bytes, piece.at)?;
            }
            self.pieces.remove(&number);
        }
        Ok(())
    }

    fn get(&mut self, file: &DiskFile, cluster: u64) -> io::Result<u64> {
        let order = self.order;
        let piece = self.piece(file, cluster)?;
        Ok(piece.map_or(0, |(piece, index)| count(&piece.bytes, order, index)))
    }

    fn set(&mut self, file: &DiskFile, cluster: u64, value: u64) -> Result<(), Trouble> {
        let order = self.order;
        let Some((piece, index)) = self.piece(file, cluster)? else {
            return Err(Trouble::Damaged(format!(
                "no refcount block counts cluster {cluster}"
            )));
        };
        set_count(&mut piece.bytes, order, index, value);
        piece.dirty = true;
        Ok(())
    }

    /// Takes up to `most` free clusters in a row.
    ///
    /// # Errors
    /// No space; damage: a cluster with a table in it is counted as free.
    pub fn allocate(
        &mut self,
        file: &DiskFile,
        tables: &Tables,
        most: u64,
    ) -> Result<Claim, Trouble> {
        let (first, free) = loop {
            if self.first_free >= MAX_OFFSET >> self.geometry.cluster_bits {
                return Err(io::Error::from_raw_os_error(libc::EFBIG).into());
            }
            let (from, order, per_piece) = (self.first_free, self.order, self.per_piece());
            let Some((piece, start)) = self.piece(file, from)? else {
                self.add_block(file, tables, from / self.per_block())?;
                continue;
            };
            let used = |index: &usize| count(&piece.bytes, order, *index) != 0;
            let end = per_piece as usize;
            let skipped = (start..end).take_while(used).count();
            if start + skipped < end {
                let free = (start + skipped..end).take_while(|index| !used(index));
                let free = free.take(most.max(1) as usize).count() as u64;
                break (from + skipped as u64, free);
            }
            self.first_free = (from / per_piece + 1) * per_piece;
        };
        self.first_free = first;
        // Either all of them are fresh or none is.
        let fresh = first >= self.first_fresh;
        let count = if fresh {
            free
        } else {
            free.min(self.first_fresh - first)
        };
        let claim = Claim {
            host: first << self.geometry.cluster_bits,
            count,
            fresh,
        };
        self.check_free(tables, claim)?;
        file.grow(claim.host + count * self.geometry.cluster())?;
        for cluster in first..first + count {
            self.set(file, cluster, 1)?;
        }
        self.first_free = first + count;
        self.first_fresh = self.first_fresh.max(first + count);
        Ok(claim)
    }

    fn check_free(&self, tables: &Tables, claim: Claim) -> Result<(), Trouble> {
        let first = claim.host >> self.geometry.cluster_bits;
        let tables = tables.read().unwrap_or_else(PoisonError::into_inner);
        match (first..first + claim.count).find(|cluster| tables.contains(cluster)) {
            None => Ok(()),
            Some(cluster) => Err(Trouble::Damaged(format!(
                "the cluster at {:#x} has a table in it, but its refcount is 0",
                cluster << self.geometry.cluster_bits
            ))),
        }
    }

    /// Gives back clusters that nothing has ever referred to.
    pub fn give_back(&mut self, file: &DiskFile, claim: Claim) -> Result<(), Trouble> {
        let first = claim.host >> self.geometry.cluster_bits;
        for cluster in first..first + claim.count {
            self.set(file, cluster, 0)?;
        }
        self.first_free = self.first_free.min(first);
        Ok(())
    }

    /// One reference less to `cluster`, a number. Tells whether it is free now.
    ///
    /// # Errors
    /// Damage: it was free already.
    pub fn release(
        &mut self,
        file: &DiskFile,
        tables: &Tables,
        cluster: u64,
    ) -> Result<bool, Trouble> {
        let count = self.get(file, cluster)?;
        if count == 0 {
            let at = cluster << self.geometry.cluster_bits;
            return Err(Trouble::Damaged(format!(
                "the cluster at {at:#x} was in use with a refcount of 0"
            )));
        }
        self.set(file, cluster, count - 1)?;
        if count == 1 {
            self.first_free = self.first_free.min(cluster);
            tables
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&cluster);
        }
        Ok(count == 1)
    }

    /// How often `cluster`, a number, is referred to.
    pub fn references(&mut self, file: &DiskFile, cluster: u64) -> io::Result<u64> {
        self.get(file, cluster)
    }

    /// A block for clusters that have none: none of them is in use, so it takes the first.
    fn add_block(&mut self, file: &DiskFile, tables: &Tables, block: u64) -> Result<(), Trouble> {
        let index = usize::try_from(block).unwrap_or(usize::MAX);
        if index >= self.table.len() {
            return self.grow_table(file, tables, block);
        }
        let cluster = block * self.per_block();
        let host = cluster << self.geometry.cluster_bits;
        let claim = Claim {
            host,
            count: 1,
            fresh: cluster >= self.first_fresh,
        };
        self.check_free(tables, claim)?;
        file.grow(host + self.geometry.cluster())?;
        if !claim.fresh {
            file.write_zeroes(host, self.geometry.cluster())?;
        }
        self.table[index] = host;
        self.new_blocks.push(index);
        self.set(file, cluster, 1)?;
        self.first_fresh = self.first_fresh.max(cluster + 1);
        insert(tables, cluster..cluster + 1);
        Ok(())
    }

    /// A longer refcount table. It stands behind the blocks that count it, at the first cluster that the old one can't count.
    fn grow_table(&mut self, file: &DiskFile, tables: &Tables, block: u64) -> Result<(), Trouble> {
        let (cluster, bits) = (self.geometry.cluster(), self.geometry.cluster_bits);
        let per_block = self.per_block();
        let (mut blocks, mut clusters) = (1, 0);
        loop {
            let entries = (block + blocks) * 3 / 2;
            let wanted = (entries * 8).div_ceil(cluster);
            if wanted == clusters && blocks * per_block >= blocks + clusters {
                break;
            }
            clusters = wanted;
            blocks = blocks.max((blocks + clusters).div_ceil(per_block));
        }
        if clusters * cluster > MAX_REFCOUNT_TABLE.max(cluster) {
            return Err(io::Error::from_raw_os_error(libc::EFBIG).into());
        }
        let first = block * per_block;
        let all = Claim {
            host: first << bits,
            count: blocks + clusters,
            fresh: first >= self.first_fresh,
        };
        self.check_free(tables, all)?;
        let (from, table_at) = (all.host, all.host + blocks * cluster);
        file.grow(table_at + clusters * cluster)?;
        if !all.fresh {
            file.write_zeroes(from, all.count * cluster)?;
        }
        self.first_fresh = self.first_fresh.max(first + all.count);
        // What the new table names is on stable storage before the table is, and the table before the header names it.
        self.write(file)?;
        let mut table = self.table.clone();
        table.resize((clusters * cluster / 8) as usize, 0);
        let block = block as usize;
        for (index, at) in (from..table_at).step_by(cluster as usize).enumerate() {
            table[block + index] = at;
        }
        let old = std::mem::replace(&mut self.table, table);
        let counted = (first..first + all.count).try_for_each(|number| self.set(file, number, 1));
        let written = counted.and_then(|()| {
            self.write(file)?;
            let bytes: Vec<u8> = self.table.iter().flat_map(|at| at.to_be_bytes()).collect();
            file.write(&bytes, table_at)?;
            file.sync()?;
            let mut place = [0; 12];
            place[..8].copy_from_slice(&table_at.to_be_bytes());
            place[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
            file.write(&place, REFCOUNT_TABLE_AT)?;
            Ok(file.sync()?)
        });
        if let Err(trouble) = written {
            self.table = old;
            let per_piece = self.per_piece();
            self.pieces.retain(|number, _| number * per_piece < first);
            return Err(trouble);
        }
        insert(tables, first..first + all.count);
        let old_first = self.table_at >> bits;
        let old_clusters = std::mem::replace(&mut self.table_clusters, clusters);
        self.table_at = table_at;
        for number in old_first..old_first + old_clusters {
            self.release(file, tables, number)?;
        }
        Ok(())
    }

    /// Writes what is newer in memory, to the kernel's cache; a table only after the blocks that it names.
    pub fn write(&mut self, file: &DiskFile) -> io::Result<()> {
        for piece in self.pieces.values_mut().filter(|piece| piece.dirty) {
            file.write(&piece.bytes, piece.at)?;
            piece.dirty = false;
        }
        if self.new_blocks.is_empty() {
            return Ok(());
        }
        file.sync()?;
        while let Some(&block) = self.new_blocks.last() {
            file.write(
                &self.table[block].to_be_bytes(),
                self.table_at + block as u64 * 8,
            )?;
            self.new_blocks.pop();
        }
        Ok(())
    }
}

/// Notes that clusters hold tables.
pub fn insert(tables: &Tables, clusters: std::ops::Range<u64>) {
    tables
        .write()
        .unwrap_or_else(PoisonError::into_inner)
        .extend(clusters);
}

/// A count of `1 << order` bits.
fn count(bytes: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let bit = index << order;
        let mask = (1u8 << (1 << order)) - 1;
        return (bytes[bit / 8] >> (bit % 8) & mask).into();
    }
    let width = 1 << (order - 3);
    let field = &bytes[index * width..(index + 1) * width];
    field
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn set_count(bytes: &mut [u8], order: u32, index: usize, value: u64) {
    if order < 3 {
        let bit = index << order;
        let mask = (1u8 << (1 << order)) - 1;
        let byte = &mut bytes[bit / 8];
        *byte = *byte & !(mask << (bit % 8)) | (value as u8 & mask) << (bit % 8);
        return;
    }
    let width = 1 << (order - 3);
    let field = &mut bytes[index * width..(index + 1) * width];
    field.copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_all_widths_keep_their_neighbours() {
        for order in 0..=6 {
            let mut bytes = [0u8; 64];
            let all = (bytes.len() * 8) >> order;
            let most = if order == 6 {
                u64::MAX
            } else {
                (1 << (1 << order)) - 1
            };
            for index in 0..all {
                set_count(
                    &mut bytes,
                    order,
                    index,
                    if index % 3 == 0 { most } else { 0 },
                );
            }
            set_count(&mut bytes, order, 1, 1);
            for index in 0..all {
                let expected = if index % 3 == 0 {
                    most
                } else {
                    u64::from(index == 1)
                };
                assert_eq!(
                    count(&bytes, order, index),
                    expected,
                    "order {order}, {index}"
                );
            }
        }
        let mut bytes = [0; 8];
        set_count(&mut bytes, 4, 1, 0x1234);
        assert_eq!(bytes, [0, 0, 0x12, 0x34, 0, 0, 0, 0]);
        set_count(&mut bytes, 0, 9, 1);
        assert_eq!(bytes[1], 2);
    }
}

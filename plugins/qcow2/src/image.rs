//! An open image, and how it looks clusters up.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::commit::Commit;
use crate::damage::Trouble;
use crate::file::DiskFile;
use crate::header::Compression;
use crate::layout::{Geometry, Mapping, OFFSET};
use crate::refcounts::{Refcounts, Tables};
use crate::scratch::{Target, Work};
use crate::slices::{Slice, Slices};

/// An open image. Reads take no lock that others need alone, unless a piece of a table has to be brought in.
pub struct Image {
    /// The file.
    pub file: DiskFile,
    /// Cluster size, version and size of the disk.
    pub geometry: Geometry,
    /// How clusters are compressed.
    pub compression: Compression,
    /// The L1 table. Changed under the lock on the metadata.
    pub l1: Box<[AtomicU64]>,
    /// Where it is in the file.
    pub l1_at: u64,
    /// Pieces of L2 tables.
    pub slices: Slices,
    /// What shows through where nothing is allocated.
    pub backing: Option<Backing>,
    /// Damage has been found.
    pub damaged: AtomicBool,
    /// What writing takes; `None`: opened for reading.
    pub writer: Option<Writer>,
}

/// What a writable image has besides.
pub struct Writer {
    /// Clusters that hold tables. Locked for moments, with any other lock held.
    pub tables: Tables,
    /// Refcounts, and what is newer in memory than in the file. Not held while guest data is transferred.
    pub meta: Mutex<Meta>,
    /// Held by who writes metadata out. Taken before `meta`.
    pub commit: Mutex<Commit>,
    /// A lock for each queue, shared by its requests while they use clusters that they have looked up.
    users: Mutex<Vec<Arc<RwLock<()>>>>,
    /// Clusters are freed when the guest discards blocks.
    pub discard: bool,
    /// Freed clusters are given back to the filesystem.
    pub punch: bool,
}

/// The metadata that changes.
pub struct Meta {
    /// All refcounts.
    pub refcounts: Refcounts,
    /// Pieces of L2 tables that are newer in memory.
    pub dirty: Vec<Arc<Slice>>,
    /// Entries of the L1 table that are newer in memory.
    pub dirty_l1: Vec<usize>,
    /// Clusters, first number and how many, that are not referred to any more in memory, but still in the file.
    pub freed: Vec<(u64, u64)>,
}

impl Meta {
    /// Notes that a piece has been changed.
    pub fn changed(&mut self, slice: &Arc<Slice>) {
        if !slice.dirty.swap(true, Ordering::AcqRel) {
            self.dirty.push(slice.clone());
        }
    }
}

/// What is behind an image.
pub enum Backing {
    /// A raw image.
    Raw(DiskFile),
    /// Another image.
    Image(Box<Image>),
}

/// Bytes of the disk with one mapping.
pub struct Extent {
    /// The mapping of the first cluster; those of the others continue it.
    pub mapping: Mapping,
    /// How many, from the byte that was looked up.
    pub len: u64,
}

impl Writer {
    /// All about writing to an image.
    pub fn new(tables: Tables, refcounts: Refcounts, discard: bool, punch: bool) -> Self {
        Self {
            tables,
            meta: Mutex::new(Meta {
                refcounts,
                dirty: Vec::new(),
                dirty_l1: Vec::new(),
                freed: Vec::new(),
            }),
            commit: Mutex::default(),
            users: Mutex::default(),
            discard,
            punch,
        }
    }

    /// The metadata.
    pub fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue's lock.
    pub fn join(&self) -> Arc<RwLock<()>> {
        let user = Arc::new(RwLock::new(()));
        self.users
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(user.clone());
        user
    }

    /// Gives a queue's lock back.
    pub fn leave(&self, user: &Arc<RwLock<()>>) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.retain(|other| !Arc::ptr_eq(other, user));
    }

    /// Waits until all requests have ended that may have looked up what is not there any more.
    pub fn wait_for_users(&self) {
        for user in &*self.users.lock().unwrap_or_else(PoisonError::into_inner) {
            drop(user.write().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl Image {
    /// Looks up `at`, which is on the disk, and as much of the `most` bytes from there on as has one mapping. `None`: the table
    /// is not in memory, and `load` forbids to bring it in.
    ///
    /// # Errors
    /// The table can't be read, or is damaged.
    pub fn extent(&self, at: u64, most: u64, load: bool) -> Result<Option<Extent>, Trouble> {
        let g = self.geometry;
        let entry = self.l1_entry(g.l1_index(at));
        let table = entry & OFFSET;
        if table == 0 {
            let len = most.min(g.table_reach() - at % g.table_reach());
            let mapping = Mapping::Unallocated;
            return Ok(Some(Extent { mapping, len }));
        }
        let (piece, index) = g.l2_index(at);
        let slice = if load {
            self.slice(table, piece)?
        } else {
            match self.slices.get(table + piece) {
                Some(slice) => slice,
                None => return Ok(None),
            }
        };
        let mapping = self.decode(slice.get(index))?;
        let mut len = g.cluster() - g.within(at);
        let mut clusters = 1;
        while len < most && index + clusters < slice.len() {
            let next = self.decode(slice.get(index + clusters));
            if !next.is_ok_and(|next| mapping.continues(clusters as u64, next, g)) {
                break;
            }
            len += g.cluster();
            clusters += 1;
        }
        let len = len.min(most);
        Ok(Some(Extent { mapping, len }))
    }

    /// An entry of the L1 table.
    pub fn l1_entry(&self, index: usize) -> u64 {
        self.l1
            .get(index)
            .map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// What an entry of an L2 table says.
    ///
    /// # Errors
    /// Damage: it makes no sense, or names clusters outside of the file.
    pub fn decode(&self, entry: u64) -> Result<Mapping, Trouble> {
        let mapping = Mapping::decode(entry, self.geometry).map_err(|what| {
            Trouble::Damaged(format!("an L2 table has the entry {entry:#x}: {what}"))
        })?;
        let (first, count) = mapping.clusters(self.geometry);
        if count > 0 && !self.within_file(first) {
            return Err(Trouble::Damaged(format!(
                "an L2 table refers to {first:#x}, where the file has ended"
            )));
        }
        Ok(mapping)
    }

    fn within_file(&self, at: u64) -> bool {
        at < self.file.len()
    }

    /// The piece `piece` bytes into the L2 table at `table`.
    ///
    /// # Errors
    /// It can't be read; damage: it is not where a table can be, or refers to clusters with tables in them.
    pub fn slice(&self, table: u64, piece: u64) -> Result<Arc<Slice>, Trouble> {
        self.slices.get_or_load(table + piece, || {
            if self.geometry.within(table) != 0 || !self.within_file(table + piece) {
                return Err(Trouble::Damaged(format!(
                    "the L1 table refers to an L2 table at {table:#x}"
                )));
            }
            let mut bytes = vec![0; self.geometry.slice_bytes() as usize];
            self.file.read(&mut bytes, table + piece)?;
            let slice = Slice::new(table + piece, &bytes);
            if let Some(writer) = &self.writer {
                self.check_slice(writer, &slice)?;
            }
            Ok(slice)
        })
    }

    /// Guest data must not be written over a table, whatever the entries say.
    fn check_slice(&self, writer: &Writer, slice: &Slice) -> Result<(), Trouble> {
        let tables = writer.tables.read().unwrap_or_else(PoisonError::into_inner);
        for entry in slice.entries().filter(|entry| *entry != 0) {
            // What makes no sense is found when it is used.
            let Ok(mapping) = Mapping::decode(entry, self.geometry) else {
                continue;
            };
            let (at, count) = mapping.clusters(self.geometry);
            let first = at >> self.geometry.cluster_bits;
            if let Some(cluster) = (first..first + count).find(|cluster| tables.contains(cluster)) {
                return Err(Trouble::Damaged(format!(
                    "the L2 table at {:#x} has guest data in cluster {cluster}, which has a table in it",
                    slice.at
                )));
            }
        }
        Ok(())
    }

    /// Reads all of `target` from `at` on, which are on the disk.
    ///
    /// # Errors
    /// The file, or a backing file, can't be read or is damaged.
    pub fn read(&self, at: u64, mut target: Target<'_>, work: &mut Work) -> Result<(), Trouble> {
        let len = target.len();
        let mut done = 0;
        while done < len {
            let from = at + done;
            let Some(extent) = self.extent(from, len - done, true)? else {
                return Err(io::Error::from_raw_os_error(libc::EIO).into());
            };
            work.part(&mut target, done, extent.len, |part, work| {
                self.read_mapped(extent.mapping, from, part, work)
            })?;
            done += extent.len;
        }
        Ok(())
    }

    /// Reads `target` from `at` on, where clusters are mapped by `mapping` and what continues it.
    pub fn read_mapped(
        &self,
        mapping: Mapping,
        at: u64,
        mut target: Target<'_>,
        work: &mut Work,
    ) -> Result<(), Trouble> {
        let within = self.geometry.within(at);
        match mapping {
            Mapping::Unallocated => match &self.backing {
                None => target.clear(),
                Some(backing) => backing.read(at, target, work)?,
            },
            Mapping::Zero { .. } => target.clear(),
            Mapping::Data { host, .. } => target.read(&self.file, host + within, work)?,
            Mapping::Compressed { at: packed, bytes } => {
                let cluster = self.geometry.cluster();
                let mut decompressor = std::mem::take(&mut work.decompressor);
                let plain =
                    decompressor.cluster(&self.file, self.compression, (packed, bytes), cluster);
                let copied = plain.map(|plain| {
                    let (from, len) = (within as usize, target.len() as usize);
                    target.copy_from(&plain[from..from + len]);
                });
                work.decompressor = decompressor;
                match copied {
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                        return Err(Trouble::Damaged(format!(
                            "what is compressed at {packed:#x} can't be decompressed"
                        )));
                    }
                    copied => copied?,
                }
            }
        }
        Ok(())
    }

    /// Reads guest memory at once if nothing has to be waited for; false if something has.
    pub fn read_at_once(&self, at: u64, list: &[vmm_plugin_api::GuestSlice], len: u64) -> bool {
        match self.extent(at, len, false) {
            Ok(Some(extent)) if extent.len == len => match extent.mapping {
                Mapping::Data { host, .. } => self
                    .file
                    .read_list_cached(host + self.geometry.within(at), list),
                Mapping::Zero { .. } => {
                    list.iter().for_each(|slice| slice.fill(0));
                    true
                }
                Mapping::Unallocated | Mapping::Compressed { .. } => false,
            },
            _ => false,
        }
    }
}

impl Backing {
    /// Reads `target`; what is beyond its end is zero.
    fn read(&self, at: u64, mut target: Target<'_>, work: &mut Work) -> Result<(), Trouble> {
        let image = match self {
            Self::Raw(file) => return Ok(target.read(file, at, work)?),
            Self::Image(image) => image,
        };
        let there = image.geometry.size.saturating_sub(at);
        let len = target.len();
        if there >= len {
            return image.read_below(at, target, work);
        }
        work.part(&mut target, there, len - there, |mut rest, _| rest.clear());
        if there == 0 {
            return Ok(());
        }
        work.part(&mut target, 0, there, |first, work| {
            image.read_below(at, first, work)
        })
    }

    /// Bytes of the disk that it has.
    pub fn size(&self) -> u64 {
        match self {
            Self::Raw(file) => file.len(),
            Self::Image(image) => image.geometry.size,
        }
    }
}

impl Image {
    /// Reads for an image in front of this one. Damage here is not damage there.
    fn read_below(&self, at: u64, target: Target<'_>, work: &mut Work) -> Result<(), Trouble> {
        match self.read(at, target, work) {
            Err(trouble @ Trouble::Damaged(_)) => {
                Err(io::Error::from_raw_os_error(-self.report(&trouble)).into())
            }
            result => result,
        }
    }
}

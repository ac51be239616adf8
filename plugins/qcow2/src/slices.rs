//! The L2 tables in memory, in pieces of at most 4 KiB. Whoever looks a cluster up shares a lock with others who do; alone is only
//! who brings in a piece.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// Most bytes of tables in memory, apart from what is not written yet. With clusters of 64 KiB they map 32 GiB.
const BYTES: u64 = 4 << 20;
/// Maps under a lock of their own.
const SHARDS: u64 = 16;

/// A piece of an L2 table.
pub struct Slice {
    /// Where it is in the file.
    pub at: u64,
    entries: Box<[AtomicU64]>,
    /// In memory it is newer than in the file. Set and cleared under the lock on the metadata.
    pub dirty: AtomicBool,
    /// Looked at since the last search for one to give up.
    used: AtomicBool,
}

impl Slice {
    /// The piece at `at` from its bytes in the file.
    pub fn new(at: u64, bytes: &[u8]) -> Self {
        let (entries, _) = bytes.as_chunks::<8>();
        Self {
            at,
            entries: entries
                .iter()
                .map(|e| AtomicU64::new(u64::from_be_bytes(*e)))
                .collect(),
            dirty: AtomicBool::new(false),
            used: AtomicBool::new(true),
        }
    }

    /// Entries in it.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// An entry; those beyond the end are 0.
    pub fn get(&self, index: usize) -> u64 {
        self.entries
            .get(index)
            .map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// Changes an entry. Under the lock on the metadata.
    pub fn set(&self, index: usize, value: u64) {
        if let Some(entry) = self.entries.get(index) {
            entry.store(value, Ordering::Release);
        }
    }

    /// All entries.
    pub fn entries(&self) -> impl Iterator<Item = u64> {
        self.entries
            .iter()
            .map(|entry| entry.load(Ordering::Acquire))
    }

    /// Appends it as it is in the file.
    pub fn store(&self, to: &mut Vec<u8>) {
        to.extend(self.entries().flat_map(u64::to_be_bytes));
    }
}

type Shard = RwLock<HashMap<u64, Arc<Slice>>>;

/// The pieces that are in memory, by their place in the file.
pub struct Slices {
    shards: Box<[Shard]>,
    /// Most pieces in a shard.
    limit: usize,
    slice_bytes: u64,
}

impl Slices {
    /// None yet, of `slice_bytes` bytes each.
    pub fn new(slice_bytes: u64) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            limit: (BYTES / SHARDS / slice_bytes) as usize,
            slice_bytes,
        }
    }

    fn shard(&self, at: u64) -> &Shard {
        &self.shards[(at / self.slice_bytes % SHARDS) as usize]
    }

    /// The piece at `at`, if it is in memory.
    pub fn get(&self, at: u64) -> Option<Arc<Slice>> {
        let shard = self
            .shard(at)
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let slice = shard.get(&at)?;
        // Not written where it is set: cores would pass the line around.
        if !slice.used.load(Ordering::Relaxed) {
            slice.used.store(true, Ordering::Relaxed);
        }
        Some(slice.clone())
    }

    /// The piece at `at`; `load` brings it in if need be.
    ///
    /// # Errors
    /// What `load` says.
    pub fn get_or_load<E>(
        &self,
        at: u64,
        load: impl FnOnce() -> Result<Slice, E>,
    ) -> Result<Arc<Slice>, E> {
        if let Some(slice) = self.get(at) {
            return Ok(slice);
        }
        // Loaded under the lock: another thread could otherwise load, change, write and give up the piece meanwhile, and what
        // was loaded here would be out of date.
        let mut shard = self
            .shard(at)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(slice) = shard.get(&at) {
            return Ok(slice.clone());
        }
        if shard.len() >= self.limit {
            give_up(&mut shard);
        }
        let slice = Arc::new(load()?);
        shard.insert(at, slice.clone());
        Ok(slice)
    }
}

/// Removes a piece that has not been used lately, if there is one. Those that somebody holds stay: who changes one marks it as
/// dirty before letting go of it.
fn give_up(shard: &mut HashMap<u64, Arc<Slice>>) {
    for _ in 0..2 {
        let free = |slice: &Arc<Slice>| {
            Arc::strong_count(slice) == 1
                && !slice.dirty.load(Ordering::Acquire)
                && !slice.used.swap(false, Ordering::Relaxed)
        };
        let victim = shard
            .iter()
            .find(|(_, slice)| free(slice))
            .map(|(at, _)| *at);
        if let Some(at) = victim {
            shard.remove(&at);
            return;
        }
    }
}

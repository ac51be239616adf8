//! The port and MMIO buses: which device owns an address.
//!
//! A lookup on a vCPU thread takes no lock: the map is an immutable sorted table that a change replaces as a whole.
//! A reader keeps the table it looked up alive, so a range that moves meanwhile never leaves it with a stale pointer.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;

use crate::hypervisor::{ExitHandler, Space};
use crate::probes;

/// How many different unclaimed addresses each bus logs before it goes silent.
const UNCLAIMED_LOGGED: usize = 256;

/// What owns a range of guest addresses. Called on any vCPU thread, several at once.
pub trait Registers: Send + Sync {
    /// Reads `width` (1, 2, 4 or 8) bytes at `offset` into region number `region`.
    fn read(&self, region: u32, offset: u64, width: u8) -> u64;
    /// Writes the low `width` bytes of `value`.
    fn write(&self, region: u32, offset: u64, width: u8, value: u64);
}

/// All ones in the low `width` bytes: what a read that nothing answers gives.
#[must_use]
pub fn ones(width: u8) -> u64 {
    if width >= 8 {
        u64::MAX
    } else {
        (1 << (u32::from(width) * 8)) - 1
    }
}

/// A range of addresses and who owns it.
#[derive(Clone)]
struct Entry {
    start: u64,
    /// Inclusive, so that a range may end at the top of the address space.
    last: u64,
    region: u32,
    owner: Arc<str>,
    /// `None`: claimed so that no device gets it; the hypervisor or RAM answers before the bus is asked.
    target: Option<Arc<dyn Registers>>,
}

impl Entry {
    fn holds(&self, address: u64, width: u8) -> bool {
        self.start <= address && address <= self.last && u64::from(width) - 1 <= self.last - address
    }
}

/// Sorted by start; no two overlap.
type Table = Vec<Entry>;

/// Why a range could not be claimed. The text names both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty, or goes past the end of its address space.
    BadRange {
        /// Who asked.
        owner: String,
        /// First address.
        start: u64,
        /// Length in bytes.
        len: u64,
        /// Which address space.
        space: Space,
    },
    /// Someone else holds a part of it.
    Overlap {
        /// Who asked.
        owner: String,
        /// First address asked for.
        start: u64,
        /// Last address asked for.
        last: u64,
        /// Who holds it.
        holder: String,
        /// First address held.
        held_start: u64,
        /// Last address held.
        held_last: u64,
        /// Which address space.
        space: Space,
    },
}

impl std::error::Error for BusError {}

impl fmt::Display for BusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadRange {
                owner,
                start,
                len,
                space,
            } => write!(
                f,
                "{owner}: {} {start:#x} with length {len:#x} is empty or ends beyond {:#x}",
                name(*space),
                limit(*space)
            ),
            Self::Overlap {
                owner,
                start,
                last,
                holder,
                held_start,
                held_last,
                space,
            } => write!(
                f,
                "{owner}: {} {start:#x}-{last:#x} is taken by {holder} ({held_start:#x}-{held_last:#x})",
                name(*space)
            ),
        }
    }
}

fn name(space: Space) -> &'static str {
    match space {
        Space::Pio => "port",
        Space::Mmio => "address",
    }
}

fn limit(space: Space) -> u64 {
    match space {
        Space::Pio => 0xffff,
        Space::Mmio => u64::MAX,
    }
}

/// One address space and who owns what in it. Any thread may look up and change it at any time.
pub struct Bus {
    space: Space,
    table: Arc<ArcSwap<Table>>,
    /// Held across read-copy-replace, so that two changes can't lose one another.
    change: Mutex<()>,
    unclaimed: Arc<Mutex<BTreeSet<u64>>>,
}

impl Bus {
    /// An empty bus.
    #[must_use]
    pub fn new(space: Space) -> Self {
        Self {
            space,
            table: Arc::new(ArcSwap::from_pointee(Table::new())),
            change: Mutex::new(()),
            unclaimed: Arc::default(),
        }
    }

    /// Gives `len` addresses from `start` to `target`, which knows them as its region number `region`.
    ///
    /// # Errors
    /// The range is empty, too long, or overlaps another: nothing changed.
    pub fn insert(
        &self,
        owner: &Arc<str>,
        start: u64,
        len: u64,
        region: u32,
        target: Arc<dyn Registers>,
    ) -> Result<(), BusError> {
        self.claim(owner, start, len, region, Some(target))
    }

    /// Keeps a range from every device because something below the bus (RAM, the hypervisor's own devices) answers it.
    ///
    /// # Errors
    /// As for [`Bus::insert`].
    pub fn reserve(&self, owner: &str, start: u64, len: u64) -> Result<(), BusError> {
        self.claim(&Arc::from(owner), start, len, 0, None)
    }

    fn claim(
        &self,
        owner: &Arc<str>,
        start: u64,
        len: u64,
        region: u32,
        target: Option<Arc<dyn Registers>>,
    ) -> Result<(), BusError> {
        let bad = || BusError::BadRange {
            owner: owner.to_string(),
            start,
            len,
            space: self.space,
        };
        let last = len
            .checked_sub(1)
            .and_then(|len| start.checked_add(len))
            .ok_or_else(bad)?;
        if last > limit(self.space) {
            return Err(bad());
        }
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.table.load_full();
        let at = old.partition_point(|entry| entry.last < start);
        if let Some(other) = old.get(at).filter(|other| other.start <= last) {
            return Err(BusError::Overlap {
                owner: owner.to_string(),
                start,
                last,
                holder: other.owner.to_string(),
                held_start: other.start,
                held_last: other.last,
                space: self.space,
            });
        }
        let mut new = Table::clone(&old);
        new.insert(
            at,
            Entry {
                start,
                last,
                region,
                owner: Arc::clone(owner),
                target,
            },
        );
        self.table.store(Arc::new(new));
        Ok(())
    }

    /// Ends the claim that starts at `start`. Returns whether there was one. A call that a vCPU has begun
    /// may still be running when this returns.
    pub fn remove(&self, start: u64) -> bool {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.table.load_full();
        let Ok(at) = old.binary_search_by_key(&start, |entry| entry.start) else {
            return false;
        };
        let mut new = Table::clone(&old);
        new.remove(at);
        self.table.store(Arc::new(new));
        true
    }

    /// A view for one thread, which remembers where it hit last.
    #[must_use]
    pub fn reader(&self) -> BusReader {
        BusReader {
            space: self.space,
            cache: Cache::new(Arc::clone(&self.table)),
            hit: 0,
            unclaimed: Arc::clone(&self.unclaimed),
        }
    }

    /// Every claim as (first address, last address, owner), in address order.
    #[must_use]
    pub fn claims(&self) -> Vec<(u64, u64, String)> {
        self.table
            .load()
            .iter()
            .map(|entry| (entry.start, entry.last, entry.owner.to_string()))
            .collect()
    }
}

/// One thread's view of a [`Bus`]: takes no lock and, as long as the table stays, touches no shared counter.
pub struct BusReader {
    space: Space,
    cache: Cache<Arc<ArcSwap<Table>>, Arc<Table>>,
    hit: usize,
    unclaimed: Arc<Mutex<BTreeSet<u64>>>,
}

impl BusReader {
    /// Reads `width` (1, 2, 4 or 8) bytes; bytes that nobody owns read as ones.
    pub fn read(&mut self, address: u64, width: u8) -> u64 {
        let table = self.cache.load();
        match find(table, &mut self.hit, address) {
            Some(entry) if entry.holds(address, width) => match &entry.target {
                Some(target) => {
                    target.read(entry.region, address - entry.start, width) & ones(width)
                }
                None => ones(width),
            },
            None if width == 1 || !straddles(table, address, width) => {
                self.unclaimed(address, width, None);
                ones(width)
            }
            _ => (0..width).fold(0, |value, at| {
                let byte = address
                    .checked_add(u64::from(at))
                    .map_or(0xff, |address| self.read(address, 1));
                value | byte << (8 * at)
            }),
        }
    }

    /// Writes the low `width` bytes of `value`; bytes that nobody owns are dropped.
    pub fn write(&mut self, address: u64, width: u8, value: u64) {
        let table = self.cache.load();
        match find(table, &mut self.hit, address) {
            Some(entry) if entry.holds(address, width) => {
                if let Some(target) = &entry.target {
                    target.write(
                        entry.region,
                        address - entry.start,
                        width,
                        value & ones(width),
                    );
                }
            }
            None if width == 1 || !straddles(table, address, width) => {
                self.unclaimed(address, width, Some(value & ones(width)));
            }
            _ => {
                for at in 0..width {
                    if let Some(address) = address.checked_add(u64::from(at)) {
                        self.write(address, 1, value >> (8 * at) & 0xff);
                    }
                }
            }
        }
    }

    /// Logs once per address: a guest that polls a register nobody has must not fill the log.
    #[cold]
    fn unclaimed(&self, address: u64, width: u8, written: Option<u64>) {
        if !log::log_enabled!(log::Level::Debug) {
            return;
        }
        let mut seen = self
            .unclaimed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= UNCLAIMED_LOGGED || !seen.insert(address) {
            return;
        }
        let space = name(self.space);
        match written {
            None => log::debug!(
                "no device at {space} {address:#x}: a read of {width} bytes gives all ones"
            ),
            Some(value) => {
                log::debug!("no device at {space} {address:#x}: {width} bytes {value:#x} dropped")
            }
        }
        if seen.len() == UNCLAIMED_LOGGED {
            log::debug!("more accesses to unclaimed {space}es are not logged");
        }
    }
}

/// The entry that holds `address`: the last one hit, if it still does, else by binary search.
fn find<'a>(table: &'a Table, hit: &mut usize, address: u64) -> Option<&'a Entry> {
    if let Some(entry) = table.get(*hit)
        && entry.start <= address
        && address <= entry.last
    {
        return Some(entry);
    }
    let at = table.partition_point(|entry| entry.last < address);
    let entry = table.get(at).filter(|entry| entry.start <= address)?;
    *hit = at;
    Some(entry)
}

/// Whether an access that starts outside of every entry runs into one.
fn straddles(table: &Table, address: u64, width: u8) -> bool {
    let at = table.partition_point(|entry| entry.last < address);
    table
        .get(at)
        .is_some_and(|entry| entry.start - address < u64::from(width))
}

/// Both buses of a machine.
pub struct Buses {
    /// Ports 0 to 0xffff.
    pub pio: Bus,
    /// Guest physical memory.
    pub mmio: Bus,
}

impl Default for Buses {
    fn default() -> Self {
        Self {
            pio: Bus::new(Space::Pio),
            mmio: Bus::new(Space::Mmio),
        }
    }
}

impl Buses {
    /// The bus of an address space.
    #[must_use]
    pub fn space(&self, space: Space) -> &Bus {
        match space {
            Space::Pio => &self.pio,
            Space::Mmio => &self.mmio,
        }
    }

    /// What one vCPU thread hands to [`Vcpu::run`](crate::hypervisor::Vcpu::run).
    #[must_use]
    pub fn exit_handler(&self) -> BusAccess {
        BusAccess {
            pio: self.pio.reader(),
            mmio: self.mmio.reader(),
        }
    }
}

/// Answers one vCPU's register accesses from the buses.
pub struct BusAccess {
    pio: BusReader,
    mmio: BusReader,
}

impl ExitHandler for BusAccess {
    fn pio_read(&mut self, port: u16, width: u8) -> u32 {
        let value = self.pio.read(u64::from(port), width) as u32;
        probes::pio_read(port, width, value);
        value
    }
    fn pio_write(&mut self, port: u16, width: u8, value: u32) {
        self.pio.write(u64::from(port), width, u64::from(value));
        probes::pio_write(port, width, value);
    }
    fn mmio_read(&mut self, address: u64, width: u8) -> u64 {
        let value = self.mmio.read(address, width);
        probes::mmio_read(address, width, value);
        value
    }
    fn mmio_write(&mut self, address: u64, width: u8, value: u64) {
        self.mmio.write(address, width, value);
        probes::mmio_write(address, width, value);
    }
}

#[cfg(test)]
mod tests;

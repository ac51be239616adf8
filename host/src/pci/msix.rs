//! MSI-X of one function: table, pending bits, and an eventfd per vector that the hypervisor turns into interrupts.
//!
//! A vector's eventfd lives as long as the function, so a device or backend keeps it and knows nothing of masks. While the
//! vector is masked the eventfd is disconnected: its count stays, and is the pending bit (PCI 3.0 section 6.8.3).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::config_space::msix_layout;
use crate::bus::Registers;
use crate::hypervisor::{Msi, MsiRoute, Vm};

/// Table entry words: address low and high, data, vector control (PCI 3.0 section 6.8.2.6 and on).
const ENTRY_BYTES: u64 = 16;

struct Entry {
    msi: Msi,
    masked: bool,
    route: Option<MsiRoute>,
    /// What `route` delivers.
    routed: Msi,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            msi: Msi::default(),
            masked: true,
            route: None,
            routed: Msi::default(),
        }
    }
}

struct Table {
    entries: Vec<Entry>,
    enabled: bool,
    function_masked: bool,
}

/// The MSI-X half of a function. Answers its BAR as [`Registers`].
pub struct Msix<V: Vm> {
    owner: Arc<str>,
    vm: Arc<V>,
    pending_offset: u64,
    table: Mutex<Table>,
    /// Made when first asked for: a guest that uses 3 of 1024 vectors costs 3 descriptors.
    fds: Box<[OnceLock<OwnedFd>]>,
    enabled: AtomicBool,
    /// A guest can make errors at will: only the first is a warning.
    complained: AtomicBool,
}

impl<V: Vm> Msix<V> {
    pub(super) fn new(owner: Arc<str>, vm: Arc<V>, vectors: u16) -> Self {
        let entries = (0..vectors).map(|_| Entry::default()).collect();
        Self {
            owner,
            vm,
            pending_offset: msix_layout(vectors).1,
            table: Mutex::new(Table {
                entries,
                enabled: false,
                function_masked: false,
            }),
            fds: (0..vectors).map(|_| OnceLock::new()).collect(),
            enabled: AtomicBool::new(false),
            complained: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the guest has turned MSI-X on.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// The eventfd of `vector`: each count written to it is one interrupt. The same one for the function's whole life.
    ///
    /// # Errors
    /// No such vector, or out of descriptors.
    pub fn fd(&self, vector: u16) -> Result<BorrowedFd<'_>> {
        let index = usize::from(vector);
        let cell = self.fds.get(index).with_context(|| {
            format!(
                "{}: MSI-X vector {vector} is out of range: it has {}",
                self.owner,
                self.fds.len()
            )
        })?;
        if let Some(fd) = cell.get() {
            return Ok(fd.as_fd());
        }
        let mut table = self.lock();
        let is_new = cell.get().is_none();
        if is_new {
            let fd =
                eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).with_context(|| {
                    format!("{}: no descriptor for MSI-X vector {vector}", self.owner)
                })?;
            // Nobody else sets it: the table's lock is held.
            let _ = cell.set(fd);
        }
        self.rewire(&mut table, index);
        cell.get()
            .map(OwnedFd::as_fd)
            .context("the vector has no descriptor")
    }

    /// One interrupt of `vector`, now or when the guest unmasks it.
    ///
    /// # Errors
    /// As for [`Msix::fd`].
    pub fn raise(&self, vector: u16) -> Result<()> {
        signal(self.fd(vector)?).with_context(|| format!("{}: MSI-X vector {vector}", self.owner))
    }

    /// Follows the capability's message control.
    pub(super) fn control(&self, enabled: bool, function_masked: bool) {
        let mut table = self.lock();
        if (table.enabled, table.function_masked) == (enabled, function_masked) {
            return;
        }
        (table.enabled, table.function_masked) = (enabled, function_masked);
        self.enabled.store(enabled, Ordering::Release);
        for index in 0..self.fds.len() {
            self.rewire(&mut table, index);
        }
    }

    /// Power-on state: all masked, nothing pending.
    pub(super) fn reset(&self) {
        self.control(false, false);
        let mut table = self.lock();
        for (entry, fd) in table.entries.iter_mut().zip(&self.fds) {
            *entry = Entry::default();
            if let Some(fd) = fd.get() {
                drain(fd.as_fd());
            }
        }
    }

    /// Connects, updates or disconnects a vector's eventfd so that the hypervisor has what the guest set up.
    fn rewire(&self, table: &mut Table, index: usize) {
        let live = table.enabled && !table.function_masked;
        let (Some(entry), Some(fd)) = (
            table.entries.get_mut(index),
            self.fds.get(index).and_then(OnceLock::get),
        ) else {
            return;
        };
        let active = live && !entry.masked;
        let result = match entry.route.take() {
            None if active => self.connect(entry, fd.as_fd()),
            Some(route) if !active => self.vm.disconnect_msi(fd.as_fd(), route),
            Some(route) if entry.routed != entry.msi => {
                let result = self.vm.update_msi(&route, entry.msi);
                entry.route = Some(route);
                if result.is_ok() {
                    entry.routed = entry.msi;
                }
                result
            }
            route => {
                entry.route = route;
                Ok(())
            }
        };
        if let Err(error) = result {
            // The guest may have programmed a message that no CPU takes: only it suffers.
            let level = if self.complained.swap(true, Ordering::Relaxed) {
                log::Level::Debug
            } else {
                log::Level::Warn
            };
            log::log!(
                level,
                "{}: MSI-X vector {index} ({:x?}): {error:#}",
                self.owner,
                entry.msi
            );
        }
    }

    fn connect(&self, entry: &mut Entry, fd: BorrowedFd<'_>) -> Result<()> {
        // Taken out first: hypervisors differ in whether a count from before the connection counts.
        let pending = drain(fd);
        match self.vm.connect_msi(fd, entry.msi) {
            Ok(route) => {
                (entry.route, entry.routed) = (Some(route), entry.msi);
                if pending {
                    self.vm.send_msi(entry.msi)
                } else {
                    Ok(())
                }
            }
            Err(error) => {
                if pending {
                    signal(fd)?;
                }
                Err(error)
            }
        }
    }

    /// 64 pending bits from vector `first` on.
    fn pending(&self, first: usize) -> u64 {
        let table = self.lock();
        let waiting: Vec<(usize, &OwnedFd)> = table
            .entries
            .iter()
            .zip(&self.fds)
            .skip(first)
            .take(64)
            .enumerate()
            // A connected vector has nothing pending: what its descriptor holds is on its way.
            .filter(|(_, (entry, _))| entry.route.is_none())
            .filter_map(|(bit, (_, fd))| Some((bit, fd.get()?)))
            .collect();
        let mut polled: Vec<PollFd<'_>> = waiting
            .iter()
            .map(|(_, fd)| PollFd::new(fd, PollFlags::IN))
            .collect();
        if polled.is_empty() || poll(&mut polled, Some(&Timespec::default())).is_err() {
            return 0;
        }
        waiting
            .iter()
            .zip(&polled)
            .filter(|(_, fd)| fd.revents().contains(PollFlags::IN))
            .fold(0, |bits, ((bit, _), _)| bits | 1 << bit)
    }

    fn word(table: &Table, offset: u64) -> u32 {
        let Some(entry) = table.entries.get((offset / ENTRY_BYTES) as usize) else {
            return 0;
        };
        match offset % ENTRY_BYTES / 4 {
            0 => entry.msi.address as u32,
            1 => (entry.msi.address >> 32) as u32,
            2 => entry.msi.data,
            _ => u32::from(entry.masked),
        }
    }

    fn set_word(table: &mut Table, offset: u64, value: u32) {
        let Some(entry) = table.entries.get_mut((offset / ENTRY_BYTES) as usize) else {
            return;
        };
        match offset % ENTRY_BYTES / 4 {
            // The two low bits of a message address are zero (PCI 3.0 section 6.8.2.6).
            0 => entry.msi.address = entry.msi.address & !0xffff_ffff | u64::from(value & !0b11),
            1 => entry.msi.address = entry.msi.address & 0xffff_ffff | u64::from(value) << 32,
            2 => entry.msi.data = value,
            _ => entry.masked = value & 1 != 0,
        }
    }
}

impl<V: Vm> Registers for Msix<V> {
    /// An access across an 8-byte boundary is undefined (PCI 3.0 section 6.8.2): its upper part reads as 0.
    fn read(&self, _: u32, offset: u64, _: u8) -> u64 {
        let aligned = offset & !0b111;
        let qword = if offset >= self.pending_offset {
            self.pending(((aligned - self.pending_offset) * 8) as usize)
        } else {
            let table = self.lock();
            u64::from(Self::word(&table, aligned))
                | u64::from(Self::word(&table, aligned + 4)) << 32
        };
        qword >> (8 * (offset - aligned))
    }

    /// Only whole words on their boundary are defined (PCI 3.0 section 6.8.2); others are dropped.
    fn write(&self, _: u32, offset: u64, width: u8, value: u64) {
        if !matches!(width, 4 | 8) || !offset.is_multiple_of(4) {
            return;
        }
        let mut table = self.lock();
        for at in (0..u64::from(width)).step_by(4) {
            Self::set_word(&mut table, offset + at, (value >> (8 * at)) as u32);
        }
        for index in [
            offset / ENTRY_BYTES,
            (offset + u64::from(width) - 1) / ENTRY_BYTES,
        ] {
            self.rewire(&mut table, index as usize);
        }
    }
}

/// Adds one to an eventfd. A full counter already means what another count would.
fn signal(fd: BorrowedFd<'_>) -> Result<()> {
    match rustix::io::write(fd, &1_u64.to_ne_bytes()) {
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
        Err(error) => Err(error).context("can't signal its descriptor"),
    }
}

/// Empties an eventfd and says whether it held anything.
fn drain(fd: BorrowedFd<'_>) -> bool {
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}

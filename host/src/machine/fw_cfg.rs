//! The firmware configuration device: how firmware is told of the machine, and anything else by name
//! (QEMU, docs/specs/fw_cfg.rst).
//!
//! A guest selects an item by key and reads it byte by byte from a port, or has it copied into its memory at once. Items
//! with a name stand in a directory, which is an item too.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Result, ensure};

use crate::bus::{Registers, ones};
use crate::memory::GuestMemory;

/// Selector (2 bytes), then data (1 byte); 4 bytes on, the DMA address register (8 bytes, big endian).
pub const FW_CFG_PORT: u16 = 0x510;
/// How many ports it takes from [`FW_CFG_PORT`] on.
pub const FW_CFG_PORTS: u16 = 12;
/// ACPI hardware id.
pub const FW_CFG_HID: &str = "QEMU0002";
/// The longest name, without its NUL.
pub const NAME_MAX: usize = 55;
/// The longest file that a VM file may bring: it stays in the host's memory.
pub const FILE_MAX: u64 = 64 << 20;

const KEY_SIGNATURE: u16 = 0;
const KEY_ID: u16 = 1;
const KEY_UUID: u16 = 2;
const KEY_CPUS: u16 = 5;
const KEY_CPUS_MAX: u16 = 0xf;
const KEY_DIRECTORY: u16 = 0x19;
const KEY_FIRST_FILE: u16 = 0x20;
/// Keys are 14 bits: above are a write channel and an architecture's own.
const KEY_MASK: u16 = 0x3fff;

/// What the interface can: the traditional ports, and DMA.
const FEATURES: u32 = 0b11;
/// "QEMU CFG", which the DMA register reads as.
const DMA_SIGNATURE: u64 = 0x5145_4d55_2043_4647;

const DMA_ERROR: u32 = 1;
const DMA_READ: u32 = 1 << 1;
const DMA_SKIP: u32 = 1 << 2;
const DMA_SELECT: u32 = 1 << 3;
const DMA_WRITE: u32 = 1 << 4;

/// Bytes that one copy moves.
const CHUNK: usize = 4096;

/// Makes an item's contents anew each time it is selected.
pub type Maker = Box<dyn Fn() -> Vec<u8> + Send + Sync>;

enum Contents {
    Fixed(Arc<[u8]>),
    /// As long as they were when somebody first asked: the directory says how long that is.
    Made(OnceLock<usize>, Maker),
}

struct Item {
    key: u16,
    contents: Contents,
}

impl Item {
    fn len(&self) -> usize {
        match &self.contents {
            Contents::Fixed(bytes) => bytes.len(),
            Contents::Made(len, make) => *len.get_or_init(|| make().len()),
        }
    }

    fn contents(&self) -> Arc<[u8]> {
        match &self.contents {
            Contents::Fixed(bytes) => Arc::clone(bytes),
            Contents::Made(len, make) => {
                let mut bytes = make();
                let len = *len.get_or_init(|| bytes.len());
                if bytes.len() != len {
                    log::warn!(
                        "fw_cfg item {:#x} has changed its size: the guest gets a part of it",
                        self.key
                    );
                    bytes.resize(len, 0);
                }
                bytes.into()
            }
        }
    }
}

/// The items, before the device is there.
#[derive(Default)]
pub struct Items {
    items: Vec<Item>,
    files: Vec<(String, u16)>,
}

impl Items {
    /// The items that need no name: how many CPUs there are, and the machine's UUID.
    #[must_use]
    pub fn new(cpus: u32, uuid: [u8; 16]) -> Self {
        let mut items = Self::default();
        items.put(KEY_SIGNATURE, b"QEMU".as_slice().into());
        items.put(KEY_ID, FEATURES.to_le_bytes().as_slice().into());
        items.put(KEY_UUID, uuid.as_slice().into());
        for key in [KEY_CPUS, KEY_CPUS_MAX] {
            items.put(key, cpus.to_le_bytes().as_slice().into());
        }
        items
    }

    fn put(&mut self, key: u16, bytes: Arc<[u8]>) {
        self.items.push(Item {
            key,
            contents: Contents::Fixed(bytes),
        });
    }

    fn name(&mut self, name: &str, contents: Contents) -> Result<()> {
        check_name(name)?;
        ensure!(
            self.files.iter().all(|(other, _)| other != name),
            "there are two fw_cfg files {name}"
        );
        let key = KEY_FIRST_FILE + self.files.len() as u16;
        ensure!(key < KEY_MASK, "there are too many fw_cfg files");
        self.files.push((name.to_owned(), key));
        self.items.push(Item { key, contents });
        Ok(())
    }

    /// Adds a file.
    ///
    /// # Errors
    /// No name, or one that is taken.
    pub fn file(&mut self, name: &str, bytes: impl Into<Arc<[u8]>>) -> Result<()> {
        self.name(name, Contents::Fixed(bytes.into()))
    }

    /// Adds a file that is made anew whenever a guest selects it. Its length stays what it was when a guest first asked.
    ///
    /// # Errors
    /// As for [`Items::file`].
    pub fn made(&mut self, name: &str, make: Maker) -> Result<()> {
        self.name(name, Contents::Made(OnceLock::new(), make))
    }

    fn find(&self, key: u16) -> Option<&Item> {
        self.items.iter().find(|item| item.key == key)
    }

    /// Sorted by name: firmware may search it so.
    fn directory(&self) -> Vec<u8> {
        let mut files: Vec<_> = self.files.iter().collect();
        files.sort();
        let mut bytes = (files.len() as u32).to_be_bytes().to_vec();
        for (name, key) in files {
            let item = self.find(*key);
            bytes.extend((item.map_or(0, Item::len) as u32).to_be_bytes());
            bytes.extend(key.to_be_bytes());
            bytes.extend([0; 2]);
            let mut field = [0; NAME_MAX + 1];
            field[..name.len()].copy_from_slice(name.as_bytes());
            bytes.extend(field);
        }
        bytes
    }
}

/// Whether `name` can stand in the directory.
///
/// # Errors
/// Empty, too long, or with other than printable ASCII characters.
pub fn check_name(name: &str) -> Result<()> {
    ensure!(
        !name.is_empty() && name.len() <= NAME_MAX && name.bytes().all(|b| b.is_ascii_graphic()),
        "\"{name}\" is no name for a fw_cfg file: 1 to {NAME_MAX} printable ASCII characters"
    );
    Ok(())
}

#[derive(Default)]
struct State {
    selected: u16,
    contents: Option<Arc<[u8]>>,
    offset: usize,
    dma_address: u64,
}

/// The device. Callable on any thread.
pub struct FwCfg {
    items: Items,
    /// Made when a guest first asks for it, which those that no firmware starts mostly don't.
    directory: OnceLock<Arc<[u8]>>,
    memory: Arc<GuestMemory>,
    state: Mutex<State>,
}

impl FwCfg {
    /// The device with these items; DMA goes to `memory`.
    #[must_use]
    pub fn new(items: Items, memory: Arc<GuestMemory>) -> Self {
        let this = Self {
            items,
            directory: OnceLock::new(),
            memory,
            state: Mutex::default(),
        };
        this.reset();
        this
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Power-on state.
    pub fn reset(&self) {
        let mut state = self.lock();
        *state = State::default();
        self.select(&mut state, KEY_SIGNATURE);
    }

    fn select(&self, state: &mut State, key: u16) {
        state.selected = key;
        state.offset = 0;
        state.contents = match key & KEY_MASK {
            KEY_DIRECTORY => {
                let directory = || self.items.directory().into();
                Some(Arc::clone(self.directory.get_or_init(directory)))
            }
            key => self.items.find(key).map(Item::contents),
        };
    }

    /// The next byte, 0 beyond the end.
    fn next(state: &mut State) -> u8 {
        let byte = state
            .contents
            .as_ref()
            .and_then(|bytes| bytes.get(state.offset).copied());
        state.offset = state.offset.saturating_add(1);
        byte.unwrap_or(0)
    }

    /// Does what the control structure at `address` asks for, and clears its control word, or sets its error bit.
    fn dma(&self, address: u64) {
        let mut request = [0; 16];
        if self.memory.read(address, &mut request).is_err() {
            log::debug!("fw_cfg: no RAM at {address:#x}, where a DMA request should be");
            return;
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, target @ ..] = request;
        let control = u32::from_be_bytes([c0, c1, c2, c3]);
        let len = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        let target = u64::from_be_bytes(target);
        let mut state = self.lock();
        if control & DMA_SELECT != 0 {
            self.select(&mut state, (control >> 16) as u16);
        }
        let done = if control & DMA_READ != 0 {
            self.copy_out(&mut state, target, len)
        } else if control & DMA_WRITE != 0 {
            // No item can be written.
            false
        } else {
            if control & DMA_SKIP != 0 {
                state.offset = state.offset.saturating_add(len);
            }
            true
        };
        let result = if done { 0 } else { DMA_ERROR };
        // The request was read from there.
        let _ = self.memory.write(address, &result.to_be_bytes());
    }

    /// Beyond an item's end there are zeros, as many as asked for: no more than any item has, since the vCPU can't be held
    /// before the copy is done.
    fn copy_out(&self, state: &mut State, target: u64, len: usize) -> bool {
        if len as u64 > FILE_MAX {
            return false;
        }
        let contents = state.contents.clone().unwrap_or_default();
        let mut at = 0;
        while at < len {
            let count = (len - at).min(CHUNK);
            let from = contents.get(state.offset..).unwrap_or_default();
            let from = &from[..from.len().min(count)];
            let mut chunk = [0; CHUNK];
            chunk[..from.len()].copy_from_slice(from);
            let Some(address) = target.checked_add(at as u64) else {
                return false;
            };
            if self.memory.write(address, &chunk[..count]).is_err() {
                return false;
            }
            state.offset = state.offset.saturating_add(count);
            at += count;
        }
        true
    }
}

/// Region 0, at [`FW_CFG_PORT`].
impl Registers for FwCfg {
    fn read(&self, _: u32, offset: u64, width: u8) -> u64 {
        match (offset, width) {
            (0, 2) => u64::from(self.lock().selected),
            (1, 1) => u64::from(Self::next(&mut self.lock())),
            (4..12, _) => {
                // As bytes in memory order, of a big-endian number.
                let bytes = DMA_SIGNATURE.to_be_bytes();
                let part = bytes.get(offset as usize - 4..).unwrap_or_default();
                let value = part
                    .iter()
                    .rev()
                    .fold(0, |value, byte| value << 8 | u64::from(*byte));
                value & ones(width)
            }
            _ => ones(width),
        }
    }

    fn write(&self, _: u32, offset: u64, width: u8, value: u64) {
        match (offset, width) {
            (0, 2) => self.select(&mut self.lock(), value as u16),
            // The upper half alone does nothing yet.
            (4, 4) => self.lock().dma_address = u64::from((value as u32).swap_bytes()) << 32,
            (8, 4) => {
                let low = u64::from((value as u32).swap_bytes());
                let address = std::mem::take(&mut self.lock().dma_address) | low;
                self.dma(address);
            }
            (4, 8) => self.dma(value.swap_bytes()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;

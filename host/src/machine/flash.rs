//! Firmware's memory below 4 GiB: a bootrom, and flash that keeps its variables.
//!
//! Flash takes the byte-wide command set of Intel's 28F-series (28F640 datasheet, section 4): a write is a command, and
//! until the command that shows the array again reads give status. A guest that only reads sees plain memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::{Registers, ones};
use crate::hypervisor::Vm;
use crate::hypervisor::rom::Rom;

/// What one erase command clears.
const SECTOR: u64 = 4096;

const READ_ARRAY: u8 = 0xff;
const READ_ID: u8 = 0x90;
const READ_STATUS: u8 = 0x70;
const CLEAR_STATUS: u8 = 0x50;
const ERASE: u8 = 0x20;
const ERASE_CONFIRM: u8 = 0xd0;
const PROGRAM: u8 = 0x40;
const PROGRAM_ALTERNATE: u8 = 0x10;

/// Status: ready, erase failed, program failed.
const READY: u8 = 1 << 7;
const ERASE_FAILED: u8 = 1 << 5;
const PROGRAM_FAILED: u8 = 1 << 4;

/// Manufacturer and device, as READ_ID shows them: Intel, 28F640.
const ID: [u8; 2] = [0x89, 0x17];

/// Reads as the ROM itself does where the hypervisor shows it; writes are dropped.
pub struct BootromWindow {
    rom: Arc<Rom>,
    complained: AtomicBool,
}

impl BootromWindow {
    /// A window on `rom`.
    #[must_use]
    pub fn new(rom: Arc<Rom>) -> Self {
        Self {
            rom,
            complained: AtomicBool::new(false),
        }
    }
}

impl Registers for BootromWindow {
    fn read(&self, _: u32, offset: u64, width: u8) -> u64 {
        array(&self.rom, offset, width)
    }

    fn write(&self, _: u32, offset: u64, _: u8, _: u64) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            log::debug!(
                "the guest writes to its bootrom at {:#x}: dropped, and not said again",
                self.rom.gpa().saturating_add(offset)
            );
        }
    }
}

fn array(rom: &Rom, offset: u64, width: u8) -> u64 {
    let mut bytes = [0; 8];
    rom.read(offset, &mut bytes[..usize::from(width.min(8))]);
    u64::from_le_bytes(bytes)
}

/// What reads show, and what the next write means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Array,
    Status,
    Id,
    /// The next write is data.
    Programming,
    /// The next write has to confirm.
    Erasing,
}

struct State {
    mode: Mode,
    status: u8,
    /// Sectors that differ from the file, first and end.
    dirty: Option<(u64, u64)>,
    /// What was logged: a command that there isn't, and that the file can't be written.
    unknown_told: bool,
    unkept_told: bool,
}

/// One flash chip.
pub struct Flash<V: Vm> {
    vm: Arc<V>,
    rom: Arc<Rom>,
    /// What the contents are kept in.
    file: Option<File>,
    state: Mutex<State>,
}

impl<V: Vm> Flash<V> {
    /// A chip whose contents `rom` has already; changes go to `file` as well, at the same offsets.
    #[must_use]
    pub fn new(vm: Arc<V>, rom: Arc<Rom>, file: Option<File>) -> Self {
        Self {
            vm,
            rom,
            file,
            state: Mutex::new(State {
                mode: Mode::Array,
                status: READY,
                dirty: None,
                unknown_told: false,
                unkept_told: false,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the array, as at power-on, and keeps what was changed.
    pub fn reset(&self) {
        let mut state = self.lock();
        self.enter(&mut state, Mode::Array);
        state.status = READY;
    }

    /// Waits until the file's contents are on its disk.
    pub fn sync(&self) {
        let mut state = self.lock();
        self.keep(&mut state);
        if let Some(file) = &self.file
            && let Err(error) = file.sync_data()
        {
            log::error!("firmware variables may be lost with the host's power: {error}");
        }
    }

    fn enter(&self, state: &mut State, mode: Mode) {
        let shown = |mode| mode == Mode::Array;
        if shown(state.mode) != shown(mode)
            && let Err(error) = self.vm.show_rom(&self.rom, shown(mode))
        {
            log::error!("firmware variables: {error:#}");
        }
        state.mode = mode;
        if mode == Mode::Array {
            self.keep(state);
        }
    }

    /// Writes to the file what differs from it. On the vCPU's thread, so that what firmware has been told is kept is kept even
    /// if this process is killed next; it is a few KiB into the system's cache, for a guest that sets a variable.
    fn keep(&self, state: &mut State) {
        let Some((from, to)) = state.dirty.take() else {
            return;
        };
        let Some(file) = &self.file else {
            return;
        };
        let mut bytes = vec![0; (to - from) as usize];
        self.rom.read(from, &mut bytes);
        if let Err(error) = file.write_all_at(&bytes, from) {
            state.dirty = Some((from, to));
            state.status |= PROGRAM_FAILED;
            if !std::mem::replace(&mut state.unkept_told, true) {
                log::error!(
                    "firmware variables can't be kept, and are lost when the VM ends: {error}"
                );
            }
        }
    }

    fn change(&self, state: &mut State, offset: u64, bytes: &[u8]) {
        self.rom.write(offset, bytes);
        let start = offset / SECTOR * SECTOR;
        let end = (offset + bytes.len() as u64)
            .next_multiple_of(SECTOR)
            .min(self.rom.len());
        // Two bytes far apart must not have everything between them written.
        if state
            .dirty
            .is_some_and(|(from, to)| end < from || start > to)
        {
            self.keep(state);
        }
        let (from, to) = state.dirty.unwrap_or((start, end));
        state.dirty = Some((from.min(start), to.max(end)));
    }

    fn command(&self, state: &mut State, command: u8) {
        let mode = match command {
            READ_ARRAY => Mode::Array,
            // The array shows again, but READ_STATUS is what tells flash from ROM and RAM: it gives 0 then.
            CLEAR_STATUS => {
                state.status = 0;
                Mode::Array
            }
            READ_STATUS => Mode::Status,
            READ_ID => Mode::Id,
            PROGRAM | PROGRAM_ALTERNATE => Mode::Programming,
            ERASE => Mode::Erasing,
            _ => {
                if !std::mem::replace(&mut state.unknown_told, true) {
                    log::debug!("flash: no command {command:#04x}; more of them are not logged");
                }
                Mode::Array
            }
        };
        self.enter(state, mode);
    }
}

impl<V: Vm> Registers for Flash<V> {
    fn read(&self, _: u32, offset: u64, width: u8) -> u64 {
        let state = self.lock();
        match state.mode {
            Mode::Array => array(&self.rom, offset, width),
            Mode::Id => u64::from(ID[(offset & 1) as usize]),
            Mode::Status | Mode::Programming | Mode::Erasing => {
                u64::from(state.status) & ones(width)
            }
        }
    }

    fn write(&self, _: u32, offset: u64, width: u8, value: u64) {
        let mut state = self.lock();
        match state.mode {
            Mode::Programming => {
                // Programming clears bits, and sets none.
                let width = usize::from(width.min(8));
                let mut bytes = [0; 8];
                self.rom.read(offset, &mut bytes[..width]);
                let held = u64::from_le_bytes(bytes);
                self.change(&mut state, offset, &(held & value).to_le_bytes()[..width]);
                state.status |= READY;
                state.mode = Mode::Status;
            }
            Mode::Erasing => {
                if value as u8 == ERASE_CONFIRM {
                    let start = offset / SECTOR * SECTOR;
                    self.change(&mut state, start, &[0xff; SECTOR as usize]);
                    state.status |= READY;
                } else {
                    state.status |= READY | ERASE_FAILED | PROGRAM_FAILED;
                }
                state.mode = Mode::Status;
            }
            Mode::Array | Mode::Status | Mode::Id => self.command(&mut state, value as u8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::fake_vm::FakeVm;

    const BASE: u64 = 0xffc0_0000;

    fn flash(file: Option<File>) -> (Arc<FakeVm>, Flash<FakeVm>) {
        let vm = Arc::new(FakeVm::default());
        let rom = vm.create_rom(BASE, 4 * SECTOR).unwrap();
        rom.write(0, &[0xff; 4 * SECTOR as usize]);
        rom.write(0, b"_FVH");
        (Arc::clone(&vm), Flash::new(vm, rom, file))
    }

    fn shown(vm: &FakeVm) -> bool {
        vm.seen.lock().unwrap().roms[&BASE]
    }

    /// What OVMF's driver does to find out whether it has flash.
    #[test]
    fn a_probe_finds_flash() {
        let (vm, flash) = flash(None);
        assert_eq!(flash.read(0, 0, 1), u64::from(b'_'));
        flash.write(0, 0, 1, CLEAR_STATUS.into());
        assert_ne!(flash.read(0, 0, 1), u64::from(CLEAR_STATUS), "no RAM");
        flash.write(0, 0, 1, READ_STATUS.into());
        assert_eq!(flash.read(0, 0, 1), 0, "no ROM");
        assert!(!shown(&vm));
        flash.write(0, 0, 1, READ_ARRAY.into());
        assert_eq!(flash.read(0, 0, 4), u64::from(u32::from_le_bytes(*b"_FVH")));
        assert!(shown(&vm));
    }

    #[test]
    fn programming_clears_bits_and_erasing_sets_them() {
        let (_, flash) = flash(None);
        for value in [0xf0, 0x3c] {
            flash.write(0, SECTOR + 5, 1, PROGRAM_ALTERNATE.into());
            flash.write(0, SECTOR + 5, 1, value);
            assert_eq!(flash.read(0, 0, 1), u64::from(READY));
        }
        flash.write(0, 0, 1, READ_ARRAY.into());
        assert_eq!(flash.read(0, SECTOR + 4, 4), 0xffff_30ff);
        flash.write(0, SECTOR + 9, 1, ERASE.into());
        flash.write(0, SECTOR + 9, 1, ERASE_CONFIRM.into());
        flash.write(0, 0, 1, READ_ARRAY.into());
        assert_eq!(flash.read(0, SECTOR + 4, 4), 0xffff_ffff);
        assert_eq!(flash.read(0, 0, 1), u64::from(b'_'), "its own sector only");
        flash.write(0, 0, 1, ERASE.into());
        flash.write(0, 0, 1, 0);
        assert_eq!(flash.read(0, 0, 1), 0xb0, "not confirmed");
        flash.write(0, 0, 1, READ_ARRAY.into());
        assert_eq!(flash.read(0, 0, 1), u64::from(b'_'));
    }

    #[test]
    fn changes_are_in_the_file_when_the_array_shows_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vars.fd");
        std::fs::write(&path, vec![0xff; 4 * SECTOR as usize]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let (_, flash) = flash(Some(file));
        flash.write(0, 2 * SECTOR, 1, PROGRAM.into());
        flash.write(0, 2 * SECTOR, 1, 0x12);
        flash.write(0, 0, 1, READ_ARRAY.into());
        assert_eq!(std::fs::read(&path).unwrap()[2 * SECTOR as usize], 0x12);
        // A reset in the middle of a sequence.
        flash.write(0, 3 * SECTOR, 1, PROGRAM.into());
        flash.write(0, 3 * SECTOR, 1, 0x34);
        flash.reset();
        assert_eq!(std::fs::read(&path).unwrap()[3 * SECTOR as usize], 0x34);
        assert_eq!(flash.read(0, 0, 1), u64::from(b'_'));
    }

    #[test]
    fn changes_far_apart_are_kept_one_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vars.fd");
        std::fs::write(&path, vec![0xff; 4 * SECTOR as usize]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let (_, flash) = flash(Some(file));
        for sector in [0, 3] {
            flash.write(0, sector * SECTOR, 1, PROGRAM.into());
            flash.write(0, sector * SECTOR, 1, 0);
        }
        assert_eq!(flash.lock().dirty, Some((3 * SECTOR, 4 * SECTOR)));
        assert_eq!(std::fs::read(&path).unwrap()[0], 0);
        flash.write(0, 2 * SECTOR, 1, PROGRAM.into());
        flash.write(0, 2 * SECTOR, 1, 0);
        assert_eq!(flash.lock().dirty, Some((2 * SECTOR, 4 * SECTOR)));
    }

    #[test]
    fn a_full_disk_is_told_whatever_was_told_before() {
        let Ok(full) = File::options().write(true).open("/dev/full") else {
            println!("SKIPPED: a_full_disk_is_told_whatever_was_told_before: no /dev/full here");
            return;
        };
        let (_, flash) = flash(Some(full));
        flash.write(0, 0, 1, 0x13);
        assert!(!flash.lock().unkept_told);
        flash.write(0, 0, 1, PROGRAM.into());
        flash.write(0, 0, 1, 0);
        flash.write(0, 0, 1, READ_ARRAY.into());
        assert!(flash.lock().unkept_told);
        assert!(flash.lock().dirty.is_some(), "tried again later");
    }

    #[test]
    fn random_writes_are_contained() {
        let (_, flash) = flash(None);
        let mut seed = 1_u64;
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (offset, width) = (seed >> 20 & 0x3fff, 1 << (seed >> 60 & 3));
            if seed >> 40 & 1 == 0 {
                flash.write(0, offset, width, seed >> 32);
            } else {
                flash.read(0, offset, width);
            }
        }
    }
}

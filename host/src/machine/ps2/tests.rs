use std::sync::Arc;
use std::sync::Mutex as StdMutex;

use super::*;
use crate::pci::IrqLines;
use crate::pci::fake_vm::FakeVm;

struct Board {
    vm: Arc<FakeVm>,
    ps2: Ps2<FakeVm>,
    resets: Arc<StdMutex<usize>>,
}

impl Board {
    fn new() -> Self {
        let vm = Arc::new(FakeVm::default());
        let lines = IrqLines::new(Arc::clone(&vm));
        let resets = Arc::new(StdMutex::new(0));
        let count = Arc::clone(&resets);
        let events: EventSender = Arc::new(move |event| {
            assert_eq!(event, VmEvent::Reset);
            *count.lock().unwrap() += 1;
        });
        let pin = |irq: u8| lines.pin(u32::from(irq)).unwrap();
        Self {
            ps2: Ps2::new(pin(KEYBOARD_IRQ), pin(MOUSE_IRQ), events),
            vm,
            resets,
        }
    }

    fn status(&self) -> u8 {
        self.ps2.read(REGION_COMMAND, 0, 1) as u8
    }

    fn command(&self, byte: u8) {
        self.ps2.write(REGION_COMMAND, 0, 1, byte.into());
    }

    fn data(&self, byte: u8) {
        self.ps2.write(REGION_DATA, 0, 1, byte.into());
    }

    fn mouse(&self, byte: u8) {
        self.command(0xd4);
        self.data(byte);
    }

    /// All that waits, with whether the status said that it is the mouse's. As a driver does, it gives up at some point.
    fn all(&self) -> Vec<(u8, bool)> {
        let mut all = Vec::new();
        while self.status() & OUTPUT_FULL != 0 {
            let mouse = self.status() & OUTPUT_FROM_MOUSE != 0;
            all.push((self.ps2.read(REGION_DATA, 0, 1) as u8, mouse));
            assert!(all.len() < 16, "output without end: {all:x?}");
        }
        all
    }

    fn keyboard_says(&self, command: u8) -> Vec<u8> {
        self.data(command);
        self.bytes(false)
    }

    fn mouse_says(&self, command: u8) -> Vec<u8> {
        self.mouse(command);
        self.bytes(true)
    }

    fn controller_says(&self, command: u8) -> Vec<u8> {
        self.command(command);
        self.bytes(false)
    }

    fn bytes(&self, from_mouse: bool) -> Vec<u8> {
        let all = self.all();
        assert!(all.iter().all(|byte| byte.1 == from_mouse), "{all:x?}");
        all.into_iter().map(|byte| byte.0).collect()
    }

    fn command_byte(&self) -> u8 {
        self.controller_says(0x20)[0]
    }

    fn set_command_byte(&self, byte: u8) {
        self.command(0x60);
        self.data(byte);
    }
}

/// Linux: drivers/input/serio/i8042.c, from i8042_controller_check to i8042_check_aux with its interrupt test.
#[test]
fn linux_finds_the_controller_and_its_mouse_port() {
    let board = Board::new();
    assert_eq!(board.all(), []);
    assert_ne!(board.status() & NOT_LOCKED, 0);
    let control = board.command_byte();
    assert_ne!(control & TRANSLATE, 0);
    board.set_command_byte((control | KEYBOARD_OFF) & !KEYBOARD_INTERRUPT);
    assert_eq!(board.controller_says(0xaa), [0x55]);
    // The loop test, also the one that looks for a multiplexer, which answers other bytes.
    for byte in [0x5a, 0xf0, 0x56, 0xa4] {
        board.command(0xd3);
        board.data(byte);
        assert_eq!(board.all(), [(byte, true)]);
    }
    board.command(0xa7);
    assert_ne!(board.command_byte() & MOUSE_OFF, 0);
    board.command(0xa8);
    assert_eq!(board.command_byte() & MOUSE_OFF, 0);
    // One byte in a loop has to arrive as an interrupt.
    board.set_command_byte(MOUSE_INTERRUPT | TRANSLATE | KEYBOARD_OFF);
    board.command(0xd3);
    board.data(0xa5);
    assert!(board.vm.line(MOUSE_IRQ.into()) && !board.vm.line(KEYBOARD_IRQ.into()));
    assert_eq!(board.all(), [(0xa5, true)]);
    assert!(!board.vm.line(MOUSE_IRQ.into()));
}

/// Linux: atkbd_probe and atkbd_activate with translation, then without.
#[test]
fn linux_finds_the_keyboard() {
    let board = Board::new();
    assert_eq!(board.keyboard_says(0xff), [0xfa, 0xaa]);
    assert_eq!(board.keyboard_says(0xf2), [0xfa, 0xab, 0x41]);
    assert_eq!(board.keyboard_says(0xed), [0xfa]);
    assert_eq!(board.keyboard_says(0x00), [0xfa]);
    assert_eq!(board.keyboard_says(0xf3), [0xfa]);
    assert_eq!(board.keyboard_says(0x20), [0xfa]);
    assert_eq!(board.keyboard_says(0xf4), [0xfa]);
    let plain = board.command_byte() & !TRANSLATE;
    board.set_command_byte(plain);
    assert_eq!(board.keyboard_says(0xf2), [0xfa, 0xab, 0x83]);
    assert_eq!(board.keyboard_says(0xf0), [0xfa]);
    assert_eq!(board.keyboard_says(0x03), [0xfa]);
    assert_eq!(board.keyboard_says(0xf0), [0xfa]);
    assert_eq!(board.keyboard_says(0x00), [0xfa, 0x03]);
    assert_eq!(board.keyboard_says(0xf6), [0xfa]);
    assert_eq!(board.keyboard_says(0xf0), [0xfa]);
    assert_eq!(board.keyboard_says(0x00), [0xfa, 0x02]);
}

/// OVMF: Ps2KeyboardDxe's initialisation. It reads by polling, with interrupts off.
#[test]
fn firmware_finds_the_keyboard() {
    let board = Board::new();
    board.command(0xa7);
    board.command(0xad);
    assert_eq!(board.all(), []);
    board.set_command_byte(0x67 & !KEYBOARD_INTERRUPT & !MOUSE_INTERRUPT);
    assert_eq!(board.controller_says(0xaa), [0x55]);
    assert_ne!(board.status() & SELF_TEST_PASSED, 0);
    assert_eq!(board.controller_says(0xab), [0]);
    assert_eq!(board.controller_says(0xa9), [0]);
    board.command(0xae);
    assert_eq!(board.keyboard_says(0xff), [0xfa, 0xaa]);
    assert_eq!(board.keyboard_says(0xf0), [0xfa]);
    assert_eq!(board.keyboard_says(0x02), [0xfa]);
    assert_eq!(board.keyboard_says(0xee), [0xee]);
    assert!(!board.vm.line(KEYBOARD_IRQ.into()));
}

/// Linux: psmouse_probe, the ImPS/2 knock that a plain mouse does not know, and psmouse_initialize.
#[test]
fn linux_finds_a_plain_mouse() {
    let board = Board::new();
    assert_eq!(board.mouse_says(0xf2), [0xfa, 0x00]);
    assert_eq!(board.mouse_says(0xff), [0xfa, 0xaa, 0x00]);
    for rate in [200, 100, 80] {
        assert_eq!(board.mouse_says(0xf3), [0xfa]);
        assert_eq!(board.mouse_says(rate), [0xfa]);
    }
    assert_eq!(board.mouse_says(0xf2), [0xfa, 0x00]);
    assert_eq!(board.mouse_says(0xe8), [0xfa]);
    assert_eq!(board.mouse_says(0x03), [0xfa]);
    assert_eq!(board.mouse_says(0xe7), [0xfa]);
    assert_eq!(board.mouse_says(0xf4), [0xfa]);
    assert_eq!(board.mouse_says(0xe9), [0xfa, REPORT_SCALED, 3, 80]);
    assert_eq!(board.mouse_says(0xe6), [0xfa]);
    assert_eq!(board.mouse_says(0xf0), [0xfa]);
    assert_eq!(board.mouse_says(0xe9), [0xfa, 0x60, 3, 80]);
    assert_eq!(board.mouse_says(0xeb), [0xfa, 8, 0, 0]);
    assert_eq!(board.mouse_says(0xea), [0xfa]);
    assert_eq!(board.mouse_says(0xf5), [0xfa]);
    assert_eq!(board.mouse_says(0xee), [0xfa]);
    assert_eq!(board.mouse_says(0xf4), [0xf4]);
    assert_eq!(board.mouse_says(0xec), [0xfa]);
    assert_eq!(board.mouse_says(0xf6), [0xfa]);
    assert_eq!(board.mouse_says(0xe9), [0xfa, 0, 2, 100]);
}

const REPORT_SCALED: u8 = 0x30;

#[test]
fn what_a_device_does_not_know_it_wants_again() {
    let board = Board::new();
    assert_eq!(board.keyboard_says(0x12), [0xfe]);
    assert_eq!(board.keyboard_says(0xf1), [0xfe]);
    assert_eq!(board.keyboard_says(0xf0), [0xfa]);
    assert_eq!(board.keyboard_says(0x04), [0xfe]);
    // A command where a parameter is due ends the earlier one.
    assert_eq!(board.keyboard_says(0xed), [0xfa]);
    assert_eq!(board.keyboard_says(0xee), [0xee]);
    assert_eq!(board.keyboard_says(0x07), [0xfe]);
    assert_eq!(board.keyboard_says(0xf4), [0xfa]);
    assert_eq!(board.keyboard_says(0xfe), [0xfa]);
    assert_eq!(board.mouse_says(0x12), [0xfe]);
    assert_eq!(board.mouse_says(0xe8), [0xfa]);
    assert_eq!(board.mouse_says(0x04), [0xfe]);
    assert_eq!(board.mouse_says(0xfe), [0xfe]);
}

#[test]
fn each_byte_is_an_edge_of_its_own() {
    let board = Board::new();
    board.set_command_byte(KEYBOARD_INTERRUPT);
    let before = board.vm.seen.lock().unwrap().line_changes;
    board.data(0xf2);
    assert!(board.vm.line(KEYBOARD_IRQ.into()));
    assert_eq!(board.bytes(false), [0xfa, 0xab, 0x83]);
    assert!(!board.vm.line(KEYBOARD_IRQ.into()));
    assert_eq!(board.vm.seen.lock().unwrap().line_changes - before, 6);
    // A byte that waits while interrupts are off is an interrupt when they are switched on.
    board.set_command_byte(0);
    board.data(0xee);
    assert!(!board.vm.line(KEYBOARD_IRQ.into()));
    board.set_command_byte(KEYBOARD_INTERRUPT);
    assert!(board.vm.line(KEYBOARD_IRQ.into()));
}

#[test]
fn a_device_that_is_off_waits_with_its_answer() {
    let board = Board::new();
    board.data(0xf2);
    assert_eq!(board.ps2.read(REGION_DATA, 0, 1), 0xfa);
    assert_eq!(board.ps2.read(REGION_DATA, 0, 1), 0xab);
    board.command(0xad);
    // The byte at the port stays; no further one comes.
    assert_eq!(board.all(), [(0x41, false)]);
    board.mouse(0xff);
    board.command(0xa7);
    assert_eq!(board.all(), [(0xfa, true)]);
    assert_eq!(board.controller_says(0xc0), [0x80]);
    board.command(0xa8);
    assert_eq!(board.all(), [(0xaa, true), (0, true)]);
}

#[test]
fn the_reset_line_is_pulsed_by_its_bit_alone() {
    let board = Board::new();
    let resets = || std::mem::take(&mut *board.resets.lock().unwrap());
    for command in [0xf1, 0xff, 0xfd, 0xd1] {
        board.command(command);
    }
    board.data(0xdf);
    assert_eq!(resets(), 0);
    for command in [0xfe, 0xf0] {
        board.command(command);
    }
    board.command(0xd1);
    board.data(0xde);
    assert_eq!(resets(), 3);
    assert_eq!(board.controller_says(0xd0), [3]);
}

#[test]
fn reset_is_power_on() {
    let board = Board::new();
    board.set_command_byte(MOUSE_INTERRUPT | KEYBOARD_INTERRUPT);
    board.data(0xff);
    board.mouse(0xff);
    assert!(board.vm.line(KEYBOARD_IRQ.into()));
    board.ps2.reset();
    assert!(!board.vm.line(KEYBOARD_IRQ.into()) && !board.vm.line(MOUSE_IRQ.into()));
    assert_eq!(board.all(), []);
    assert_eq!(board.status() & SELF_TEST_PASSED, 0);
    assert_eq!(
        board.command_byte(),
        KEYBOARD_INTERRUPT | MOUSE_OFF | TRANSLATE
    );
    assert_eq!(board.keyboard_says(0xf2), [0xfa, 0xab, 0x41]);
}

#[test]
fn any_garbage_is_survived_and_a_reset_mends_it() {
    let board = Board::new();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..200_000_u32 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let region = if seed & 1 == 0 {
            REGION_DATA
        } else {
            REGION_COMMAND
        };
        if seed & 6 == 0 {
            board.ps2.read(region, 0, 1);
        } else {
            board.ps2.write(region, 0, 1, seed >> 8 & 0xff);
        }
        if round.is_multiple_of(1000) {
            board.all();
            // What a driver does to get out of any state.
            board.set_command_byte(TRANSLATE);
            board.all();
            assert_eq!(board.keyboard_says(0xff), [0xfa, 0xaa]);
            assert_eq!(board.mouse_says(0xff), [0xfa, 0xaa, 0]);
        }
    }
}

//! The PS/2 controller (Intel 8042 as IBM's Technical Reference for the PS/2 programs it) with a keyboard and a mouse.
//!
//! Nobody types and nobody moves the mouse, but guests look for both, and wait long for an answer that does not come. Each side has
//! one answer outstanding at most, so nothing here grows.

mod answer;
mod keyboard;
mod mouse;

use std::sync::{Mutex, MutexGuard, PoisonError};

use self::keyboard::Keyboard;
use self::mouse::Mouse;
use super::power::{EventSender, VmEvent};
use crate::bus::Registers;
use crate::hypervisor::Vm;
use crate::pci::IrqPin;

/// Ports and their region numbers on the bus.
pub(super) const DATA_PORT: u16 = 0x60;
pub(super) const COMMAND_PORT: u16 = 0x64;
pub(super) const REGION_DATA: u32 = 0;
pub(super) const REGION_COMMAND: u32 = 1;
/// Interrupt lines of keyboard and mouse.
pub(super) const KEYBOARD_IRQ: u8 = 1;
pub(super) const MOUSE_IRQ: u8 = 12;

/// Status register.
const OUTPUT_FULL: u8 = 1 << 0;
const SELF_TEST_PASSED: u8 = 1 << 2;
const LAST_WAS_COMMAND: u8 = 1 << 3;
const NOT_LOCKED: u8 = 1 << 4;
const OUTPUT_FROM_MOUSE: u8 = 1 << 5;

/// Command byte, which is byte 0 of the controller's memory.
const KEYBOARD_INTERRUPT: u8 = 1 << 0;
const MOUSE_INTERRUPT: u8 = 1 << 1;
const SYSTEM_FLAG: u8 = 1 << 2;
const KEYBOARD_OFF: u8 = 1 << 4;
const MOUSE_OFF: u8 = 1 << 5;
const TRANSLATE: u8 = 1 << 6;

/// Output port: the CPUs' reset line (active low) and address line 20, which is always on; then what waits for whom.
const OUTPUT_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;
const OUTPUT_KEYBOARD: u8 = 1 << 4;
const OUTPUT_MOUSE: u8 = 1 << 5;
/// Input port: the keyboard is not locked.
const INPUT_PORT: u8 = 0x80;

const SELF_TEST_GOOD: u8 = 0x55;
const INTERFACE_GOOD: u8 = 0;
const NO_PASSWORD: u8 = 0xf1;

/// Whose byte the guest reads next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// The keyboard's, or the controller's own.
    Keyboard,
    Mouse,
}

/// A byte that follows a command, and what it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    Memory(u8),
    OutputPort,
    KeyboardOutput,
    MouseOutput,
    MouseCommand,
}

struct State {
    memory: [u8; 32],
    self_tested: bool,
    last_was_command: bool,
    expects: Option<Expects>,
    /// What the controller itself has to say; the next such byte replaces it.
    own: Option<(u8, From)>,
    /// The byte at the data port, and whether it has been read.
    output: u8,
    full: Option<From>,
    keyboard: Keyboard,
    mouse: Mouse,
}

impl Default for State {
    fn default() -> Self {
        let mut memory = [0; 32];
        memory[0] = KEYBOARD_INTERRUPT | MOUSE_OFF | TRANSLATE;
        Self {
            memory,
            self_tested: false,
            last_was_command: false,
            expects: None,
            own: None,
            output: 0,
            full: None,
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
        }
    }
}

/// Ports 0x60 and 0x64.
pub struct Ps2<V: Vm> {
    keyboard_pin: IrqPin<V>,
    mouse_pin: IrqPin<V>,
    events: EventSender,
    state: Mutex<State>,
}

impl<V: Vm> Ps2<V> {
    /// At power-on, with these interrupt pins.
    pub(super) fn new(keyboard_pin: IrqPin<V>, mouse_pin: IrqPin<V>, events: EventSender) -> Self {
        Self {
            keyboard_pin,
            mouse_pin,
            events,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Power-on state of the controller, the keyboard and the mouse.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        *state = State::default();
        self.drive(&state);
    }

    fn drive(&self, state: &State) {
        let wants = |from, enable| state.full == Some(from) && state.memory[0] & enable != 0;
        self.keyboard_pin
            .set(wants(From::Keyboard, KEYBOARD_INTERRUPT));
        self.mouse_pin.set(wants(From::Mouse, MOUSE_INTERRUPT));
    }
}

impl State {
    fn status(&self) -> u8 {
        let flag = |on, bit| if on { bit } else { 0 };
        NOT_LOCKED
            | flag(self.full.is_some(), OUTPUT_FULL)
            | flag(self.full == Some(From::Mouse), OUTPUT_FROM_MOUSE)
            | flag(self.last_was_command, LAST_WAS_COMMAND)
            | flag(self.self_tested, SELF_TEST_PASSED)
    }

    /// Moves the next byte to the data port, if that is free.
    fn fill(&mut self) {
        if self.full.is_some() {
            return;
        }
        let command = self.memory[0];
        let next = if let Some(own) = self.own.take() {
            Some(own)
        } else if command & KEYBOARD_OFF == 0
            && let Some(byte) = self.keyboard.take()
        {
            let translated = command & TRANSLATE != 0;
            Some((
                if translated { translate(byte) } else { byte },
                From::Keyboard,
            ))
        } else if command & MOUSE_OFF == 0 {
            self.mouse.take().map(|byte| (byte, From::Mouse))
        } else {
            None
        };
        if let Some((byte, from)) = next {
            (self.output, self.full) = (byte, Some(from));
        }
    }

    fn answer(&mut self, byte: u8) {
        self.own = Some((byte, From::Keyboard));
    }

    fn output_port(&self) -> u8 {
        OUTPUT_RESET
            | OUTPUT_A20
            | match self.full {
                Some(From::Keyboard) => OUTPUT_KEYBOARD,
                Some(From::Mouse) => OUTPUT_MOUSE,
                None => 0,
            }
    }

    /// A byte at port 0x64. Returns whether it resets the machine.
    fn command(&mut self, command: u8) -> bool {
        self.last_was_command = true;
        self.expects = None;
        match command {
            0x20..=0x3f => self.answer(self.memory[usize::from(command & 0x1f)]),
            0x60..=0x7f => self.expects = Some(Expects::Memory(command & 0x1f)),
            0xa4 => self.answer(NO_PASSWORD),
            0xa7 => self.memory[0] |= MOUSE_OFF,
            0xa8 => self.memory[0] &= !MOUSE_OFF,
            0xa9 | 0xab => self.answer(INTERFACE_GOOD),
            0xaa => {
                self.self_tested = true;
                self.memory[0] |= SYSTEM_FLAG;
                self.answer(SELF_TEST_GOOD);
            }
            0xad => self.memory[0] |= KEYBOARD_OFF,
            0xae => self.memory[0] &= !KEYBOARD_OFF,
            0xc0 => self.answer(INPUT_PORT),
            0xd0 => self.answer(self.output_port()),
            0xd1 => self.expects = Some(Expects::OutputPort),
            0xd2 => self.expects = Some(Expects::KeyboardOutput),
            0xd3 => self.expects = Some(Expects::MouseOutput),
            0xd4 => self.expects = Some(Expects::MouseCommand),
            // Test inputs: both clock lines are low while nothing is sent.
            0xe0 => self.answer(0),
            // Pulses those of output lines 0 to 3 whose bit is 0; only line 0 is wired.
            0xf0..=0xff => return command & OUTPUT_RESET == 0,
            _ => log::debug!("the PS/2 controller knows no command {command:#x}"),
        }
        false
    }

    /// A byte at port 0x60. Returns whether it resets the machine.
    fn data(&mut self, byte: u8) -> bool {
        self.last_was_command = false;
        match self.expects.take() {
            Some(Expects::Memory(0)) => {
                self.memory[0] = byte;
                self.self_tested = byte & SYSTEM_FLAG != 0;
            }
            Some(Expects::Memory(at)) => self.memory[usize::from(at)] = byte,
            Some(Expects::OutputPort) => return byte & OUTPUT_RESET == 0,
            Some(Expects::KeyboardOutput) => self.own = Some((byte, From::Keyboard)),
            Some(Expects::MouseOutput) => self.own = Some((byte, From::Mouse)),
            // To send to a device switches its clock line on.
            Some(Expects::MouseCommand) => {
                self.memory[0] &= !MOUSE_OFF;
                self.mouse.command(byte);
            }
            None => {
                self.memory[0] &= !KEYBOARD_OFF;
                self.keyboard.command(byte);
            }
        }
        false
    }
}

/// What the controller makes of a byte of scan code set 2, as far as a keyboard sends it whose keys nobody touches: its id's second
/// byte and the numbers of scan code sets. Answers from 0x85 on stay as they are.
fn translate(byte: u8) -> u8 {
    match byte {
        1 => 0x43,
        2 => 0x41,
        3 => 0x3f,
        0x83 => 0x41,
        other => other,
    }
}

impl<V: Vm> Registers for Ps2<V> {
    fn read(&self, region: u32, _: u64, _: u8) -> u64 {
        let mut state = self.lock();
        if region == REGION_COMMAND {
            return u64::from(state.status());
        }
        let byte = state.output;
        state.full = None;
        // Between two bytes the line falls, so that the second is an edge too.
        self.drive(&state);
        state.fill();
        self.drive(&state);
        u64::from(byte)
    }

    fn write(&self, region: u32, _: u64, _: u8, value: u64) {
        let mut state = self.lock();
        let reset = if region == REGION_COMMAND {
            state.command(value as u8)
        } else {
            state.data(value as u8)
        };
        state.fill();
        self.drive(&state);
        drop(state);
        if reset {
            log::debug!("the guest resets its machine by the keyboard controller");
            (self.events)(VmEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests;

//! The chipset's own devices: PS/2 controller with keyboard and mouse, and the clock's interrupts.

use crate::io::{inb, outb};
use crate::{check, clock, interrupts, skip};

const DATA: u16 = 0x60;
const COMMAND: u16 = 0x64;
const OUTPUT_FULL: u8 = 1;
const INPUT_FULL: u8 = 2;
/// Status of a board without the controller, where nothing or all ones answers.
const ABSENT: [u8; 2] = [0, 0xff];

const CLOCK: u16 = 0x70;
const CLOCK_INPUT: u8 = 8;
const REGISTER_B: u8 = 0xb;
const REGISTER_C: u8 = 0xc;
const HOURS_24: u8 = 2;

pub fn run() {
    // The controller's status has a bit that says "not locked".
    if ABSENT.contains(&inb(COMMAND)) {
        skip!("board", "no PS/2 controller");
    } else {
        ps2();
    }
    clock_interrupts();
}

fn command(byte: u8) {
    let _ = clock::wait_until(100, || inb(COMMAND) & INPUT_FULL == 0);
    outb(COMMAND, byte);
}

fn data(byte: u8) {
    let _ = clock::wait_until(100, || inb(COMMAND) & INPUT_FULL == 0);
    outb(DATA, byte);
}

/// The next byte that the controller has.
fn next() -> Option<u8> {
    clock::wait_until(1000, || inb(COMMAND) & OUTPUT_FULL != 0).then(|| inb(DATA))
}

/// Empties the output buffer, but not without end.
fn flush() {
    for _ in 0..16 {
        if inb(COMMAND) & OUTPUT_FULL == 0 {
            return;
        }
        inb(DATA);
    }
}

fn ps2() {
    command(0xad);
    command(0xa7);
    flush();
    // No interrupts, no translation.
    command(0x60);
    data(0x30);
    command(0xaa);
    let controller = next();
    command(0xae);
    data(0xff);
    let keyboard = [next(), next()];
    data(0xf2);
    let id = [next(), next(), next()];
    command(0xad);
    command(0xa8);
    command(0xd4);
    data(0xff);
    let mouse = [next(), next(), next()];
    flush();
    check!(
        controller == Some(0x55),
        "board",
        "the PS/2 controller passes its test ({controller:x?})"
    );
    check!(
        keyboard == [Some(0xfa), Some(0xaa)] && id == [Some(0xfa), Some(0xab), Some(0x83)],
        "board",
        "a keyboard answers ({keyboard:x?}, {id:x?})"
    );
    check!(
        mouse == [Some(0xfa), Some(0xaa), Some(0)],
        "board",
        "a mouse answers ({mouse:x?})"
    );
}

fn clock_write(register: u8, value: u8) {
    outb(CLOCK, register);
    outb(CLOCK + 1, value);
}

fn clock_read(register: u8) -> u8 {
    outb(CLOCK, register);
    inb(CLOCK + 1)
}

fn clock_interrupts() {
    const PERIODIC: u8 = 0x40;
    const UPDATE_ENDED: u8 = 0x10;
    clock_write(REGISTER_B, HOURS_24);
    clock_read(REGISTER_C);
    interrupts::route(CLOCK_INPUT, interrupts::CLOCK);
    let mut fired = 0;
    clock_write(REGISTER_B, HOURS_24 | PERIODIC);
    for _ in 0..5 {
        let before = interrupts::count(interrupts::CLOCK);
        // Each is the last until it has been acknowledged.
        let flags = clock_read(REGISTER_C);
        let came = flags & PERIODIC != 0 || interrupts::wait(interrupts::CLOCK, before, 500);
        fired += u32::from(came);
    }
    clock_write(REGISTER_B, HOURS_24);
    clock_read(REGISTER_C);
    let before = interrupts::count(interrupts::CLOCK);
    clock_write(REGISTER_B, HOURS_24 | UPDATE_ENDED);
    let second = interrupts::wait(interrupts::CLOCK, before, 3000);
    let flags = clock_read(REGISTER_C);
    clock_write(REGISTER_B, HOURS_24);
    interrupts::mask(CLOCK_INPUT);
    check!(
        fired == 5 && before != 0,
        "board",
        "the clock interrupts periodically ({fired} of 5)"
    );
    check!(
        second && flags & (0x80 | UPDATE_ENDED) == 0x80 | UPDATE_ENDED,
        "board",
        "the clock interrupts when a second has ended ({second}, flags {flags:#x})"
    );
}

//! Checks of the 16550A that the console itself runs on. While loopback is on nothing is printed.

use crate::io::{inb, outb};
use crate::serial::{self, COM1};
use crate::{check, clock, interrupts, skip};

const DATA: u16 = COM1;
const IER: u16 = COM1 + 1;
const IIR_FCR: u16 = COM1 + 2;
const LCR: u16 = COM1 + 3;
const MCR: u16 = COM1 + 4;
const LSR: u16 = COM1 + 5;
const MSR: u16 = COM1 + 6;
const SCR: u16 = COM1 + 7;

/// DTR, RTS, OUT2: the interrupt is connected.
const MCR_NORMAL: u8 = 0x0b;
const MCR_LOOP: u8 = 0x1b;
/// COM1's interrupt line on the I/O APIC.
const INPUT: u8 = 4;

/// Sends in loopback and gives what came back, which must be there within 50 ms.
fn echo(byte: u8) -> Option<u8> {
    outb(DATA, byte);
    clock::wait_until(50, || inb(LSR) & 1 != 0).then(|| inb(DATA))
}

fn in_loopback<T>(work: impl FnOnce() -> T) -> T {
    serial::drain();
    outb(MCR, MCR_LOOP);
    outb(IIR_FCR, 0x07);
    let result = work();
    outb(IIR_FCR, 0x07);
    outb(MCR, MCR_NORMAL);
    outb(IIR_FCR, 0x01);
    // A modem status change caused by leaving loopback is taken back.
    let _ = inb(MSR);
    result
}

/// Every check of the uart.
pub fn run() {
    registers();
    let echoed = in_loopback(|| {
        [0x00, 0x55, 0xaa, 0xff]
            .iter()
            .all(|byte| echo(*byte) == Some(*byte))
    });
    check!(echoed, "uart", "loopback returns what was sent");
    modem_lines();
    fifo();
    received_data_interrupt();
    transmitter_interrupt();
}

fn registers() {
    outb(SCR, 0x55);
    let first = inb(SCR);
    outb(SCR, 0xaa);
    check!(
        (first, inb(SCR)) == (0x55, 0xaa),
        "uart",
        "the scratch register keeps its value"
    );
    serial::drain();
    outb(LCR, 0x83);
    let (low, high) = (inb(DATA), inb(IER));
    outb(DATA, 0x0c);
    outb(IER, 0x00);
    let changed = (inb(DATA), inb(IER));
    outb(DATA, low);
    outb(IER, high);
    outb(LCR, 0x03);
    check!(
        changed == (0x0c, 0),
        "uart",
        "the divisor latch is behind DLAB (it was {low}, {high})"
    );
    check!(inb(LCR) == 0x03, "uart", "line control reads back");
    outb(IER, 0xff);
    let enabled = inb(IER);
    outb(IER, 0);
    let _ = inb(IIR_FCR);
    check!(enabled == 0x0f, "uart", "interrupt enable keeps four bits");
    check!(
        inb(IIR_FCR) & 0xc0 == 0xc0,
        "uart",
        "a FIFO is there and on (16550A)"
    );
    check!(inb(IIR_FCR) & 1 == 1, "uart", "no interrupt is pending");
    check!(inb(LSR) & 0x60 == 0x60, "uart", "the transmitter is empty");
}

fn modem_lines() {
    // DTR, RTS, OUT1, OUT2 show as DSR, CTS, RI, DCD in loopback.
    let seen = in_loopback(|| {
        outb(MCR, 0x1f);
        let all = inb(MSR) & 0xf0;
        outb(MCR, 0x10);
        (all, inb(MSR) & 0xf0)
    });
    check!(
        seen == (0xf0, 0x00),
        "uart",
        "the modem lines loop back: {:#x} and {:#x}",
        seen.0,
        seen.1
    );
}

fn fifo() {
    let (kept, order, empty) = in_loopback(|| {
        for byte in 0..16 {
            outb(DATA, 0x30 + byte);
            let _ = clock::wait_until(50, || inb(LSR) & 0x40 != 0);
        }
        let mut kept = 0;
        let mut order = true;
        while kept < 32 && inb(LSR) & 1 != 0 {
            order &= inb(DATA) == 0x30 + kept;
            kept += 1;
        }
        (kept, order, inb(LSR) & 1 == 0)
    });
    check!(
        kept == 16 && order && empty,
        "uart",
        "the receive FIFO holds {kept} bytes, in order"
    );
    let (before, overrun, after, length) = in_loopback(|| {
        let mut before = 0;
        for byte in 0..17 {
            before = inb(LSR) & 2;
            outb(DATA, byte);
            let _ = clock::wait_until(50, || inb(LSR) & 0x40 != 0 || inb(LSR) & 2 != 0);
        }
        // Reading LSR clears the overrun bit, so the polls above may have taken it.
        let overrun = inb(LSR) & 2;
        let mut length = 0;
        while length < 64 && inb(LSR) & 1 != 0 {
            let _ = inb(DATA);
            length += 1;
        }
        (before, overrun, inb(LSR) & 2, length)
    });
    check!(
        before == 0 && after == 0 && length == 16,
        "uart",
        "a 17th byte is dropped ({length} kept, overrun bit {overrun:#x} then {after:#x})"
    );
    let cleared = in_loopback(|| {
        outb(DATA, b'x');
        let _ = clock::wait_until(50, || inb(LSR) & 1 != 0);
        outb(IIR_FCR, 0x03);
        inb(LSR) & 1 == 0
    });
    check!(cleared, "uart", "resetting the receive FIFO empties it");
}

fn received_data_interrupt() {
    let (cause, after) = in_loopback(|| {
        outb(IER, 1);
        outb(DATA, b'r');
        let _ = clock::wait_until(100, || inb(LSR) & 1 != 0);
        let cause = inb(IIR_FCR) & 0x0f;
        let _ = inb(DATA);
        let after = inb(IIR_FCR) & 0x0f;
        outb(IER, 0);
        (cause, after)
    });
    // Whoever reads the cause late, since its processor was elsewhere, may see the FIFO's time-out instead (16550D, section 8.6.5).
    check!(
        matches!(cause, 0x04 | 0x0c) && after == 0x01,
        "uart",
        "received data raises cause {cause:#x}, reading it leaves {after:#x}"
    );
    // Below the trigger level the FIFO reports by its timeout (cause 0x0c).
    let cause = in_loopback(|| {
        outb(IIR_FCR, 0xc7);
        outb(IER, 1);
        outb(DATA, b't');
        let mut cause = 0;
        let _ = clock::wait_until(200, || {
            cause = inb(IIR_FCR) & 0x0f;
            cause & 1 == 0
        });
        outb(IER, 0);
        cause
    });
    check!(
        cause == 0x0c,
        "uart",
        "data below the trigger level raises cause {cause:#x} (0xc)"
    );
}

fn transmitter_interrupt() {
    let (version, inputs) = interrupts::ioapic_version();
    if inputs <= u32::from(INPUT) || inputs > 240 {
        skip!(
            "uart",
            "no I/O APIC (version {version:#x}, {inputs} inputs), so no interrupt test"
        );
        return;
    }
    check!(
        inputs >= 24,
        "ioapic",
        "version {version:#x}, {inputs} inputs"
    );
    serial::drain();
    interrupts::route(INPUT, interrupts::SERIAL);
    let before = interrupts::count(interrupts::SERIAL);
    outb(IER, 2);
    let fired = interrupts::wait(interrupts::SERIAL, before, 200);
    let cause = inb(IIR_FCR) & 0x0f;
    let again = inb(IIR_FCR) & 0x0f;
    outb(IER, 0);
    check!(
        fired,
        "uart",
        "an empty transmitter interrupts through I/O APIC input {INPUT}"
    );
    check!(
        cause == 2 && again == 1,
        "uart",
        "its cause is {cause:#x} and reading that clears it ({again:#x})"
    );
    let before = interrupts::count(interrupts::SERIAL);
    outb(IER, 2);
    let _ = interrupts::wait(interrupts::SERIAL, before, 200);
    let _ = inb(IIR_FCR);
    let before = interrupts::count(interrupts::SERIAL);
    outb(DATA, b'.');
    let fired = interrupts::wait(interrupts::SERIAL, before, 200);
    outb(IER, 0);
    interrupts::mask(INPUT);
    serial::send(b"\r\n");
    check!(fired, "uart", "and again after a byte was sent");
}

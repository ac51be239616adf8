//! COM1 as the console, and the record of checks.

use crate::io::{inb, outb};
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU32, Ordering};

/// COM1.
pub const COM1: u16 = 0x3f8;
const FIFO: usize = 16;

static PASSED: AtomicU32 = AtomicU32::new(0);
static FAILED: AtomicU32 = AtomicU32::new(0);

/// 115200 8n1, FIFO on, no interrupts.
pub fn init() {
    outb(COM1 + 3, 0x80);
    outb(COM1, 1);
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 0x03);
    outb(COM1 + 2, 0x01);
    outb(COM1 + 4, 0x0b);
}

/// Sends bytes, a FIFO full at a time.
pub fn send(bytes: &[u8]) {
    for burst in bytes.chunks(FIFO) {
        while inb(COM1 + 5) & 0x20 == 0 {
            core::hint::spin_loop();
        }
        for byte in burst {
            outb(COM1, *byte);
        }
    }
}

/// Waits until everything sent has left the transmitter.
pub fn drain() {
    while inb(COM1 + 5) & 0x60 != 0x60 {
        core::hint::spin_loop();
    }
}

/// The next byte received, if there is one.
pub fn receive() -> Option<u8> {
    (inb(COM1 + 5) & 1 != 0).then(|| inb(COM1))
}

/// Collects a line, so that it goes out in whole bursts.
struct Line {
    bytes: [u8; 160],
    length: usize,
}

impl Line {
    fn flush(&mut self) {
        send(&self.bytes[..self.length]);
        self.length = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.length == self.bytes.len() {
                self.flush();
            }
            self.bytes[self.length] = byte;
            self.length += 1;
        }
        Ok(())
    }
}

/// Sends a line. Use `println!`.
pub fn print_line(text: fmt::Arguments) {
    let mut line = Line {
        bytes: [0; 160],
        length: 0,
    };
    // Writing to a `Line` can't fail, and there is nowhere to report it if a formatter does.
    let _ = line.write_fmt(text);
    let _ = line.write_str("\r\n");
    line.flush();
}

/// Records a check and says its line. Use `check!`.
pub fn record(passed: bool, area: &str, text: fmt::Arguments) -> bool {
    if passed {
        PASSED.fetch_add(1, Ordering::Relaxed);
        print_line(format_args!("ok   {area}: {text}"));
    } else {
        FAILED.fetch_add(1, Ordering::Relaxed);
        print_line(format_args!("FAIL {area}: {text}"));
    }
    passed
}

/// Checks that passed, checks that failed.
pub fn totals() -> (u32, u32) {
    (
        PASSED.load(Ordering::Relaxed),
        FAILED.load(Ordering::Relaxed),
    )
}

/// Sends one formatted line.
#[macro_export]
macro_rules! println {
    ($($text:tt)*) => { $crate::serial::print_line(format_args!($($text)*)) };
}

/// `check!(condition, "area", "text {}", ...)`: one recorded line; its value is the condition.
#[macro_export]
macro_rules! check {
    ($condition:expr, $area:expr, $($text:tt)*) => {
        $crate::serial::record($condition, $area, format_args!($($text)*))
    };
}

/// `skip!("area", "why ...")`: says what is not checked and why.
#[macro_export]
macro_rules! skip {
    ($area:expr, $($text:tt)*) => {
        $crate::serial::print_line(format_args!("skip {}: {}", $area, format_args!($($text)*)))
    };
}

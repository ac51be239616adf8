//! What the command line asks for.

use crate::io::{inb, read64, write8, write64};
use crate::memory::{self, CommandLine};
use crate::serial::{self, print_line};
use crate::{
    acpi, block, block_checks, board, check, clock, cpuid, hammer, interrupts, io, pci, power,
    println, skip, uart,
};

/// Where `reboot-once` leaves its mark: battery-backed memory, for a reset may clear RAM.
const CMOS_ADDRESS: u8 = 0x70;
const CMOS_MARK: u8 = 0x5a;
/// Written to test memory.
const MARK: u64 = 0x7365_6c66_7465_7374;
/// An address in the PCI window where no BAR is.
const NO_DEVICE: u64 = 0xdfff_f000;
/// A port nobody has.
const NO_PORT: u16 = 0x1e5;

/// Does it; never comes back.
pub fn run(line: &CommandLine) -> ! {
    acpi::set_up();
    let mode = line
        .words()
        .find_map(|word| word.strip_prefix("mode="))
        .unwrap_or("hello");
    match mode {
        "hello" => hello(line),
        "poweroff" => power::off(),
        "reboot" => power::reset(),
        "reboot-ps2" => power::reset_by_keyboard_controller(),
        "reboot-port92" => power::reset_by_control_port(),
        "reboot-once" => reboot_once(),
        "triple-fault" => {
            serial::drain();
            interrupts::triple_fault()
        }
        "halt" => {
            serial::drain();
            interrupts::halt_forever()
        }
        "hang" => hang(),
        "bad-jump" => bad_jump(),
        "panic" => panic!("asked to"),
        "echo" => echo(),
        "sum-input" => sum_input(),
        "flood" => flood(line.number("bytes", 1 << 20)),
        "wait-power-button" => wait_power_button(),
        "wait-nmi" => wait_nmi(),
        "pvpanic" => pvpanic(),
        "hammer" => hammer::run(line.number("count", 20_000)),
        "bench-exits" => bench_exits(line.number("count", 10_000)),
        "journal" => block::journal(),
        "fill" => block::fill(),
        "watch" => block::watch(),
        other => {
            check!(false, "mode", "{other:?} is not a mode of this guest");
            power::reset()
        }
    }
}

/// Every check, or those of `checks=a,b`; then power off, or reset if one failed.
fn hello(line: &CommandLine) -> ! {
    let only = line.value("checks");
    let areas: [(&str, fn()); 7] = [
        ("machine", machine),
        ("cpuid", cpuid::run),
        ("acpi", acpi::run),
        ("pci", pci::run),
        ("board", board::run),
        ("uart", uart::run),
        ("block", block_checks::run),
    ];
    if let Some(only) = only {
        for name in only.split(',') {
            check!(
                areas.iter().any(|(area, _)| *area == name),
                "mode",
                "there are checks named {name:?}"
            );
        }
    }
    for (name, area) in areas {
        if only.is_none_or(|only| only.split(',').any(|word| word == name)) {
            area();
        }
    }
    match serial::totals() {
        (passed, 0) => {
            println!("PASS {passed} checks");
            power::off()
        }
        (passed, failed) => {
            println!("FAIL {failed} of {} checks", passed + failed);
            power::reset()
        }
    }
}

/// What the boot protocol promises, and what answers when nobody does.
fn machine() {
    let mut ram = 0;
    let mut top = 0;
    for (start, length, kind) in memory::e820() {
        if kind == 1 {
            ram += length;
            if start + length <= 0xc000_0000 {
                top = top.max(start + length);
            }
        }
    }
    if memory::zero_page() == 0 {
        skip!(
            "machine",
            "no boot_params: neither a memory map nor our own board"
        );
    } else {
        check!(
            memory::boot_flag() == 0xaa55 && memory::header_magic() == 0x5372_6448,
            "machine",
            "boot_params has a setup header"
        );
        check!(
            top >= 16 << 20,
            "machine",
            "{} MiB of memory, below 3 GiB up to {top:#x}",
            ram >> 20
        );
        for (start, length, _) in
            memory::e820().filter(|(start, _, kind)| *kind == 1 && *start >= 1 << 20)
        {
            let end = start + length;
            let last = memory::map((end & !7) - 8);
            let old = read64(last);
            write64(last, MARK);
            check!(
                read64(last) == MARK,
                "machine",
                "the last bytes of the memory up to {end:#x} can be written"
            );
            write64(last, old);
        }
        nobody();
    }
    timers();
    check!(
        io::tsc() < io::tsc(),
        "machine",
        "the time stamp counter moves; APIC id {}",
        interrupts::apic_id()
    );
}

/// The interval timer and the clock that every PC has.
fn timers() {
    // Channel 2, mode 0, 10 ms; its gate and output are bits of port 0x61.
    let gate = inb(0x61) & !3;
    io::outb(0x61, gate | 1);
    io::outb(0x43, 0xb0);
    io::outb(0x42, (11932 & 0xff) as u8);
    io::outb(0x42, (11932 >> 8) as u8);
    let early = inb(0x61) & 0x20 != 0;
    let ended = clock::wait_until(500, || inb(0x61) & 0x20 != 0);
    io::outb(0x61, gate);
    check!(
        !early && ended,
        "machine",
        "the interval timer counts (early {early}, ended {ended})"
    );
    let read = |register: u8| {
        io::outb(0x70, register);
        inb(0x71)
    };
    // While an update is in progress (register 0x0a, bit 7) the others may change.
    let _ = clock::wait_until(100, || read(0x0a) & 0x80 == 0);
    let (day, month, year, mode) = (read(7), read(8), read(9), read(0x0b));
    let plain = |value: u8| {
        if mode & 4 != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 15)
        }
    };
    check!(
        (1..=31).contains(&plain(day)) && (1..=12).contains(&plain(month)) && plain(year) <= 99,
        "machine",
        "the clock has a date: year {}, month {}, day {}",
        plain(year),
        plain(month),
        plain(day)
    );
}

/// Reads as ones are a promise of our board; others answer with zeros.
fn nobody() {
    check!(
        inb(NO_PORT) == 0xff && io::inl(NO_PORT) == !0,
        "machine",
        "a port nobody has reads as ones"
    );
    io::outb(NO_PORT, 0);
    check!(
        read64(NO_DEVICE) == !0,
        "machine",
        "an address nobody has reads as ones"
    );
    write8(NO_DEVICE, 0);
}

fn reboot_once() -> ! {
    io::outb(0x70, CMOS_ADDRESS);
    if inb(0x71) == CMOS_MARK {
        io::outb(0x71, 0);
        println!("second boot");
        power::off()
    }
    io::outb(0x71, CMOS_MARK);
    println!("first boot");
    power::reset()
}

fn hang() -> ! {
    println!("hanging");
    loop {
        core::hint::spin_loop();
    }
}

/// Runs code from an address where nothing is, which no hypervisor can carry out.
fn bad_jump() -> ! {
    println!("jumping to {NO_DEVICE:#x}");
    serial::drain();
    // SAFETY: it is meant to fail, and this program is over in any case.
    let nowhere: extern "C" fn() -> ! = unsafe { core::mem::transmute(NO_DEVICE) };
    nowhere()
}

/// Sends every line back until one is "quit".
fn echo() -> ! {
    println!("ready");
    let mut line = [0u8; 256];
    let mut length = 0;
    loop {
        let Some(byte) = serial::receive() else {
            continue;
        };
        if byte == b'\r' || byte == b'\n' {
            if &line[..length] == b"quit" {
                println!("bye");
                power::off()
            }
            print_line(format_args!(
                "echo {}",
                core::str::from_utf8(&line[..length]).unwrap_or("(not UTF-8)")
            ));
            length = 0;
        } else if length < line.len() {
            line[length] = byte;
            length += 1;
        }
    }
}

/// Counts and sums input up to a byte 4 (end of transmission), for the test of a large paste.
fn sum_input() -> ! {
    println!("ready");
    let (mut count, mut sum) = (0u64, 0u32);
    loop {
        let Some(byte) = serial::receive() else {
            continue;
        };
        if byte == 4 {
            println!("received {count} bytes, sum {sum:#010x}");
            power::off()
        }
        count += 1;
        sum = sum.rotate_left(1) ^ u32::from(byte);
    }
}

/// Sends numbered lines until at least so many bytes have gone out.
fn flood(bytes: u64) -> ! {
    let (mut sent, mut number) = (0, 0u64);
    while sent < bytes {
        println!("line {number:010} abcdefghijklmnopqrstuvwxyz0123456789");
        sent += 54;
        number += 1;
    }
    println!("end after {number} lines");
    power::off()
}

fn wait_power_button() -> ! {
    power::enable_button();
    println!("waiting");
    while !power::button_pressed() {
        clock::sleep(1);
    }
    power::acknowledge_button();
    let cleared = !power::button_pressed();
    check!(
        cleared,
        "power",
        "the button was pressed, and acknowledging it clears its status"
    );
    power::off()
}

fn wait_nmi() -> ! {
    interrupts::expect_nmi();
    println!("waiting");
    loop {
        core::hint::spin_loop();
    }
}

/// Says by the pvpanic port that it has panicked, and goes on as long as it may.
fn pvpanic() -> ! {
    const PORT: u16 = 0x505;
    println!("the port reads {:#x}", inb(PORT));
    serial::drain();
    io::outb(PORT, 1);
    clock::sleep(100);
    println!("still here");
    power::off()
}

/// Port accesses that the host has to answer, timed by the time stamp counter.
fn bench_exits(count: u64) -> ! {
    for (name, port) in [("uart scratch", serial::COM1 + 7), ("no device", NO_PORT)] {
        let start = io::tsc();
        for _ in 0..count {
            let _ = inb(port);
        }
        println!(
            "bench {name}: {} cycles for each of {count} reads",
            (io::tsc() - start) / count.max(1)
        );
    }
    power::off()
}

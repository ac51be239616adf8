//! A freestanding guest that tests the machine it runs on, from the inside.
//!
//! It is entered as a Linux kernel would be (64-bit boot protocol, or PVH), goes to ring 3 at
//! once (`boot.s` says why) and does what its command line asks: by default every check, one
//! line each on COM1, then power off if all passed or reset if one failed.

#![no_std]
#![no_main]

mod acpi;
mod block;
mod block_checks;
mod block_faults;
mod block_transport;
mod block_writes;
mod board;
mod clock;
mod cpuid;
mod hammer;
mod interrupts;
mod io;
mod memory;
mod modes;
mod pci;
mod power;
mod serial;
mod uart;
mod virtio;
mod virtqueue;

use core::arch::global_asm;
use core::panic::PanicInfo;

global_asm!(include_str!("boot.s"));

/// First code in ring 3.
#[unsafe(no_mangle)]
extern "C" fn ring3_main() -> ! {
    memory::clear_bss();
    serial::init();
    // `boot.s` has sent the first letter.
    println!("mm-selftest {}", env!("SELFTEST_VERSION"));
    interrupts::init();
    modes::run(&memory::command_line())
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    println!("FAIL panic: {info}");
    power::reset()
}

/// The precompiled core library names it; nothing here unwinds.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

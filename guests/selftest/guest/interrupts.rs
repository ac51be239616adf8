//! Vectors, the local APIC and the I/O APIC.

use crate::io::{read8, read32, write8, write32, write64};
use crate::{clock, power, println};
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// Vectors 32..64 count; these are their uses.
pub const FIRST: u8 = 32;
/// The queue vectors of the virtio device under test, one after the other.
pub const QUEUE: u8 = FIRST;
/// The configuration vector of the virtio device under test.
pub const CONFIG: u8 = FIRST + 16;
/// COM1 through the I/O APIC.
pub const SERIAL: u8 = FIRST + 17;
/// PCI interrupt lines through the I/O APIC.
pub const INTX: u8 = FIRST + 18;
/// The CMOS clock through the I/O APIC.
pub const CLOCK: u8 = FIRST + 19;
/// The vector of a non-maskable interrupt.
const NMI: u64 = 2;
const SPURIOUS: u8 = FIRST + 31;

const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;

unsafe extern "C" {
    static exception_stubs: u8;
    static interrupt_stubs: u8;
    static idt: u64;
    static interrupt_counts: [AtomicU32; 32];
    static exception_vector: AtomicU64;
    static exception_error: AtomicU64;
    static exception_rip: AtomicU64;
    static exception_address: AtomicU64;
    static halt_requested: AtomicU8;
}

fn gate(vector: u64, handler: u64) {
    let table = (&raw const idt) as u64 + vector * 16;
    // 64-bit interrupt gate, present, DPL 0, selector 0x08 (Intel SDM volume 3, 6.14.1).
    write64(
        table,
        handler & 0xffff | 0x08 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48,
    );
    write64(table + 8, handler >> 32);
}

/// Fills the vector table and turns the local APIC on.
pub fn init() {
    let (exceptions, interrupts) = (
        &raw const exception_stubs as u64,
        &raw const interrupt_stubs as u64,
    );
    for n in 0..32 {
        gate(n, exceptions + n * 16);
        gate(32 + n, interrupts + n * 32);
    }
    write32(LAPIC + 0xf0, 0x100 | u32::from(SPURIOUS));
    write32(LAPIC + 0x80, 0);
}

/// This processor's APIC id.
pub fn apic_id() -> u32 {
    read32(LAPIC + 0x20) >> 24
}

/// How often a vector has fired.
pub fn count(vector: u8) -> u32 {
    // SAFETY: `boot.s` defines 32 aligned counters; the handler adds to them with one instruction.
    unsafe { interrupt_counts[usize::from(vector - FIRST)].load(Ordering::SeqCst) }
}

/// Waits up to the given milliseconds until the vector has fired more often than `before`.
pub fn wait(vector: u8, before: u32, milliseconds: u64) -> bool {
    clock::wait_until(milliseconds, || count(vector) != before)
}

fn ioapic_read(register: u8) -> u32 {
    write8(IOAPIC, register);
    read32(IOAPIC + 0x10)
}

fn ioapic_write(register: u8, value: u32) {
    write8(IOAPIC, register);
    write32(IOAPIC + 0x10, value);
}

/// Version and number of inputs of the I/O APIC.
pub fn ioapic_version() -> (u8, u32) {
    let version = ioapic_read(1);
    (version as u8, (version >> 16 & 0xff) + 1)
}

/// Routes an I/O APIC input to a vector of this processor, edge triggered, active high.
pub fn route(input: u8, vector: u8) {
    ioapic_write(0x11 + input * 2, apic_id() << 24);
    ioapic_write(0x10 + input * 2, u32::from(vector));
}

/// Masks an I/O APIC input.
pub fn mask(input: u8) {
    ioapic_write(0x10 + input * 2, 1 << 16);
}

/// Stops the processor with interrupts off. `hlt` is refused in ring 3, and the handler of that
/// refusal, which runs in ring 0, halts when it finds the request.
pub fn halt_forever() -> ! {
    // SAFETY: the variable lives in `boot.s`; the instruction raises #GP, whose handler does not
    // return once the request is set.
    unsafe {
        halt_requested.store(1, Ordering::SeqCst);
        loop {
            core::arch::asm!("hlt", options(nomem, nostack));
        }
    }
}

/// Shuts the processor down: with an empty vector table an exception can't be delivered, nor can
/// the double fault that follows.
pub fn triple_fault() -> ! {
    for vector in 0..64 {
        let table = (&raw const idt) as u64 + vector * 16;
        write64(table, 0);
    }
    loop {
        // SAFETY: raises #UD.
        unsafe { core::arch::asm!("ud2", options(nomem, nostack)) };
    }
}

/// From now on a non-maskable interrupt is what this guest waits for.
static NMI_EXPECTED: AtomicU8 = AtomicU8::new(0);

/// A non-maskable interrupt, which comes to where all exceptions come, ends this guest well from now on.
pub fn expect_nmi() {
    NMI_EXPECTED.store(1, Ordering::SeqCst);
}

/// Where `boot.s` continues after an exception.
#[unsafe(no_mangle)]
extern "C" fn ring3_exception() -> ! {
    // SAFETY: written by `boot.s` before it came here.
    let (vector, error, rip, address) = unsafe {
        (
            exception_vector.load(Ordering::SeqCst),
            exception_error.load(Ordering::SeqCst),
            exception_rip.load(Ordering::SeqCst),
            exception_address.load(Ordering::SeqCst),
        )
    };
    if vector == NMI && NMI_EXPECTED.load(Ordering::SeqCst) != 0 {
        println!("a non-maskable interrupt came");
        power::off()
    }
    let code = [read8(rip), read8(rip + 1), read8(rip + 2), read8(rip + 3)];
    println!(
        "FAIL exception: vector {vector} error {error:#x} at {rip:#x} ({code:02x?}), cr2 {address:#x}"
    );
    power::reset()
}

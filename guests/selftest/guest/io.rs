//! Ports, registers and memory by address.
//!
//! The functions are safe to call although no compiler can check an address: this program owns
//! the whole machine, nothing else runs on it, and a wrong access ends in a reported exception.

use core::arch::asm;
use core::ptr;

macro_rules! port {
    ($read:ident, $write:ident, $type:ty, $reg:tt) => {
        /// Reads a port.
        pub fn $read(port: u16) -> $type {
            let value: $type;
            // SAFETY: port input touches no memory of this program.
            unsafe { asm!(concat!("in ", $reg, ", dx"), in("dx") port, out($reg) value, options(nomem, nostack, preserves_flags)) };
            value
        }
        /// Writes a port.
        pub fn $write(port: u16, value: $type) {
            // SAFETY: port output touches no memory of this program by itself; devices that are
            // told to do so get addresses from the DMA pool only.
            unsafe { asm!(concat!("out dx, ", $reg), in("dx") port, in($reg) value, options(nostack, preserves_flags)) };
        }
    };
}
port!(inb, outb, u8, "al");
port!(inw, outw, u16, "ax");
port!(inl, outl, u32, "eax");

macro_rules! mmio {
    ($read:ident, $write:ident, $type:ty) => {
        /// Reads memory or a device register in one access.
        pub fn $read(address: u64) -> $type {
            // SAFETY: one plain load, the compiler can neither split nor drop it; see the top of
            // this file for the address.
            unsafe { ptr::read_volatile(address as *const $type) }
        }
        /// Writes memory or a device register in one access.
        pub fn $write(address: u64, value: $type) {
            // SAFETY: as for the read; addresses are device registers or the DMA pool.
            unsafe { ptr::write_volatile(address as *mut $type, value) }
        }
    };
}
mmio!(read8, write8, u8);
mmio!(read16, write16, u16);
mmio!(read32, write32, u32);
mmio!(read64, write64, u64);

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// All earlier writes are seen by the device before any later access.
pub fn fence() {
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}

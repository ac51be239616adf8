//! What a guest's first CPU finds when it starts: firmware at its reset vector ([`Firmware`]), or a kernel in memory and a
//! CPU state to enter it with.
//!
//! Direct boot plays firmware and boot loader at once. It takes a Linux bzImage, or any ELF file that is entered in
//! 64-bit mode: a Linux vmlinux, or a freestanding program. All of them start by Linux's 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst): flat segments, low memory mapped one to one, interrupts off, `rsi` at the zero page.

mod bootrom;
mod bzimage;
mod elf;
mod entry;
mod image;
mod linux;
mod path;
#[cfg(test)]
mod tests;

pub use bootrom::{BOOTROM_MAX, Files, Firmware};
pub use entry::Entry;
pub use image::Image;
pub use linux::{DirectBoot, Placed, place, prepare};
pub use path::{directory_of, open_regular};

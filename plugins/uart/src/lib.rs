//! 16550A serial port: the PC's COM1 to COM4.
//!
//! `registers::Registers` is the chip without its surroundings, `device::Uart` wires it to ports, interrupt pin and character backend.
//! The chip follows the PC16550D data sheet (National Semiconductor, June 1995), cited in comments as "PC16550D".

mod device;
mod fifo;
mod registers;
mod state;

use device::Uart;

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: { "lpc-uart" => Uart },
    blocks: {},
    chars: {},
}

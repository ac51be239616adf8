//! The self-test guest: a freestanding program that tests the virtual machine it runs in.
//!
//! `guest/main.rs` says what it does, [`MODES`] what its command line may ask for.

/// The guest as an ELF image, linked at 1 MiB. It is entered by the Linux 64-bit boot protocol
/// at its entry point, or by PVH through its note.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/selftest.elf"));

/// The modes that `mode=NAME` on the command line selects. `hello`, the default, runs the checks
/// (`checks=machine,acpi,pci,board,uart,block` for some of them), powers off if all passed and resets
/// through port 0xcf9 if one failed.
pub const MODES: &[&str] = &[
    "hello",
    "poweroff",
    "reboot",
    "reboot-ps2",
    "reboot-port92",
    "reboot-once",
    "triple-fault",
    "halt",
    "hang",
    "bad-jump",
    "panic",
    "echo",
    "sum-input",
    "flood",
    "wait-power-button",
    "wait-nmi",
    "pvpanic",
    "bench-exits",
    "journal",
    "fill",
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The image's header as a loader reads it.
    #[test]
    fn image_is_an_elf_file_linked_where_loaders_put_it() {
        assert_eq!(IMAGE[..5], *b"\x7fELF\x02");
        let machine = u16::from_le_bytes([IMAGE[18], IMAGE[19]]);
        assert_eq!(machine, 62, "EM_X86_64");
        let entry = u64::from_le_bytes(IMAGE[24..32].try_into().unwrap());
        assert!((0x10_0000..0x20_0000).contains(&entry), "entry {entry:#x}");
    }

    /// The list above is what the guest's own match accepts.
    #[test]
    fn modes_are_those_of_the_guest() {
        let source = include_str!("../guest/modes.rs");
        for mode in MODES {
            assert!(source.contains(&format!("\"{mode}\" =>")), "{mode}");
        }
    }
}

use std::io::Write;
use std::path::Path;

use super::*;
use crate::hypervisor::tests::{cores, vm};
use crate::hypervisor::{Exit, ExitHandler, Kick, Vcpu, Vm};
use crate::machine::e820::{E820Entry, E820Kind};
use crate::memory::GuestMemory;

const MIB: u64 = 1 << 20;

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn open(bytes: &[u8]) -> Image {
    Image::open("kernel", file(bytes).path()).unwrap()
}

/// As the host does it, in one go.
fn load(
    memory: &GuestMemory,
    kernel: &Image,
    initrd: Option<&Image>,
    boot: &DirectBoot<'_>,
) -> anyhow::Result<Entry> {
    let placed = place(memory, kernel, initrd, boot.used)?;
    prepare(memory, &placed, boot)
}

fn boot(cmdline: &str) -> DirectBoot<'_> {
    DirectBoot {
        cmdline,
        e820: &[],
        rsdp: 0xe_0000,
        address_bits: 40,
        used: false,
    }
}

fn refusal(kernel: &Image, initrd: Option<&Image>, cmdline: &str) -> String {
    let memory = GuestMemory::new(8 * MIB).unwrap();
    format!(
        "{:#}",
        load(&memory, kernel, initrd, &boot(cmdline)).unwrap_err()
    )
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A 64-bit ELF program: `code` at `address`, with `size` bytes in memory.
fn elf(code: &[u8], address: u64, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; 0x78 + code.len()];
    put(&mut bytes, 0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(&mut bytes, 0x10, &[2, 0, 62, 0, 1]);
    put(&mut bytes, 0x18, &address.to_le_bytes());
    put(&mut bytes, 0x20, &0x40u64.to_le_bytes());
    put(&mut bytes, 0x34, &[0x40, 0, 0x38, 0, 1, 0]);
    put(&mut bytes, 0x40, &[1, 0, 0, 0, 7, 0, 0, 0]);
    put(&mut bytes, 0x48, &0x78u64.to_le_bytes());
    put(&mut bytes, 0x50, &address.to_le_bytes());
    put(&mut bytes, 0x58, &address.to_le_bytes());
    put(&mut bytes, 0x60, &(code.len() as u64).to_le_bytes());
    put(&mut bytes, 0x68, &size.to_le_bytes());
    put(&mut bytes, 0x78, code);
    bytes
}

/// A bzImage with one setup sector and `payload` as its kernel, to be loaded at 2 MiB.
fn bzimage(payload: &[u8], init_size: u32) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    bytes[0x1f1] = 1;
    put(&mut bytes, 0x201, &[0x6a]);
    put(&mut bytes, 0x202, b"HdrS");
    put(&mut bytes, 0x206, &0x20fu16.to_le_bytes());
    bytes[0x211] = 1;
    put(&mut bytes, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut bytes, 0x236, &1u16.to_le_bytes());
    put(&mut bytes, 0x238, &255u32.to_le_bytes());
    put(&mut bytes, 0x258, &(2 * MIB).to_le_bytes());
    put(&mut bytes, 0x260, &init_size.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

#[test]
fn what_is_no_kernel_is_named() {
    let cases: [(&[u8], &str); 9] = [
        (b"\x1f\x8b\x08\x00rest", "gzip: unpack it with gunzip"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (b"MZ......", "EFI or Windows program"),
        (b"#!/bin/sh\necho hello\n", "a text file"),
        (b"070701abcdef", "cpio archive"),
        (b"\x01\x02\x03", "neither a bzImage nor an ELF header"),
        (&elf(&[0xf4], 2 * MIB, 1)[..0x50], "Cannot read kernel"),
        (b"\x7fELF\x01\x01\x01", "32-bit ELF"),
        (&bzimage(b"", 0), "ends before its kernel"),
    ];
    for (bytes, expected) in cases {
        let text = refusal(&open(bytes), None, "");
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("kernel /"), "{text}");
    }
    let mut foreign = elf(&[0xf4], 2 * MIB, 1);
    foreign[0x12] = 183;
    assert!(refusal(&open(&foreign), None, "").contains("another CPU"));
}

#[test]
fn files_that_cannot_be_loaded_are_named() {
    let refusal = |role, path: &Path| format!("{:#}", Image::open(role, path).unwrap_err());
    let text = refusal("initrd", Path::new("/nonexistent/initrd.img"));
    let missing = "Cannot load the initrd: Cannot read /nonexistent/initrd.img: No such file";
    assert!(text.contains(missing), "{text}");
    let empty = file(b"");
    let text = refusal("kernel", empty.path());
    let named = format!("kernel {}: it is empty", empty.path().display());
    assert!(text.contains(&named), "{text}");
    let text = refusal("kernel", Path::new("/"));
    assert_eq!(text, "Cannot load the kernel: / is not a regular file");
}

#[test]
fn what_does_not_fit_is_refused() {
    let kernel = open(&elf(&[0xf4], 2 * MIB, MIB));
    let large = open(&elf(&[0xf4], 2 * MIB, 7 * MIB));
    assert!(refusal(&large, None, "").contains("memory ends at 0x800000: raise [main] memory"));
    assert!(refusal(&open(&elf(&[0xf4], 0x7000, 1)), None, "").contains("wants memory at 0x7000"));
    assert!(
        refusal(&open(&bzimage(b"x", 7 << 20)), None, "").contains("from 0x200000 to 0x900000")
    );
    let initrd = open(&vec![1; 6 * MIB as usize]);
    let text = refusal(&kernel, Some(&initrd), "");
    assert!(
        text.contains("6291456 bytes don't fit between the kernel's end at 0x300000 and 0x800000"),
        "{text}"
    );
    assert!(
        refusal(&kernel, None, &"x".repeat(2048))
            .contains("2048 bytes, and this kernel takes at most 2047")
    );
    assert!(refusal(&kernel, None, "a\0b").contains("NUL"));
    assert!(refusal(&open(&bzimage(b"x", 1)), None, &"x".repeat(256)).contains("at most 255"));
}

#[test]
fn a_bzimage_gets_its_initrd_and_zero_page() {
    let memory = GuestMemory::new(8 * MIB).unwrap();
    let (kernel, initrd) = (open(&bzimage(b"kernel code", MIB as u32)), open(&[7; 5000]));
    let map = [E820Entry {
        start: 0,
        len: 8 * MIB,
        kind: E820Kind::Ram,
    }];
    let entry = load(
        &memory,
        &kernel,
        Some(&initrd),
        &DirectBoot {
            e820: &map,
            ..boot("quiet")
        },
    )
    .unwrap();
    assert_eq!(entry.address(), 2 * MIB + 0x200);
    let mut code = [0; 11];
    memory.read(2 * MIB, &mut code).unwrap();
    assert_eq!(&code, b"kernel code");
    let page = 0x7000;
    assert_eq!(memory.read_object::<u64>(page + 0x70).unwrap(), 0xe_0000);
    assert_eq!(memory.read_object::<u8>(page + 0x210).unwrap(), 0xff);
    let (at, size): (u32, u32) = (
        memory.read_object(page + 0x218).unwrap(),
        memory.read_object(page + 0x21c).unwrap(),
    );
    assert_eq!((u64::from(at), size), (8 * MIB - 0x2000, 5000));
    assert_eq!(memory.read_object::<u8>(u64::from(at) + 4999).unwrap(), 7);
    let cmdline: u32 = memory.read_object(page + 0x228).unwrap();
    let mut text = [0; 6];
    memory.read(cmdline.into(), &mut text).unwrap();
    assert_eq!(&text, b"quiet\0");
    assert_eq!(memory.read_object::<u8>(page + 0x1e8).unwrap(), 1);
    assert_eq!(
        memory.read_object::<u64>(page + 0x2d0 + 8).unwrap(),
        8 * MIB
    );
    assert_eq!(memory.read_object::<u32>(page + 0x2d0 + 16).unwrap(), 1);
}

/// Records port writes and ends at port 0x81.
struct Ports(Vec<(u16, u32)>, std::sync::Arc<dyn Kick>);

impl ExitHandler for Ports {
    fn pio_read(&mut self, _: u16, _: u8) -> u32 {
        0
    }
    fn pio_write(&mut self, port: u16, _: u8, value: u32) {
        self.0.push((port, value));
        if port == 0x81 {
            self.1.kick();
        }
    }
    fn mmio_read(&mut self, _: u64, _: u8) -> u64 {
        0
    }
    fn mmio_write(&mut self, _: u64, _: u8, _: u64) {}
}

/// What a restart finds is overwritten where the kernel counts on it, and nowhere else.
#[test]
fn a_restart_zeroes_what_the_kernel_expects_and_keeps_the_rest() {
    let memory = GuestMemory::new(8 * MIB).unwrap();
    memory.write(0, &vec![0xa5; 8 << 20]).unwrap();
    let kernel = open(&elf(b"code", 2 * MIB, 0x3010));
    let direct = DirectBoot {
        used: true,
        ..boot("")
    };
    load(&memory, &kernel, None, &direct).unwrap();
    let bytes = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        memory.read(at, &mut bytes).unwrap();
        bytes
    };
    assert_eq!(bytes(2 * MIB, 4), b"code");
    assert_eq!(bytes(2 * MIB + 4, 0x300c), vec![0; 0x300c]);
    assert_eq!(bytes(2 * MIB + 0x3010, 4096), [0xa5; 4096]);
    assert_eq!(bytes(7 * MIB, 4096), [0xa5; 4096]);
    // Interrupt vectors, the BIOS's variables but for those that say where its memory is, and the tables' entries that
    // map nothing.
    assert_eq!(bytes(0, 0x40e), [0; 0x40e]);
    assert_eq!(bytes(0x40e, 7), [0xc0, 0x9f, 0, 0, 0, 0x7f, 2]);
    assert_eq!(bytes(0x415, 0x500 - 0x415), [0; 0x500 - 0x415]);
    assert_eq!(bytes(0x9008, 4088), [0; 4088]);
    assert_eq!(bytes(0xa020, 4064), [0; 4064]);
}

#[test]
fn an_elf_program_runs_in_64_bit_mode() {
    // mov eax, [rsi + 0x228]; mov al, [rax]; out 0x80, al; mov rax, cs; out 0x80, al; shl rax, 33; shr rax, 33;
    // out 0x80, al; out 0x81, al; jmp $
    let code = [
        0x8b, 0x86, 0x28, 0x02, 0x00, 0x00, 0x8a, 0x00, 0xe6, 0x80, 0x48, 0x8c, 0xc8, 0xe6, 0x80,
        0x48, 0xc1, 0xe0, 0x21, 0x48, 0xc1, 0xe8, 0x21, 0xe6, 0x80, 0xe6, 0x81, 0xeb, 0xfe,
    ];
    let Some(vm) = vm("an_elf_program_runs_in_64_bit_mode", &[]) else {
        return;
    };
    let kernel = open(&elf(&code, 2 * MIB, 0x1000));
    let mut vcpu = vm.create_vcpu(0, &cores(1)).unwrap();
    for used in [false, true] {
        let direct = DirectBoot { used, ..boot("Zz") };
        let entry = load(vm.memory(), &kernel, None, &direct).unwrap();
        entry.apply(0, &mut vcpu).unwrap();
        let mut ports = Ports(Vec::new(), vcpu.kick_handle());
        let exit = vcpu.run(&mut ports).unwrap();
        assert!(matches!(exit, Exit::Kicked), "{exit:?}");
        assert_eq!(
            ports.0,
            [
                (0x80, b'Z'.into()),
                (0x80, 0x10),
                (0x80, 0x10),
                (0x81, 0x10)
            ]
        );
        vcpu.reset().unwrap();
    }
}

use std::fs;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::pci::Aperture;

const APERTURES: Apertures = Apertures {
    io: Aperture {
        first: 0xc000,
        last: 0xffff,
    },
    mmio32: Aperture {
        first: 0xc000_0000,
        last: 0xdfff_ffff,
    },
    mmio64: Aperture {
        first: 0x1_4000_0000,
        last: 0x11_3fff_ffff,
    },
};

fn devices() -> Vec<IsaDevice> {
    let device = |name: &str, hid: &str, ports: &[(u16, u16)], irq| IsaDevice {
        name: name.to_owned(),
        hid: hid.to_owned(),
        ports: ports.to_vec(),
        irq,
    };
    vec![
        device("dev.com1", "PNP0501", &[(0x3f8, 8)], Some((4, false))),
        device("dev.com2", "PNP0501", &[(0x2f8, 8)], Some((3, false))),
        device("dev.panic", "QEMU0001", &[(0x505, 1)], None),
        device(
            "dev.wide",
            "XYZ00001",
            &[(0x6000, 0x200), (0x6400, 4)],
            Some((5, true)),
        ),
    ]
}

fn build_for(cpus: u32) -> Tables {
    build_on(Board::default(), cpus)
}

/// The PC of old left out, with and without PCI.
const REDUCED: [Board; 2] = [
    Board {
        legacy: false,
        pci: true,
    },
    Board {
        legacy: false,
        pci: false,
    },
];

fn build_on(board: Board, cpus: u32) -> Tables {
    build(&Contents {
        board,
        cpus,
        apertures: &APERTURES,
        isa: &devices(),
    })
    .unwrap()
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// Walks from the RSDP as a guest does, and returns every table by signature.
fn walk(tables: &Tables) -> Vec<(String, Vec<u8>)> {
    let at = |address: u64| {
        let start = usize::try_from(address - tables.base).unwrap();
        let len = number(&tables.bytes, start + 4, 4) as usize;
        let table = tables.bytes[start..start + len].to_vec();
        (String::from_utf8(table[..4].to_vec()).unwrap(), table)
    };
    let rsdp = &tables.bytes[..36];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp), tables.base % 16), (0, 0, 0));
    let xsdt = at(number(rsdp, 24, 8));
    let mut found: Vec<_> = xsdt.1[36..]
        .chunks(8)
        .map(|pointer| at(number(pointer, 0, 8)))
        .collect();
    let fadt = found
        .iter()
        .find(|(name, _)| name == "FACP")
        .unwrap()
        .1
        .clone();
    assert_eq!(number(&fadt, 40, 4), number(&fadt, 140, 8));
    found.push(at(number(&fadt, 140, 8)));
    found.push(xsdt);
    for (name, table) in &found {
        assert_eq!(sum(table), 0, "{name}");
    }
    let facs = number(&fadt, 36, 4);
    assert_eq!(facs % 64, 0);
    found.push(at(facs));
    found
}

#[test]
fn a_guest_finds_every_table_with_a_good_checksum() {
    let found = walk(&build_for(2));
    let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT", "XSDT", "FACS"]);
}

#[test]
fn the_fadt_points_at_the_registers_there_are() {
    let found = walk(&build_for(1));
    let fadt = &found[0].1;
    assert_eq!((fadt.len(), fadt[8]), (276, 6));
    assert_eq!(number(fadt, 46, 2), 9);
    assert_eq!(
        (
            number(fadt, 56, 4),
            number(fadt, 64, 4),
            number(fadt, 76, 4)
        ),
        (0xb000, 0xb004, 0xb008)
    );
    assert_eq!(
        (
            number(fadt, 152, 8),
            number(fadt, 176, 8),
            number(fadt, 212, 8)
        ),
        (0xb000, 0xb004, 0xb008)
    );
    // Reset: system I/O, one byte, port 0xcf9, value 6, and the flag that says so.
    assert_eq!(
        (&fadt[116..120], number(fadt, 120, 8), fadt[128]),
        (&[1_u8, 8, 0, 1][..], 0xcf9, 6)
    );
    assert_eq!(number(fadt, 112, 4) & 0x410, 0x400);
    // No keyboard controller, no VGA.
    assert_eq!(number(fadt, 109, 2) & 0b110, 0b100);
}

#[test]
fn the_madt_lists_every_cpu_once() {
    for cpus in [1, 2, 254, 255, 256, 300] {
        let found = walk(&build_for(cpus));
        let madt = &found[1].1;
        let (mut at, mut ids, mut overrides) = (44, Vec::new(), Vec::new());
        while at < madt.len() {
            match madt[at] {
                0 => ids.push(u32::from(madt[at + 3])),
                9 => ids.push(number(madt, at + 4, 4) as u32),
                2 => overrides.push((
                    madt[at + 3],
                    number(madt, at + 4, 4),
                    number(madt, at + 8, 2),
                )),
                _ => {}
            }
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(at, madt.len());
        assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
        assert_eq!(
            overrides,
            [
                (0, 2, 0),
                (5, 5, 13),
                (9, 9, 13),
                (10, 10, 13),
                (11, 11, 13)
            ]
        );
    }
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let error = build(&Contents {
        board: Board::default(),
        cpus: 100_000,
        apertures: &APERTURES,
        isa: &[],
    })
    .err()
    .unwrap()
    .to_string();
    assert!(error.contains("100000 CPUs"), "{error}");
}

/// ACPI 6.4 section 4.1: what hardware-reduced tables have and have not.
#[test]
fn a_reduced_board_shows_no_fixed_hardware() {
    for board in REDUCED {
        let found = walk(&build_on(board, 1));
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names.contains(&"MCFG"), board.pci);
        let fadt = &found[0].1;
        let flags = number(fadt, 112, 4);
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10, "{flags:#x}");
        // SCI, SMI command and every fixed block.
        assert!(
            fadt[46..56]
                .iter()
                .chain(&fadt[56..95])
                .all(|&byte| byte == 0)
        );
        assert!(fadt[148..244].iter().all(|&byte| byte == 0));
        assert_eq!(
            (number(fadt, 248, 8), number(fadt, 260, 8)),
            (0xb010, 0xb011)
        );
        assert_eq!((number(fadt, 120, 8), fadt[128]), (0xcf9, 6));
        // No VGA, no CMOS clock, no keyboard controller.
        assert_eq!(number(fadt, 109, 2), 0b10_0100);
        // No pair of 8259s, and nothing to override: its entries have type 2 and length 10.
        let madt = &found[1].1;
        assert_eq!(number(madt, 40, 4), 0);
        assert!(!madt.windows(4).any(|entry| entry[..3] == [2, 10, 0]));
        let dsdt = &found.iter().find(|(name, _)| name == "DSDT").unwrap().1;
        let holds = |text: &[u8]| dsdt.windows(text.len()).any(|part| part == text);
        assert!(holds(b"_S5_") && holds(b"D000") && !holds(b"RTC_"));
        assert_eq!(holds(b"PCI0"), board.pci);
    }
}

#[test]
fn hardware_ids_are_checked() {
    for good in ["PNP0501", "ABC12EF", "QEMU0001", "ACPI0007"] {
        check_hid(good).unwrap();
    }
    for bad in [
        "",
        "PNP050",
        "pnp0501",
        "PNP05G1",
        "QEMU00011",
        "QEMU 001",
        "PNP0501\0",
        "ÄÖ0501",
    ] {
        assert!(
            check_hid(bad).unwrap_err().to_string().contains("PNP0501"),
            "{bad}"
        );
    }
}

/// Disassembles a table and, for AML, compiles the result again, as strictly as iasl can.
fn iasl(folder: &Path, name: &str, table: &[u8]) {
    let file = format!("{}.dat", name.to_lowercase());
    fs::write(folder.join(&file), table).unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new("iasl")
            .args(arguments)
            .current_dir(folder)
            .output()
            .unwrap();
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{name}: {text}");
        text
    };
    let source = format!("{}.dsl", name.to_lowercase());
    let text = run(&["-p", &source, "-d", &file]);
    assert!(
        !text.contains("Warning") && !text.contains("Error") && !text.contains("Invalid"),
        "{name}: {text}"
    );
    let text = run(&["-p", "again", &source]);
    assert!(text.contains("0 Errors, 0 Warnings"), "{name}: {text}");
    let again = fs::read(folder.join("again.aml")).unwrap();
    // The compiler stamps its own id and revision into the header: the contents have to be the same.
    assert!(
        again[36..] == table[36..],
        "{name}: iasl compiles its own disassembly to something else"
    );
}

#[test]
fn iasl_agrees_with_every_table() {
    if Command::new("iasl").arg("-v").output().is_err() {
        println!(
            "SKIPPED: iasl_agrees_with_every_table: iasl is not installed (Debian package acpica-tools)"
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [pci, bare] = REDUCED;
    for (board, cpus) in [
        (Board::default(), 1),
        (Board::default(), 300),
        (pci, 1),
        (bare, 1),
    ] {
        for (name, table) in walk(&build_on(board, cpus)) {
            if name != "FACS" && name != "XSDT" {
                iasl(folder.path(), &name, &table);
            }
        }
    }
}

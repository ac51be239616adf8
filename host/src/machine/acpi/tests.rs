use std::fs;
use std::path::Path;
use std::process::Command;

use super::*;

mod firmware;
mod links;
use crate::pci::Aperture;

fn windows() -> Windows {
    let aperture = Aperture {
        first: 0x1_4000_0000,
        last: 0x11_3fff_ffff,
    };
    Windows::new(0x1000_0000, aperture, &[])
}

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

const WITHOUT_PS2: Board = Board {
    legacy: true,
    pci: true,
    ps2: false,
};

/// The PC of old left out, with and without PCI.
const REDUCED: [Board; 2] = [
    Board {
        legacy: false,
        pci: true,
        ps2: false,
    },
    Board {
        legacy: false,
        pci: false,
        ps2: false,
    },
];

/// Calls `make` with a machine of CPUs with these ids.
fn with<T>(apic_ids: &[u32], board: Board, make: impl FnOnce(&Contents<'_>) -> T) -> T {
    make(&Contents {
        apic_ids,
        windows: &windows(),
        board,
        board_ports: &[(0xb000, 0x40), (0xafe0, 4)],
        isa: &devices(),
    })
}

/// The tables as direct boot leaves them, in the order of [`walk`].
fn direct(cpus: u32, board: Board) -> Vec<(String, Vec<u8>)> {
    let ids: Vec<u32> = (0..cpus).collect();
    let place = Place {
        tables: 0xe_0000,
        end: 0xf_0000,
    };
    let blobs = with(&ids, board, |contents| link(contents, &place)).unwrap();
    walk(&blobs.rsdp, &blobs.tables, 0xe_0000)
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
fn walk(rsdp: &[u8], tables: &[u8], base: u64) -> Vec<(String, Vec<u8>)> {
    let at = |address: u64| {
        let start = usize::try_from(address - base).unwrap();
        let len = number(tables, start + 4, 4) as usize;
        let table = tables[start..start + len].to_vec();
        (String::from_utf8(table[..4].to_vec()).unwrap(), table)
    };
    assert_eq!((&rsdp[..8], rsdp.len()), (&b"RSD PTR "[..], 36));
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
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
    let found = direct(2, Board::default());
    let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT", "XSDT", "FACS"]);
}

#[test]
fn the_fadt_points_at_the_registers_there_are() {
    let found = direct(1, Board::default());
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
    // No VGA; a keyboard controller where there is one.
    assert_eq!(number(fadt, 109, 2) & 0b110, 0b110);
    assert_eq!(number(&direct(1, WITHOUT_PS2)[0].1, 109, 2) & 0b110, 0b100);
}

#[test]
fn the_madt_lists_every_cpu_once() {
    for cpus in [1, 2, 254, 255, 256, 300] {
        let found = direct(cpus, Board::default());
        let madt = &found[1].1;
        let (mut at, mut uids, mut ids, mut overrides) = (44, Vec::new(), Vec::new(), Vec::new());
        while at < madt.len() {
            match madt[at] {
                0 => {
                    uids.push(u32::from(madt[at + 2]));
                    ids.push(u32::from(madt[at + 3]));
                }
                9 => {
                    uids.push(number(madt, at + 12, 4) as u32);
                    ids.push(number(madt, at + 4, 4) as u32);
                }
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
        let all: Vec<u32> = (0..cpus).collect();
        assert_eq!((uids, ids), (all.clone(), all));
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
fn a_cpu_has_the_id_that_its_topology_gives() {
    let blobs = with(&[0, 1, 4, 256], Board::default(), build);
    let at = find(&blobs.tables, b"APIC");
    let entries = &blobs.tables[at + 44..];
    assert_eq!(entries[..8], [0, 8, 0, 0, 1, 0, 0, 0]);
    assert_eq!(entries[16..24], [0, 8, 2, 4, 1, 0, 0, 0]);
    // An x2APIC's id, and then the same CPU's UID.
    assert_eq!((entries[24], number(entries, 28, 4)), (9, 256));
    assert_eq!(number(entries, 36, 4), 3);
}

fn find(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).position(|w| w == what).unwrap()
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let ids: Vec<u32> = (0..4096).collect();
    let place = Place {
        tables: 0xe_0000,
        end: 0xf_0000,
    };
    let result = with(&ids, Board::default(), |contents| link(contents, &place));
    let error = result.err().unwrap().to_string();
    assert!(error.contains("4096 CPUs"), "{error}");
}

/// ACPI 6.4 section 4.1: what hardware-reduced tables have and have not.
#[test]
fn a_reduced_board_shows_no_fixed_hardware() {
    for board in REDUCED {
        let found = direct(1, board);
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names.contains(&"MCFG"), board.pci);
        let fadt = &found[0].1;
        let flags = number(fadt, 112, 4);
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10, "{flags:#x}");
        // SCI, SMI command and every fixed block.
        assert!(fadt[46..95].iter().all(|&byte| byte == 0));
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
        assert!(holds(b"_S5_") && holds(b"D000"));
        assert!(!holds(b"RTC_") && !holds(b"LNKA") && !holds(b"ISA_"));
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
    // Without optimizing: paths stay as they were written.
    let text = run(&["-oa", "-p", "again", &source]);
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
    let pc = Board::default();
    for (board, cpus) in [(pc, 1), (pc, 300), (pci, 1), (bare, 1)] {
        for (name, table) in direct(cpus, board) {
            if name != "FACS" && name != "XSDT" {
                iasl(folder.path(), &name, &table);
            }
        }
    }
}

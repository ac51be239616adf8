use std::fs;
use std::process::Command;

use crate::hypervisor::topology::Topology;

use super::*;

/// A processor of AMD's family 0x19 with two threads a core, as CPUID describes it.
pub(super) fn cpuid(leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
    let brand = b"AMD EPYC 7003 of a test                         ";
    let word = |at: usize| u32::from_le_bytes(brand[at..at + 4].try_into().unwrap());
    let cache = |kind: u32, level: u32, sharing: u32, ways: u32, sets: u32| {
        [
            kind | level << 5 | (sharing - 1) << 14,
            63 | (ways - 1) << 22,
            sets - 1,
            0,
        ]
    };
    Some(match (leaf, subleaf) {
        (0, _) => [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
        (1, _) => [0x00a0_0f11, 0, 0, 0x178b_fbff],
        (0x8000_0001, _) => [0, 0, 1 << 22 | 1 << 2, 1 << 29 | 1 << 20],
        (0x8000_0002..=0x8000_0004, _) => {
            let at = (leaf - 0x8000_0002) as usize * 16;
            [word(at), word(at + 4), word(at + 8), word(at + 12)]
        }
        (0x8000_001d, 0) => cache(1, 1, 2, 8, 64),
        (0x8000_001d, 1) => cache(2, 1, 2, 8, 64),
        (0x8000_001d, 2) => cache(3, 2, 2, 8, 1024),
        (0x8000_001d, 3) => cache(3, 3, 16, 16, 32768),
        (0x8000_001d, _) => [0; 4],
        _ => return None,
    })
}

fn processors(sockets: u32, cores: u32, threads: u32) -> Processors {
    let topology = Topology::new(sockets, cores, threads).unwrap();
    Processors::from_cpuid(topology, cpuid)
}

fn identity() -> Identity {
    Identity {
        vendor: "Example Works".to_owned(),
        product: "Model 7".to_owned(),
        version: "rev B".to_owned(),
        serial: "SN-0042".to_owned(),
        uuid: [
            0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd,
            0xee, 0xff,
        ],
        sku: "SKU-1".to_owned(),
        family: "Sevens".to_owned(),
        asset_tag: "A-9".to_owned(),
        oem_strings: vec!["io.example:one".to_owned(), "two".to_owned()],
        firmware_version: "v9.8".to_owned(),
    }
}

fn make(identity: &Identity, processors: &Processors, ram: &[(u64, u64)], uefi: bool) -> Blobs {
    build(&Contents {
        identity,
        processors,
        ram,
        slots: &[4, 31],
        uefi,
    })
}

/// Type, handle and formatted area of every structure, checked as firmware does that adds them one by one.
fn walk(tables: &[u8]) -> Vec<(u8, u16, Vec<u8>)> {
    let (mut at, mut all) = (0, Vec::new());
    while at < tables.len() {
        let len = usize::from(tables[at + 1]);
        let area = tables[at..at + len].to_vec();
        let end = tables[at + len..]
            .windows(2)
            .position(|pair| pair == [0, 0]);
        let handle = u16::from_le_bytes([area[2], area[3]]);
        assert!(all.iter().all(|(_, other, _)| *other != handle));
        all.push((area[0], handle, area));
        at += len + end.unwrap() + 2;
    }
    assert_eq!(at, tables.len());
    assert_eq!(all.last().unwrap().0, 127);
    all
}

#[test]
fn firmware_accepts_the_anchor() {
    // What OVMF's DetectSmbiosVersionLib compares before it takes the tables.
    let blobs = make(
        &Identity::default(),
        &processors(1, 1, 1),
        &[(0, 1 << 30)],
        true,
    );
    let anchor = &blobs.anchor;
    assert_eq!(
        (anchor.len(), &anchor[..5], anchor[6]),
        (24, &b"_SM3_"[..], 24)
    );
    assert_eq!(anchor[7..11], [3, 2, 0, 1]);
    let size = u32::from_le_bytes(anchor[12..16].try_into().unwrap());
    assert_eq!(size as usize, blobs.tables.len());
    for address in [0, 0xf_0040] {
        let anchor = blobs.anchor_for(address);
        assert_eq!(anchor.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b)), 0);
        assert_eq!(anchor[16..24], address.to_le_bytes());
    }
    let kinds: Vec<u8> = walk(&blobs.tables).iter().map(|s| s.0).collect();
    assert_eq!(kinds, [0, 1, 3, 4, 7, 7, 7, 9, 9, 16, 17, 19, 32, 127]);
}

#[test]
fn structures_refer_to_each_other() {
    let blobs = make(
        &identity(),
        &processors(3, 4, 2),
        &[(0, 3 << 30), (4 << 30, 1 << 30)],
        true,
    );
    let all = walk(&blobs.tables);
    let handles =
        |kind: u8| -> Vec<u16> { all.iter().filter(|s| s.0 == kind).map(|s| s.1).collect() };
    let word = |area: &[u8], at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
    assert_eq!((handles(4).len(), handles(7).len()), (3, 9));
    for (_, _, area) in all.iter().filter(|s| s.0 == 4) {
        for (level, at) in [(0, 0x1a), (1, 0x1c), (2, 0x1e)] {
            let (_, _, cache) = all.iter().find(|s| s.1 == word(area, at)).unwrap();
            assert_eq!((cache[0], word(cache, 5) & 7), (7, level));
        }
    }
    for (kind, at) in [(17, 4), (19, 0xc)] {
        for (_, _, area) in all.iter().filter(|s| s.0 == kind) {
            assert_eq!(word(area, at), handles(16)[0]);
        }
    }
    assert_eq!(handles(19).len(), 2);
}

/// What dmidecode says of the tables. It reads the file in which its `--dump-bin` leaves those of a machine.
fn dmidecode(blobs: &Blobs) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("dump");
    let mut dump = blobs.anchor_for(32);
    dump.resize(32, 0);
    dump.extend_from_slice(&blobs.tables);
    fs::write(&file, dump).unwrap();
    let found = ["dmidecode", "/usr/sbin/dmidecode"]
        .iter()
        .find_map(|program| {
            Command::new(program)
                .arg("--from-dump")
                .arg(&file)
                .output()
                .ok()
        });
    let Some(output) = found else {
        println!(
            "SKIPPED: dmidecode's tests: dmidecode is not installed (Debian package dmidecode)"
        );
        return None;
    };
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{text}"
    );
    for word in [
        "BROKEN",
        "OUT OF SPEC",
        "Wrong",
        "broken",
        "Invalid",
        "truncated",
        "<BAD",
    ] {
        assert!(!text.contains(word), "{word}: {text}");
    }
    Some(text)
}

/// The lines below the heading of a structure, without their indentation.
fn below<'a>(text: &'a str, heading: &str) -> Vec<&'a str> {
    let rest = text.split_once(&format!("\n{heading}\n")).unwrap().1;
    rest.lines()
        .take_while(|line| !line.is_empty())
        .map(str::trim)
        .collect()
}

#[track_caller]
fn says(text: &str, heading: &str, lines: &[&str]) {
    let found = below(text, heading);
    for line in lines {
        assert!(found.contains(line), "{line}: {found:#?}");
    }
}

#[test]
fn dmidecode_shows_the_identity() {
    let ram = [(0, 512 << 20)];
    let Some(text) = dmidecode(&make(&identity(), &processors(1, 4, 2), &ram, true)) else {
        return;
    };
    says(
        &text,
        "BIOS Information",
        &[
            "Vendor: Example Works",
            "Version: v9.8",
            "UEFI is supported",
            "System is a virtual machine",
            "ACPI is supported",
        ],
    );
    says(
        &text,
        "System Information",
        &[
            "Manufacturer: Example Works",
            "Product Name: Model 7",
            "Version: rev B",
            "Serial Number: SN-0042",
            "UUID: 00112233-4455-6677-8899-aabbccddeeff",
            "Wake-up Type: Power Switch",
            "SKU Number: SKU-1",
            "Family: Sevens",
        ],
    );
    says(
        &text,
        "Chassis Information",
        &[
            "Manufacturer: Example Works",
            "Asset Tag: A-9",
            "Serial Number: SN-0042",
            "SKU Number: SKU-1",
        ],
    );
    says(
        &text,
        "OEM Strings",
        &["String 1: io.example:one", "String 2: two"],
    );
    says(
        &text,
        "System Boot Information",
        &["Status: No errors detected"],
    );
}

#[test]
fn dmidecode_shows_the_machine() {
    let ram = [(0, 3 << 30), (4 << 30, 61 << 30)];
    let Some(text) = dmidecode(&make(
        &Identity::default(),
        &processors(1, 4, 2),
        &ram,
        false,
    )) else {
        return;
    };
    says(
        &text,
        "BIOS Information",
        &["Vendor: vmm-host", "Version: 1"],
    );
    assert!(!text.contains("UEFI is supported"));
    says(
        &text,
        "System Information",
        &[
            "Manufacturer: vmm-host",
            "Product Name: i440FX PC",
            "Serial Number: Not Specified",
            "UUID: Not Settable",
        ],
    );
    says(
        &text,
        "Processor Information",
        &[
            "Socket Designation: CPU 0",
            "Family: Zen",
            "Manufacturer: AuthenticAMD",
            "ID: 11 0F A0 00 FF FB 8B 17",
            "Version: AMD EPYC 7003 of a test",
            "Status: Populated, Enabled",
            "Core Count: 4",
            "Core Enabled: 4",
            "Thread Count: 8",
            "64-bit capable",
            "Multi-Core",
            "Hardware Thread",
            "Execute Protection",
            "Enhanced Virtualization",
        ],
    );
    // 4 cores with 32 KiB each of data and instructions, 512 KiB each, 32 MiB for all.
    let sizes: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Installed Size: "))
        .collect();
    assert_eq!(sizes, ["256 kB", "2 MB", "32 MB"]);
    says(
        &text,
        "System Slot Information",
        &[
            "Designation: PCI slot 4",
            "Current Usage: In Use",
            "Bus Address: 0000:00:04.0",
        ],
    );
    says(
        &text,
        "Physical Memory Array",
        &["Maximum Capacity: 64 GB", "Number Of Devices: 1"],
    );
    says(
        &text,
        "Memory Device",
        &[
            "Size: 64 GB",
            "Locator: DIMM 0",
            "Type: RAM",
            "Volatile Size: 64 GB",
        ],
    );
    assert!(text.contains("Ending Address: 0x000BFFFFFFF"), "{text}");
    assert!(text.contains("Ending Address: 0x0103FFFFFFF"), "{text}");
}

#[test]
fn sizes_beyond_the_small_fields_are_exact() {
    let ram = [(0, 3 << 30), (4 << 30, (5 << 40) - (3 << 30))];
    let Some(text) = dmidecode(&make(
        &Identity::default(),
        &processors(254, 1, 1),
        &ram,
        true,
    )) else {
        return;
    };
    says(&text, "Physical Memory Array", &["Maximum Capacity: 5 TB"]);
    says(&text, "Memory Device", &["Size: 5 TB"]);
    assert!(
        text.contains("Ending Address: 0x000005003FFFFFFF"),
        "{text}"
    );
    assert_eq!(text.matches("Processor Information").count(), 254);
}

#[test]
fn a_processor_that_says_nothing_is_described_as_unknown() {
    let topology = Topology::new(1, 200, 1).unwrap();
    let processors = Processors::from_cpuid(topology, |_, _| None);
    let Some(text) = dmidecode(&make(
        &Identity::default(),
        &processors,
        &[(0, 1 << 20)],
        false,
    )) else {
        return;
    };
    says(
        &text,
        "Processor Information",
        &[
            "Family: Unknown",
            "Version: Not Specified",
            "Core Count: 200",
            "L1 Cache Handle: Not Provided",
        ],
    );
}

#[test]
fn a_profile_may_claim_caches_of_any_size() {
    let cpuid = |leaf, subleaf| match (leaf, subleaf) {
        (4, 0) => Some([0x21, u32::MAX, u32::MAX, 0]),
        (4, 1) => Some([0x22, u32::MAX, u32::MAX, 0]),
        _ => None,
    };
    let processors = Processors::from_cpuid(Topology::new(1, 4, 1).unwrap(), cpuid);
    let blobs = make(&Identity::default(), &processors, &[(0, 1 << 30)], false);
    let all = walk(&blobs.tables);
    let (_, _, cache) = all.iter().find(|(kind, ..)| *kind == 7).unwrap();
    let size = u32::from_le_bytes(cache[0x13..0x17].try_into().unwrap());
    assert_eq!(size, (1 << 31) | (u32::MAX / 64), "in units of 64 KiB");
}

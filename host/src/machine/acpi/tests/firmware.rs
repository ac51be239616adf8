//! Firmware's side of the script, as strict as OVMF's AcpiPlatformDxe: what it would refuse fails here.

use std::collections::BTreeMap;

use super::*;

const COMMAND: usize = 128;
const PAGE: u32 = 4096;

struct Placed {
    base: u64,
    bytes: Vec<u8>,
    only_tables: bool,
}

fn text(field: &[u8]) -> String {
    assert_eq!(field[55], 0, "a file name without its end");
    let end = field.iter().position(|byte| *byte == 0).unwrap();
    String::from_utf8(field[..end].to_vec()).unwrap()
}

struct Firmware {
    blobs: BTreeMap<String, Placed>,
    next: u64,
}

impl Firmware {
    fn allocate(&mut self, files: &Blobs, body: &[u8]) {
        let (name, align) = (text(&body[..56]), number(body, 56, 4) as u32);
        assert!(align.is_power_of_two() && align <= PAGE, "{name}: {align}");
        let bytes = match name.as_str() {
            "etc/acpi/tables" => files.tables.clone(),
            "etc/acpi/rsdp" => files.rsdp.clone(),
            other => panic!("there is no file {other}"),
        };
        assert_eq!(body[60], if name.ends_with("rsdp") { 2 } else { 1 });
        let base = self.next;
        self.next += (bytes.len() as u64).next_multiple_of(u64::from(PAGE));
        let placed = Placed {
            base,
            bytes,
            only_tables: true,
        };
        assert!(self.blobs.insert(name, placed).is_none(), "allocated twice");
    }

    fn add_pointer(&mut self, body: &[u8]) {
        let (from, to) = (text(&body[..56]), text(&body[56..112]));
        let (at, width) = (number(body, 112, 4) as usize, usize::from(body[116]));
        assert!(matches!(width, 1 | 2 | 4 | 8));
        let target = &self.blobs[&to];
        let (base, len) = (target.base, target.bytes.len() as u64);
        let field = &mut self.blobs.get_mut(&from).unwrap().bytes[at..at + width];
        let offset = number(field, 0, width);
        assert!(offset < len, "{from}+{at:#x} points past the end of {to}");
        let value = offset + base;
        assert!(width == 8 || value >> (8 * width) == 0);
        field.copy_from_slice(&value.to_le_bytes()[..width]);
    }

    fn add_checksum(&mut self, body: &[u8]) {
        let name = text(&body[..56]);
        let [at, start, len] = [56, 60, 64].map(|field| number(body, field, 4) as usize);
        let bytes = &mut self.blobs.get_mut(&name).unwrap().bytes;
        bytes[at] = sum(&bytes[start..start + len]).wrapping_neg();
    }

    /// The second pass: what each pointer leads to is a table, or the blob is kept as it is.
    fn install(&mut self, script: &[u8]) -> Vec<String> {
        let (mut seen, mut installed) = (Vec::new(), Vec::new());
        for command in script.chunks(COMMAND).filter(|c| number(c, 0, 4) == 2) {
            let body = &command[4..];
            let (at, width) = (number(body, 112, 4) as usize, usize::from(body[116]));
            let value = number(&self.blobs[&text(&body[..56])].bytes, at, width);
            if seen.contains(&value) {
                continue;
            }
            seen.push(value);
            let target = self.blobs.get_mut(&text(&body[56..112])).unwrap();
            let rest = &target.bytes[(value - target.base) as usize..];
            let len = number(rest, 4, 4) as usize;
            let name = String::from_utf8_lossy(&rest[..4]).into_owned();
            let sound = len <= rest.len() && len >= 36;
            if sound && (name == "FACS" || sum(&rest[..len]) == 0) {
                if name != "XSDT" {
                    installed.push(name);
                }
            } else {
                target.only_tables = false;
            }
        }
        installed
    }
}

#[test]
fn firmware_installs_every_table_and_keeps_no_blob() {
    for (cpus, base) in [(1, 0x7e00_0000), (254, 0xbffe_0000)] {
        let ids: Vec<u32> = (0..cpus).collect();
        let files = with(&ids, Board::default(), build);
        assert_eq!(files.loader.len() % COMMAND, 0);
        let mut firmware = Firmware {
            blobs: BTreeMap::new(),
            next: base,
        };
        for command in files.loader.chunks(COMMAND) {
            let body = &command[4..];
            match number(command, 0, 4) {
                1 => firmware.allocate(&files, body),
                2 => firmware.add_pointer(body),
                3 => firmware.add_checksum(body),
                other => panic!("command {other}"),
            }
        }
        let mut installed = firmware.install(&files.loader);
        installed.sort();
        assert_eq!(installed, ["APIC", "DSDT", "FACP", "FACS", "MCFG"]);
        assert!(firmware.blobs.values().all(|blob| blob.only_tables));
        // What it leaves is what a guest of direct boot finds, elsewhere.
        let (tables, rsdp) = (
            &firmware.blobs[TABLES_FILE],
            &firmware.blobs[RSDP_FILE].bytes,
        );
        let found = walk(rsdp, &tables.bytes, tables.base);
        let same = direct(cpus, Board::default());
        for ((name, table), (other, expected)) in found.iter().zip(&same) {
            assert_eq!((name, table.len()), (other, expected.len()));
            if matches!(name.as_str(), "DSDT" | "APIC" | "MCFG" | "FACS") {
                assert_eq!(table, expected, "{name}");
            }
        }
    }
}

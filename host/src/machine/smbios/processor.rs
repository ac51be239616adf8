//! Processors and their caches (types 4 and 7), as CPUID describes them to the guest.
//!
//! Leaf numbers and fields: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.

use crate::hypervisor::topology::Topology;

use super::structure::Structure;
use super::{CACHES, PROCESSORS};

const NONE: u16 = 0xffff;
/// Subleaves of a cache leaf that are looked at: no processor has as many caches.
const CACHE_LEAVES: u32 = 16;
/// `Processor Family`: AMD's from 0x17 on, and unknown (SMBIOS 3.2 table 23).
const FAMILY_ZEN: u8 = 0x6b;
const FAMILY_UNKNOWN: u8 = 2;

/// One level of cache, all of one socket taken together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cache {
    level: u8,
    kib: u32,
    ways: u32,
    /// `System Cache Type`: 3 instruction, 4 data, 5 unified (SMBIOS 3.2 table 37).
    kind: u8,
}

/// What the tables say of processors.
#[derive(Clone, Debug)]
pub struct Processors {
    topology: Topology,
    vendor: String,
    brand: String,
    /// Registers EAX and EDX of leaf 1.
    id: (u32, u32),
    family: u8,
    /// Base and highest frequency in MHz; 0: not known.
    mhz: (u16, u16),
    characteristics: u16,
    caches: Vec<Cache>,
}

impl Processors {
    /// Reads everything out of what `cpuid` (leaf, subleaf) tells CPU 0.
    pub fn from_cpuid(topology: Topology, cpuid: impl Fn(u32, u32) -> Option<[u32; 4]>) -> Self {
        let leaf = |number| cpuid(number, 0).unwrap_or_default();
        let [_, ebx, ecx, edx] = leaf(0);
        let vendor = text(&[ebx, edx, ecx]);
        let brand: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(leaf).collect();
        let [signature, _, features, id] = leaf(1);
        let [_, _, more, extended] = leaf(0x8000_0001);
        let flags = [
            (2, extended & 1 << 29 != 0),
            (3, topology.cores() > 1),
            (4, topology.threads() > 1),
            (5, extended & 1 << 20 != 0),
            (6, features & 1 << 5 != 0 || more & 1 << 2 != 0),
        ];
        let characteristics = flags
            .iter()
            .fold(0, |all, &(bit, on)| all | u16::from(on) << bit);
        let family = (signature >> 8 & 0xf) + (signature >> 20 & 0xff);
        let zen = vendor == "AuthenticAMD" && family >= 0x17;
        let [base, highest, ..] = leaf(0x16);
        let deterministic = if more & 1 << 22 != 0 { 0x8000_001d } else { 4 };
        Self {
            topology,
            brand: text(&brand),
            id: (signature, id),
            family: if zen { FAMILY_ZEN } else { FAMILY_UNKNOWN },
            mhz: (base as u16, highest as u16),
            characteristics,
            caches: caches(topology, |subleaf| cpuid(deterministic, subleaf)),
            vendor,
        }
    }

    /// Appends a type 4 for each socket, and a type 7 for each level of its caches.
    pub(super) fn put(&self, table: &mut Vec<u8>) {
        for socket in 0..self.topology.sockets() as u16 {
            let first_cache = CACHES + socket * 4;
            let handle = |level: u8| {
                let there = self.caches.iter().any(|cache| cache.level == level);
                if there {
                    first_cache + u16::from(level)
                } else {
                    NONE
                }
            };
            self.put_socket(socket, [handle(1), handle(2), handle(3)], table);
            for cache in &self.caches {
                cache.put(first_cache + u16::from(cache.level), table);
            }
        }
    }

    fn put_socket(&self, socket: u16, caches: [u16; 3], table: &mut Vec<u8>) {
        let cores = self.topology.cores();
        let threads = cores * self.topology.threads();
        // The byte says 255 if the word after it is to be read.
        let byte = |count: u32| count.min(0xff) as u8;
        let [l1, l2, l3] = caches;
        Structure::new(4, PROCESSORS + socket)
            .text(&format!("CPU {socket}"))
            // Central processor.
            .bytes(&[3, self.family])
            .text(&self.vendor)
            .dword(self.id.0)
            .dword(self.id.1)
            .text(&self.brand)
            // Voltage and external clock are unknown.
            .bytes(&[0])
            .word(0)
            .word(self.mhz.1)
            .word(self.mhz.0)
            // Populated and enabled; no upgrade.
            .bytes(&[0x41, 6])
            .word(l1)
            .word(l2)
            .word(l3)
            // Serial number, asset tag, part number.
            .bytes(&[0, 0, 0])
            .bytes(&[byte(cores), byte(cores), byte(threads)])
            .word(self.characteristics)
            .word(u16::from(self.family))
            .word(cores as u16)
            .word(cores as u16)
            .word(threads as u16)
            .put(table);
    }
}

/// Registers as the characters that they hold.
fn text(registers: &[u32]) -> String {
    let bytes = registers.iter().flat_map(|register| register.to_le_bytes());
    let printable = bytes.filter(|byte| (0x20..0x7f).contains(byte));
    let text: String = printable.map(char::from).collect();
    text.trim().to_owned()
}

/// The levels that a type 4 can name, from the deterministic cache leaves.
fn caches(topology: Topology, leaf: impl Fn(u32) -> Option<[u32; 4]>) -> Vec<Cache> {
    let logical = u64::from(topology.cores() * topology.threads());
    let mut all: Vec<Cache> = Vec::new();
    for subleaf in 0..CACHE_LEAVES {
        let Some([eax, ebx, ecx, _]) = leaf(subleaf) else {
            break;
        };
        let kind = match eax & 0x1f {
            1 => 4,
            2 => 3,
            3 => 5,
            _ => break,
        };
        let (level, sharing) = ((eax >> 5 & 7) as u8, u64::from(eax >> 14 & 0xfff) + 1);
        if !(1..=3).contains(&level) {
            continue;
        }
        let field = |shift: u32, bits: u32| u64::from(ebx >> shift & ((1 << bits) - 1)) + 1;
        let (line, partitions, ways) = (field(0, 12), field(12, 10), field(22, 10));
        // A profile may say anything: the largest of all values are 2^64 bytes.
        let one = (line * partitions * ways).saturating_mul(u64::from(ecx) + 1) / 1024;
        let kib = (one.saturating_mul(logical.div_ceil(sharing))).min(u64::from(u32::MAX)) as u32;
        match all.iter_mut().find(|cache| cache.level == level) {
            // Level 1 is two caches, which a type 4 takes for one.
            Some(cache) => {
                cache.kib = cache.kib.saturating_add(kib);
                cache.kind = 5;
            }
            None => all.push(Cache {
                level,
                kib,
                ways: ways as u32,
                kind,
            }),
        }
    }
    all
}

impl Cache {
    fn put(&self, handle: u16, table: &mut Vec<u8>) {
        let (small, large) = self.sizes();
        Structure::new(7, handle)
            .text(&format!("L{}", self.level))
            // Not socketed, internal, enabled, write back.
            .word(1 << 7 | 1 << 8 | u16::from(self.level - 1))
            .word(small)
            .word(small)
            // SRAM type, speed and error correction are unknown.
            .word(2)
            .word(2)
            .bytes(&[0, 2, self.kind, associativity(self.ways)])
            .dword(large)
            .dword(large)
            .put(table);
    }

    /// In KiB, or in units of 64 KiB if the uppermost bit is set; 0xffff in the small field refers to the large one
    /// (SMBIOS 3.2 section 7.8).
    fn sizes(&self) -> (u16, u32) {
        let units = self.kib / 64;
        let small = match (u16::try_from(self.kib), u16::try_from(units)) {
            (Ok(kib), _) if kib < 0x8000 => kib,
            (_, Ok(units)) if units < 0x7fff => 0x8000 | units,
            _ => 0xffff,
        };
        let large = if self.kib < 1 << 31 {
            self.kib
        } else {
            1 << 31 | units
        };
        (small, large)
    }
}

/// SMBIOS 3.2 table 38; a number of ways that is not in it is "other".
fn associativity(ways: u32) -> u8 {
    match ways {
        1 => 3,
        2 => 4,
        4 => 5,
        8 => 7,
        12 => 9,
        16 => 8,
        20 => 0xe,
        24 => 0xa,
        32 => 0xb,
        48 => 0xc,
        64 => 0xd,
        _ => 1,
    }
}

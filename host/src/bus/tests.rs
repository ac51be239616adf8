use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;

/// Remembers the last write; reads give region, offset and width, so that a test sees what arrived.
#[derive(Default)]
struct Probe {
    written: AtomicU64,
}

impl Registers for Probe {
    fn read(&self, region: u32, offset: u64, width: u8) -> u64 {
        u64::from(region) << 16 | offset << 8 | u64::from(width)
    }
    fn write(&self, _: u32, offset: u64, width: u8, value: u64) {
        self.written.store(
            offset << 56 | u64::from(width) << 48 | value,
            Ordering::SeqCst,
        );
    }
}

fn owner(name: &str) -> Arc<str> {
    Arc::from(name)
}

#[test]
fn the_owner_sees_region_offset_and_width() {
    let bus = Bus::new(Space::Mmio);
    let probe = Arc::new(Probe::default());
    bus.insert(&owner("a"), 0x1000, 0x100, 7, probe.clone())
        .unwrap();
    let mut reader = bus.reader();
    assert_eq!(reader.read(0x1010, 4), 0x07_1004);
    assert_eq!(reader.read(0x10fc, 4), 0x07_fc04);
    reader.write(0x1020, 2, 0xdead_beef);
    assert_eq!(
        probe.written.load(Ordering::SeqCst),
        0x20 << 56 | 2 << 48 | 0xbeef
    );
}

#[test]
fn a_read_is_cut_to_its_width() {
    let bus = Bus::new(Space::Pio);
    bus.insert(&owner("a"), 0x10, 8, 3, Arc::new(Probe::default()))
        .unwrap();
    assert_eq!(bus.reader().read(0x10, 1), 1);
}

#[test]
fn unclaimed_reads_give_ones_and_writes_are_dropped() {
    let bus = Bus::new(Space::Pio);
    let mut reader = bus.reader();
    assert_eq!(reader.read(0x80, 1), 0xff);
    assert_eq!(reader.read(0x80, 2), 0xffff);
    assert_eq!(reader.read(0xffff, 4), 0xffff_ffff);
    assert_eq!(Bus::new(Space::Mmio).reader().read(u64::MAX, 8), u64::MAX);
    reader.write(0x80, 4, 0);
}

#[test]
fn an_access_across_two_owners_is_split_into_bytes() {
    let bus = Bus::new(Space::Pio);
    bus.insert(&owner("a"), 0x10, 2, 0, Arc::new(Probe::default()))
        .unwrap();
    let mut reader = bus.reader();
    // 0x0f: nobody, 0x10 and 0x11: "a" (width 1), 0x12: nobody.
    assert_eq!(reader.read(0x0f, 4), 0xff01_01ff);
    assert_eq!(reader.read(0x11, 2), 0xff01);
}

#[test]
fn overlaps_are_refused_with_both_names() {
    let bus = Bus::new(Space::Pio);
    let probe = Arc::new(Probe::default());
    bus.insert(&owner("dev.com1"), 0x3f8, 8, 0, probe.clone())
        .unwrap();
    for (start, len) in [
        (0x3f8, 8),
        (0x3f0, 9),
        (0x3ff, 1),
        (0x3fa, 2),
        (0x0, 0x1_0000),
    ] {
        let error = bus
            .insert(&owner("dev.sound"), start, len, 0, probe.clone())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("dev.sound")
                && error.contains("dev.com1")
                && error.contains("0x3f8-0x3ff"),
            "{error}"
        );
    }
    bus.insert(&owner("below"), 0x3f0, 8, 0, probe.clone())
        .unwrap();
    bus.insert(&owner("above"), 0x400, 1, 0, probe).unwrap();
}

#[test]
fn ranges_that_no_space_holds_are_refused() {
    let pio = Bus::new(Space::Pio);
    let probe = Arc::new(Probe::default());
    assert!(
        pio.insert(&owner("a"), 0xffff, 2, 0, probe.clone())
            .is_err()
    );
    assert!(pio.insert(&owner("a"), 0x10, 0, 0, probe.clone()).is_err());
    let mmio = Bus::new(Space::Mmio);
    assert!(
        mmio.insert(&owner("a"), u64::MAX, 2, 0, probe.clone())
            .is_err()
    );
    mmio.insert(&owner("a"), u64::MAX, 1, 0, probe).unwrap();
    assert_eq!(mmio.reader().read(u64::MAX, 1), 1);
}

#[test]
fn a_reader_follows_changes() {
    let bus = Bus::new(Space::Mmio);
    let mut reader = bus.reader();
    bus.insert(&owner("a"), 0x1000, 0x100, 0, Arc::new(Probe::default()))
        .unwrap();
    assert_eq!(reader.read(0x1000, 1), 1);
    assert!(bus.remove(0x1000));
    assert!(!bus.remove(0x1000));
    assert_eq!(reader.read(0x1000, 1), 0xff);
}

#[test]
fn a_reserved_range_belongs_to_nobody_on_the_bus() {
    let bus = Bus::new(Space::Mmio);
    bus.reserve("RAM", 0, 0x1000).unwrap();
    assert_eq!(bus.reader().read(0x10, 4), 0xffff_ffff);
    let error = bus
        .insert(&owner("dev.x"), 0xfff, 2, 0, Arc::new(Probe::default()))
        .unwrap_err();
    assert!(error.to_string().contains("RAM"), "{error}");
}

#[test]
fn moves_race_readers_without_harm() {
    let bus = Arc::new(Bus::new(Space::Mmio));
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (bus, stop) = (Arc::clone(&bus), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut reader = bus.reader();
                let mut hits = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    for base in [0x1000, 0x2000] {
                        let value = reader.read(base, 4);
                        assert!(value == 4 || value == 0xffff_ffff, "{value:#x}");
                        hits += u64::from(value == 4);
                    }
                }
                hits
            })
        })
        .collect();
    for round in 0..2000_u64 {
        let base = 0x1000 + 0x1000 * (round % 2);
        bus.insert(&owner("a"), base, 0x100, 0, Arc::new(Probe::default()))
            .unwrap();
        assert!(bus.remove(base));
    }
    bus.insert(&owner("a"), 0x1000, 0x100, 0, Arc::new(Probe::default()))
        .unwrap();
    let mut reader = bus.reader();
    assert_eq!(reader.read(0x1000, 4), 4);
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.join().unwrap();
    }
}

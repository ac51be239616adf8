//! Damaged images: nothing panics, hangs, takes much memory or overwrites a table, whatever is in them.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::os::unix::fs::FileExt;

use support::{Disk, Random, Setup};
use vmm_plugin_api::BlockOp;

const EIO: i32 = -libc::EIO;

fn word(file: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(file[at as usize..at as usize + 8].try_into().unwrap())
}

fn put(file: &mut [u8], at: u64, value: u64) {
    file[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

/// An image with guest data in its first 64 KiB, a name for what is in it, and the places of its tables.
struct Tables {
    file: Vec<u8>,
    l1: u64,
    l2: u64,
    refcounts: u64,
    block: u64,
}

fn sample(setup: &Setup, options: &str) -> Tables {
    setup.create("disk.qcow2", &["-o", options], "4M");
    setup.qemu_io(
        "disk.qcow2",
        &["write -P 0x21 0 64k", "write -P 0x22 1M 64k"],
    );
    let file = std::fs::read(setup.path("disk.qcow2")).unwrap();
    let (l1, refcounts) = (word(&file, 40), word(&file, 48));
    let (l2, block) = (word(&file, l1) & !(1 << 63), word(&file, refcounts));
    Tables {
        file,
        l1,
        l2,
        refcounts,
        block,
    }
}

fn save(setup: &Setup, file: &[u8]) {
    std::fs::write(setup.path("disk.qcow2"), file).unwrap();
}

fn corrupt_bit(setup: &Setup) -> bool {
    std::fs::read(setup.path("disk.qcow2")).unwrap()[79] & 2 != 0
}

/// The first write fails, the image is marked, and what is not damaged is read still.
fn fails_and_is_marked(setup: &Setup, what: &str, at: u64, readable: u64) {
    let mut disk = setup.open("disk.qcow2", &[]);
    assert_eq!(disk.try_write(at, &[9; 4096]), EIO, "{what}");
    assert_eq!(disk.try_write(0, &[9; 512]), EIO, "{what}: a further write");
    assert_eq!(disk.request(BlockOp::Flush, 0, 0), EIO, "{what}: flush");
    if readable < u64::MAX {
        assert_eq!(disk.read(readable, 512), [0x22; 512], "{what}");
    }
    drop(disk);
    assert!(corrupt_bit(setup), "{what}: not marked");
    assert!(
        setup
            .try_open("disk.qcow2", &[])
            .is_err_and(|e| e.contains("marked as corrupt"))
    );
}

#[test]
fn entries_that_can_not_be_are_errors() {
    let Some(setup) = Setup::new() else { return };
    let good = sample(&setup, "cluster_size=4096");
    let data = word(&good.file, good.l2) & !(1 << 63);
    for (what, entry) in [
        ("outside of the file", 1 << 63 | 0x7000_0000),
        ("not aligned", word(&good.file, good.l2) + 512),
        ("compressed, outside of the file", 1 << 62 | 0x7000_0000),
        ("no compressed data", 1 << 62 | data),
    ] {
        let mut file = good.file.clone();
        put(&mut file, good.l2, entry);
        save(&setup, &file);
        let mut disk = setup.open("disk.qcow2", &[("read_only", true.into())]);
        assert_eq!(disk.try_read(0, 512), Err(EIO), "{what}");
        assert_eq!(disk.read(1 << 20, 512), [0x22; 512], "{what}");
        drop(disk);
        assert!(!corrupt_bit(&setup));
        fails_and_is_marked(&setup, what, 512, 1 << 20);
    }
}

#[test]
fn tables_are_not_overwritten() {
    let Some(setup) = Setup::new() else { return };
    let good = sample(&setup, "cluster_size=4096");
    for (what, place) in [
        ("header", 0),
        ("L1", good.l1),
        ("L2", good.l2),
        ("refcount table", good.refcounts),
        ("block", good.block),
    ] {
        // Guest data where a table is.
        let mut file = good.file.clone();
        put(&mut file, good.l2, 1 << 63 | place);
        if place == 0 {
            put(&mut file, good.l2, 1 << 62);
        }
        save(&setup, &file);
        fails_and_is_marked(&setup, what, 0, u64::MAX);
        // Counted as free, though a table is there.
        let mut file = good.file.clone();
        let count = (good.block + place / 4096 * 2) as usize;
        file[count..count + 2].fill(0);
        save(&setup, &file);
        fails_and_is_marked(&setup, what, 2 << 20, 1 << 20);
        let now = std::fs::read(setup.path("disk.qcow2")).unwrap();
        assert!(
            now[good.l1 as usize..][..8] == good.file[good.l1 as usize..][..8],
            "{what}"
        );
        assert!(
            now[good.l2 as usize..][..4096] == good.file[good.l2 as usize..][..4096],
            "{what}"
        );
    }
}

#[test]
fn tables_in_one_place_are_refused() {
    let Some(setup) = Setup::new() else { return };
    let good = sample(&setup, "cluster_size=512");
    let second = good.l1 + 8;
    for (what, at, value) in [
        ("two L2 tables", second, 1 << 63 | good.l2),
        ("L2 in the header", second, 1 << 63),
        ("L2 in L1", second, 1 << 63 | good.l1),
        ("L2 outside", second, 1 << 63 | 0x7000_0000),
        ("two blocks", good.refcounts + 8, good.block),
        ("a block outside", good.refcounts + 8, 0x7000_0000),
        ("L1 in the refcount table", 40, good.refcounts),
    ] {
        let mut file = good.file.clone();
        put(&mut file, at, value);
        save(&setup, &file);
        let opened = setup.try_open("disk.qcow2", &[]);
        // An L2 table in the header is none at all.
        if what == "L2 in the header" {
            assert!(opened.is_ok());
            continue;
        }
        let error = opened
            .err()
            .unwrap_or_else(|| panic!("{what} is not refused"));
        assert!(
            error.contains("qemu-img check -r all") || error.contains("damaged"),
            "{what}: {error}"
        );
        assert!(
            std::fs::read(setup.path("disk.qcow2")).unwrap() == file,
            "{what}"
        );
    }
}

#[test]
fn sizes_that_can_not_be_are_refused() {
    let Some(setup) = Setup::new() else { return };
    let good = sample(&setup, "cluster_size=65536");
    let most = u64::MAX;
    for (what, at, value) in [
        ("disk", 24, most),
        ("disk of 2^62 bytes", 24, 1 << 62),
        ("no disk", 24, 0),
        ("odd disk", 24, 1000),
        ("L1 at the end of everything", 40, most << 16),
        ("L1 nowhere", 40, 0),
        ("refcount table at the end", 48, most << 16),
        ("refcount table of 2^32 clusters", 56, most),
        ("backing file's name outside", 8, most),
        ("header length", 96, 4 << 32 | 0xffff_fff8),
        ("refcount width", 96, 99 << 32 | 104),
        ("an extension of 4 GiB", 112, 0x1234_5678_ffff_ffff),
    ] {
        let mut file = good.file.clone();
        put(&mut file, at, value);
        save(&setup, &file);
        for read_only in [false, true] {
            let error = setup
                .try_open("disk.qcow2", &[("read_only", read_only.into())])
                .err();
            let error = error.unwrap_or_else(|| panic!("{what} is not refused"));
            assert!(
                error.contains("damaged") || error.contains("0 bytes"),
                "{what}: {error}"
            );
        }
    }
    for l1_entries in [0u32, u32::MAX] {
        let mut file = good.file.clone();
        file[36..40].copy_from_slice(&l1_entries.to_be_bytes());
        save(&setup, &file);
        assert!(
            setup
                .try_open("disk.qcow2", &[])
                .is_err_and(|e| e.contains("L1 table of"))
        );
    }
    for bits in [0u32, 8, 22, 31, 64, u32::MAX] {
        let mut file = good.file.clone();
        file[20..24].copy_from_slice(&bits.to_be_bytes());
        save(&setup, &file);
        assert!(
            setup
                .try_open("disk.qcow2", &[])
                .is_err_and(|e| e.contains("clusters of 2^"))
        );
    }
}

#[test]
fn files_that_are_cut_short_are_refused_or_end() {
    let Some(setup) = Setup::new() else { return };
    let good = sample(&setup, "cluster_size=512");
    for len in [
        1,
        4,
        71,
        72,
        100,
        104,
        512,
        1000,
        1536,
        good.l1 + 7,
        good.l2 + 8,
        good.file.len() as u64 - 512,
    ] {
        save(&setup, &good.file[..len as usize]);
        for read_only in [true, false] {
            let Ok(backend) = setup.try_open("disk.qcow2", &[("read_only", read_only.into())])
            else {
                continue;
            };
            assert!(len > good.l1, "{len} bytes are enough");
            let mut disk = Disk::new(&setup.host, backend, 0);
            for at in (0..disk.size).step_by(1 << 16) {
                disk.try_read(at, 1 << 16).ok();
            }
        }
    }
}

/// Resident memory of this process, in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: Option<u64> = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    pages.unwrap_or(0) * 4096
}

#[test]
fn flipped_bytes_do_no_more_than_make_errors() {
    let Some(setup) = Setup::new() else { return };
    let mut random = Random(0xdead_beef);
    std::fs::write(setup.path("base.raw"), vec![0x31; 3 << 20]).unwrap();
    for options in [
        "cluster_size=4096",
        "cluster_size=512",
        "cluster_size=4096,compat=0.10",
        "cluster_size=4096,compression_type=zstd",
    ] {
        setup.create(
            "disk.qcow2",
            &["-b", "base.raw", "-F", "raw", "-o", options],
            "4M",
        );
        setup.qemu_io(
            "disk.qcow2",
            &[
                "write -P 0x21 0 64k",
                "write -P 0x22 1M 64k",
                "write -c -P 0x23 2M 64k",
            ],
        );
        let good = std::fs::read(setup.path("disk.qcow2")).unwrap();
        let (l1, refcounts) = (word(&good, 40), word(&good, 48));
        let places = [
            0,
            l1,
            word(&good, l1) & !(1 << 63),
            refcounts,
            word(&good, refcounts),
        ];
        let (before, mut opened) = (resident(), 0);
        for round in 0..150 {
            let mut file = good.clone();
            for _ in 0..1 + random.below(4) {
                let place = places[random.below(places.len() as u64) as usize];
                let at = (place + random.below(if place == 0 { 112 } else { 256 })) as usize;
                let Some(byte) = file.get_mut(at) else {
                    continue;
                };
                *byte = match random.below(3) {
                    0 => 0xff,
                    1 => *byte ^ 1 << random.below(8),
                    _ => random.below(256) as u8,
                };
            }
            save(&setup, &file);
            let Ok(backend) =
                setup.try_open("disk.qcow2", &[("read_only", (round % 4 == 0).into())])
            else {
                continue;
            };
            opened += 1;
            let mut disk = Disk::new(&setup.host, backend, 0);
            for step in 0..20 {
                let at = random.below(disk.size.min(8 << 20) / 512) * 512;
                let len = (1 << 16).min(disk.size - at);
                match step % 5 {
                    0 => drop(disk.try_read(at, len)),
                    1 => drop(disk.request(BlockOp::Discard, at, len)),
                    2 => drop(disk.request(BlockOp::WriteZeroes { unmap: true }, at, len)),
                    3 => drop(disk.try_write(at, &vec![step as u8; len as usize])),
                    _ => drop(disk.request(BlockOp::Flush, 0, 0)),
                }
            }
        }
        assert!(
            opened > 30,
            "{options}: only {opened} images could be opened"
        );
        let grown = resident().saturating_sub(before) >> 20;
        assert!(grown < 100, "{options}: {grown} MiB more");
        assert!(
            setup.host.faults().is_empty(),
            "{options}: {:?}",
            setup.host.faults()
        );
    }
}

/// The image is emptied under the disk: nothing that was safe is said to be, and nothing is written on top.
#[test]
fn an_image_that_is_cut_short_while_it_is_used() {
    let Some(setup) = Setup::new() else { return };
    setup.create("disk.qcow2", &[], "16M");
    let mut disk = setup.open("disk.qcow2", &[]);
    disk.write(0, &[7; 65536]);
    disk.flush();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(setup.path("disk.qcow2"))
        .unwrap();
    file.set_len(0).unwrap();
    assert_eq!(disk.try_read(0, 4096), Err(-libc::EIO));
    assert_eq!(disk.try_write(8 << 20, &[8; 65536]), -libc::EIO);
    assert_eq!(disk.request(BlockOp::Flush, 0, 0), -libc::EIO);
    drop(disk);
    assert!(setup.host.faults().is_empty(), "{:?}", setup.host.faults());
    let error = setup.try_open("disk.qcow2", &[]).err().unwrap();
    assert!(error.contains("disk.qcow2"), "{error}");
}

/// A file that says it is as large as files get takes no more than it has.
#[test]
fn sparse_giants_take_little() {
    let Some(setup) = Setup::new() else { return };
    setup.create("disk.qcow2", &["-o", "cluster_size=2M"], "100T");
    let mut disk = setup.open("disk.qcow2", &[]);
    for at in [0, 50u64 << 40, (100 << 40) - 512] {
        disk.write(at, &[0x44; 512]);
        assert_eq!(disk.read(at, 512), [0x44; 512]);
    }
    drop(disk);
    setup.check("disk.qcow2");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(setup.path("disk.qcow2"))
        .unwrap();
    file.set_len(1 << 43).unwrap();
    file.write_all_at(&[0; 8], 88).unwrap();
    let before = resident();
    assert_eq!(setup.open("disk.qcow2", &[]).read(0, 512), [0x44; 512]);
    assert!(resident().saturating_sub(before) < 64 << 20);
}

//! Drives the disk as a device does, through the ABI.

#![allow(clippy::expect_used)] // helpers of tests

mod support;

use std::io::{Cursor, Read};

use support::{MIB, contents, disk, finish};
use vmm_plugin_api::abi::block::BLOCK_READ_ONLY;
use vmm_plugin_api::testing::FakeHost;
use vmm_plugin_api::{Batch, BlockOp};

/// What fatfs finds: the label, and the files of the root directory in order of name.
fn files(bytes: Vec<u8>) -> (String, Vec<(String, Vec<u8>)>) {
    let fs = fatfs::FileSystem::new(Cursor::new(bytes), fatfs::FsOptions::new()).expect("FAT");
    let mut found: Vec<_> = fs
        .root_dir()
        .iter()
        .map(|entry| {
            let entry = entry.expect("entry");
            let mut contents = Vec::new();
            entry.to_file().read_to_end(&mut contents).expect("read");
            (entry.file_name(), contents)
        })
        .collect();
    found.sort();
    let label = fs.read_volume_label_from_root_dir().expect("label");
    assert_eq!(label.as_deref(), Some(fs.volume_label().as_str()));
    (fs.volume_label(), found)
}

fn expected(user: &[u8], meta: &[u8], network: &[u8]) -> (String, Vec<(String, Vec<u8>)>) {
    let file = |name: &str, contents: &[u8]| (name.to_owned(), contents.to_vec());
    let files = vec![
        file("meta-data", meta),
        file("network-config", network),
        file("user-data", user),
    ];
    ("cidata".to_owned(), files)
}

#[test]
fn texts_and_files_are_in_the_volume_and_the_rest_is_empty() {
    let host = FakeHost::new(2 * MIB as u64);
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("meta");
    std::fs::write(&path, "instance-id: one\n").expect("write");
    for block in [512, 1024, 2048, 4096] {
        let given = [
            ("user-data", "#cloud-config\nhostname: b\u{e4}r\n"),
            ("meta-data-path", path.to_str().expect("UTF-8")),
        ];
        let backend = disk(&host, &given, block).expect("create");
        let info = backend.as_block().expect("block").info().expect("info");
        assert_eq!(u64::from(info.logical), block);
        assert_eq!(info.features, BLOCK_READ_ONLY);
        let found = files(contents(&host, &backend));
        let user = "#cloud-config\nhostname: b\u{e4}r\n".as_bytes();
        assert_eq!(found, expected(user, b"instance-id: one\n", b""), "{block}");
    }
    let nothing = disk(&host, &[], 512).expect("create");
    assert_eq!(files(contents(&host, &nothing)), expected(b"", b"", b""));
}

/// 0xff and lone continuation bytes are not UTF-8, and a NUL ends no file: what is in the file arrives.
#[test]
fn contents_are_bytes() {
    let host = FakeHost::new(2 * MIB as u64);
    let folder = tempfile::tempdir().expect("folder");
    let odd: Vec<u8> = (0..=255u8)
        .rev()
        .chain(*b"\xef\xbb\xbf\0\r\n\x80")
        .collect();
    let path = folder.path().join("odd");
    std::fs::write(&path, &odd).expect("write");
    let path = path.to_str().expect("UTF-8");
    let given = [("user-data-path", path), ("network-config-path", path)];
    let backend = disk(&host, &given, 512).expect("create");
    let found = files(contents(&host, &backend));
    assert_eq!(found, expected(&odd, b"", &odd));
}

/// Three sizes, so that the volume is FAT12, FAT16 and FAT32, and the second of them the ten megabytes that somebody will have.
#[test]
fn any_size_fits() {
    let host = FakeHost::new(2 * MIB as u64);
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("long");
    for (len, kind) in [
        (MIB + 1, fatfs::FatType::Fat12),
        (10_000_000, fatfs::FatType::Fat16),
        (40 * MIB, fatfs::FatType::Fat32),
    ] {
        let long: Vec<u8> = (0..len as u32).map(|i| (i ^ (i >> 9)) as u8).collect();
        std::fs::write(&path, &long).expect("write");
        let given = [
            ("user-data-path", path.to_str().expect("UTF-8")),
            ("meta-data", "instance-id: two"),
        ];
        let backend = disk(&host, &given, 512).expect("create");
        let bytes = contents(&host, &backend);
        assert!(
            bytes.len() < len + len / 50 + 20_000,
            "{len}: {}",
            bytes.len()
        );
        let fs = fatfs::FileSystem::new(Cursor::new(bytes.clone()), fatfs::FsOptions::new());
        assert_eq!(fs.expect("FAT").fat_type(), kind);
        assert!(
            files(bytes) == expected(&long, b"instance-id: two", b""),
            "{len} bytes"
        );
    }
}

#[test]
fn the_same_input_makes_the_same_volume() {
    let host = FakeHost::new(2 * MIB as u64);
    let one = || {
        let backend = disk(&host, &[("user-data", "#!/bin/sh\ntrue\n")], 512).expect("create");
        contents(&host, &backend)
    };
    assert_eq!(one(), one());
}

#[test]
fn the_guest_can_only_read_what_is_there() {
    let host = FakeHost::new(2 * MIB as u64);
    let slice = host.memory().writable(0, 512).expect("RAM");
    let backend = disk(&host, &[], 512).expect("create");
    let block = backend.as_block().expect("block");
    let end = block.info().expect("info").bytes;
    let before = contents(&host, &backend);
    let mut queue = block.open_queue(16).expect("queue");
    assert!(queue.fd().is_none());
    let mut batch = Batch::default();
    batch.transfer(1, BlockOp::Write { fua: false }, 0, &[slice]);
    batch.control(2, BlockOp::WriteZeroes { unmap: true }, 0, 512);
    batch.control(3, BlockOp::Discard, 0, 512);
    batch.control(4, BlockOp::Flush, 0, 0);
    batch.transfer(5, BlockOp::Read, end, &[slice]);
    batch.transfer(6, BlockOp::Read, u64::MAX - 511, &[slice]);
    batch.transfer(7, BlockOp::Read, 100, &[slice]);
    batch.transfer(8, BlockOp::Read, end - 512, &[slice]);
    let results: Vec<i32> = finish(&mut queue, &mut batch).iter().map(|d| d.1).collect();
    let (rofs, inval) = (-libc::EROFS, -libc::EINVAL);
    assert_eq!(results, [rofs, rofs, rofs, 0, inval, inval, inval, 0]);
    assert!(before == contents(&host, &backend));
}

#[test]
fn a_full_queue_takes_no_more_until_reaped() {
    let host = FakeHost::new(2 * MIB as u64);
    let backend = disk(&host, &[], 512).expect("create");
    let mut queue = backend
        .as_block()
        .expect("block")
        .open_queue(4)
        .expect("queue");
    let mut batch = Batch::default();
    for i in 0..6 {
        batch.control(i, BlockOp::Flush, 0, 0);
    }
    assert_eq!(finish(&mut queue, &mut batch).len(), 4);
    assert_eq!(finish(&mut queue, &mut batch), [(4, 0), (5, 0)]);
}

#[test]
fn bad_input_is_refused_by_key_and_file() {
    let host = FakeHost::new(2 * MIB as u64);
    let folder = tempfile::tempdir().expect("folder");
    let name = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    // Longer than a file of the volume may be, and no byte of it on the disk.
    let huge = std::fs::File::create(name("huge")).expect("create");
    huge.set_len((1 << 30) + 1).expect("grow");
    let (missing, huge, here) = (name("missing"), name("huge"), name("."));
    for (given, block, complaint) in [
        (
            &[("user-data", "a"), ("user-data-path", "b")][..],
            512,
            "both `user-data` and `user-data-path` are given".to_owned(),
        ),
        (
            &[("meta-data-path", &missing)],
            512,
            format!("`meta-data-path`: cannot read {missing}: No such file"),
        ),
        (
            &[("network-config-path", &here)],
            512,
            format!("`network-config-path`: cannot read {here}: not a regular file"),
        ),
        (
            &[("user-data-path", &huge)],
            512,
            format!("`user-data-path`: cannot read {huge}: it has more than 1024 MiB"),
        ),
        (&[], 1000, "`block_size` is 1000".to_owned()),
        (&[], 8192, "`block_size` is 8192".to_owned()),
    ] {
        let error = disk(&host, given, block).err().expect("refused");
        assert!(error.contains(&complaint), "{given:?}: {error}");
    }
    assert!(host.faults().is_empty());
}

//! The device on the real backends, each from its shared object, with many requests in flight.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::BTreeMap;

use support::*;
use vmm_plugin_api::testing::{Backend, FakeHost, Value, load};
use vmm_plugin_virtio_block::VMM_PLUGIN;

const SECTORS: u64 = 8192;

/// Random reads, writes, flushes and zeroing, up to 32 at a time, compared with a copy kept here.
fn torture(backend: impl Fn(&FakeHost) -> Backend, queues: u64) {
    let host = FakeHost::new(64 << 20);
    let disk = backend(&host);
    let options = [("block_dev", Value::from(&disk)), ("queues", queues.into())];
    let device = host
        .device(&VMM_PLUGIN, "pci-virtio-block", &options)
        .unwrap();
    device.start().unwrap();
    let setup = Setup::on(host, device);
    let mut disk = setup.disk();
    let mut copy = vec![0u8; SECTORS as usize * 512];
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut below = |n: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % n
    };
    for round in 0..40u64 {
        // Requests in flight together touch different places: slot `i` owns a part of the disk.
        let mut flying = BTreeMap::new();
        for i in 0..1 + below(16) {
            let first = i * (SECTORS / 16) + below(SECTORS / 16 - 64);
            let sectors = 1 + below(64);
            let range = first as usize * 512..(first + sectors) as usize * 512;
            let pending = match below(6) {
                0 | 1 => {
                    let data = pattern(round * 100 + i, range.len());
                    copy[range.clone()].copy_from_slice(&data);
                    disk.add(T_OUT, first, &data, 0)
                }
                2 => {
                    copy[range.clone()].fill(0);
                    let range = support::range(first, sectors as u32, 1);
                    disk.add(T_WRITE_ZEROES, 0, &range, 0)
                }
                3 => disk.add(T_FLUSH, 0, &[], 0),
                _ => disk.add(T_IN, first, &[], range.len() as u32),
            };
            flying.insert(pending.head, (pending, range));
        }
        disk.queue.kick(&setup.device);
        while !flying.is_empty() {
            let (head, written) = disk.queue.wait(WAIT).expect("a completion");
            let (pending, range) = flying.remove(&head).expect("a head in flight");
            assert_eq!(disk.status(&pending), S_OK, "round {round}");
            assert_eq!(written, pending.len + 1);
            if pending.len > 0 {
                let same = disk.bytes(pending.data, pending.len) == copy[range];
                assert!(same, "round {round}: what was read is what was written");
            }
        }
        if round % 10 == 9 {
            setup.device.pause().unwrap();
            setup.device.resume().unwrap();
        }
    }
    for first in (0..SECTORS).step_by(1024) {
        let all = disk.read(first, 1024 * 512);
        assert!(all[..] == copy[first as usize * 512..][..1024 * 512]);
    }
    assert_eq!(setup.host.faults(), Vec::<String>::new());
    assert_eq!(setup.device.counter("errors"), 0);
}

#[test]
fn memory() {
    let root = load("vmm-plugin-memory").unwrap();
    let options: [(&str, Value); 3] = [
        ("size", (SECTORS * 512).into()),
        ("block_size", 512u64.into()),
        ("workers", 4u64.into()),
    ];
    torture(|host| host.block(root, "mem-async", &options).unwrap(), 1);
}

#[test]
fn file_through_the_page_cache_and_around_it() {
    let root = load("vmm-plugin-file").unwrap();
    for direct in [false, true] {
        let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        image.as_file().set_len(SECTORS * 512).unwrap();
        let options: [(&str, Value); 5] = [
            ("path", image.path().to_str().unwrap().into()),
            ("block_size", 512u64.into()),
            ("workers", 4u64.into()),
            ("direct", direct.into()),
            ("discard", true.into()),
        ];
        torture(|host| host.block(root, "file", &options).unwrap(), 2);
    }
}

/// Layers on each other as `docs/disks.md` shows them: what the guest sees is one disk.
#[test]
fn an_overlay_on_a_throttle_on_a_fault_layer_on_a_file() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (image, overlay) = (dir.path().join("base"), dir.path().join("overlay"));
    let base = std::fs::File::create(&image).unwrap();
    base.set_len(SECTORS * 512).unwrap();
    let stack = |host: &FakeHost| {
        let options: [(&str, Value); 5] = [
            ("path", image.to_str().unwrap().into()),
            ("block_size", 512u64.into()),
            ("workers", 4u64.into()),
            ("discard", true.into()),
            ("read_only", true.into()),
        ];
        let root = load("vmm-plugin-file").unwrap();
        let file = host.block(root, "file", &options).unwrap();
        let root = load("vmm-plugin-fault").unwrap();
        let options = [
            ("backing", Value::from(&file)),
            ("rules", "read delay 300us every 5".into()),
        ];
        let fault = host.block(root, "fault", &options).unwrap();
        let root = load("vmm-plugin-throttle").unwrap();
        let options = [
            ("backing", Value::from(&fault)),
            ("ops_per_second", 50_000u64.into()),
        ];
        let throttle = host.block(root, "throttle", &options).unwrap();
        let root = load("vmm-plugin-overlay").unwrap();
        let options = [
            ("backing", Value::from(&throttle)),
            ("path", overlay.to_str().unwrap().into()),
            ("keep", true.into()),
            ("workers", 4u64.into()),
        ];
        host.block(root, "overlay", &options).unwrap()
    };
    torture(stack, 2);
}

/// A batch of which some requests fail, for want of space and otherwise: those fail, the others are done, and the disk goes on.
#[test]
fn errors_in_the_middle_of_a_batch_hit_the_right_requests() {
    const COUNT: u64 = 60;
    let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    image.as_file().set_len(SECTORS * 512).unwrap();
    let host = FakeHost::new(64 << 20);
    let options: [(&str, Value); 5] = [
        ("path", image.path().to_str().unwrap().into()),
        ("block_size", 512u64.into()),
        ("workers", 4u64.into()),
        ("direct", false.into()),
        ("discard", true.into()),
    ];
    let root = load("vmm-plugin-file").unwrap();
    let file = host.block(root, "file", &options).unwrap();
    let rules = "write 64K..128K error ENOSPC; write 192K..196K error EIO; \
        write 200K..204K torn 512; read 232K..236K error EIO; flush error EIO times 1";
    let options = [
        ("backing", Value::from(&file)),
        ("rules", rules.into()),
        ("read_only", false.into()),
    ];
    let root = load("vmm-plugin-fault").unwrap();
    let fault = host.block(root, "fault", &options).unwrap();
    let device = host
        .device(
            &VMM_PLUGIN,
            "pci-virtio-block",
            &[("block_dev", (&fault).into()), ("queues", 1u64.into())],
        )
        .unwrap();
    device.start().unwrap();
    let setup = Setup::on(host, device);
    let mut disk = setup.disk();
    let writes = |i: u64| i < 56;
    let fails = |i: u64| (16..32).contains(&i) || [48, 50, 58].contains(&i);
    let mut flying = BTreeMap::new();
    for i in 0..COUNT {
        let pending = match writes(i) {
            true => disk.add(T_OUT, i * 8, &pattern(i, 4096), 0),
            false => disk.add(T_IN, i * 8, &[], 4096),
        };
        flying.insert(pending.head, (i, pending));
    }
    disk.queue.kick(&setup.device);
    while !flying.is_empty() {
        let (head, _) = disk.queue.wait(WAIT).expect("a completion");
        let (i, pending) = flying.remove(&head).expect("a head in flight");
        let expected = if fails(i) { S_IOERR } else { S_OK };
        assert_eq!(disk.status(&pending), expected, "request {i}");
    }
    assert_eq!(disk.request(T_FLUSH, 0, &[], 0).0, S_IOERR);
    assert_eq!(disk.request(T_FLUSH, 0, &[], 0).0, S_OK);
    for i in (0..COUNT).filter(|i| *i != 58) {
        let expected = match (writes(i) && !fails(i), i) {
            (true, _) => pattern(i, 4096),
            // Torn: one sector, and it was said that it failed.
            (false, 50) => [&pattern(i, 512)[..], &[0; 3584]].concat(),
            _ => vec![0; 4096],
        };
        assert!(disk.read(i * 8, 4096) == expected, "sectors of request {i}");
    }
    assert_eq!(setup.host.faults(), Vec::<String>::new());
    assert_eq!(setup.device.counter("errors"), 20);
}

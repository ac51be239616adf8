//! What is read through an overlay is what was written to it, and elsewhere what the base has, which never changes.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests

mod support;

use std::path::Path;

use support::{FUA, MIB, Random, Setup, WRITE, pattern};
use vmm_plugin_api::testing::{Backend, Value, load, run_batch, run_transfer};
use vmm_plugin_api::{Batch, BlockOp};

const BYTES: u64 = 4 * MIB;

/// Random requests on two queues, compared with a plain copy.
fn torture(setup: &Setup, overlay: &Backend, copy: &mut [u8], seed: u64) {
    let mut disks = [setup.disk(overlay), setup.disk(overlay)];
    let mut random = Random(seed);
    for round in 0..400 {
        let disk = &mut disks[round % 2];
        // Clustered, so that many requests are partly in the file.
        let first = random.below(256) + random.below(4) * 2048;
        let blocks = (1 + random.below(96)).min(BYTES / 512 - first);
        let (at, len) = (first * 512, blocks * 512);
        let range = at as usize..(at + len) as usize;
        match random.below(10) {
            0..4 => {
                let bytes = pattern(round as u64, len as usize);
                let op = if random.below(4) == 0 { FUA } else { WRITE };
                assert_eq!(disk.write(op, at, &bytes), 0);
                copy[range].copy_from_slice(&bytes);
            }
            4 => {
                let unmap = random.below(2) == 0;
                assert_eq!(disk.control(BlockOp::WriteZeroes { unmap }, at, len), 0);
                copy[range].fill(0);
            }
            5 => {
                let code = disk.control(BlockOp::Discard, at, len);
                assert!(code == 0 || code == -libc::ENOTSUP, "{code}");
                if code == 0 {
                    // A discarded block may read as anything; here it is zero, so that it is never an old one of the base.
                    copy[range].fill(0);
                }
            }
            6 => disk.flush(),
            _ => assert!(disk.read(at, len as usize) == copy[range], "round {round}"),
        }
    }
    let all = disks[0].read(0, BYTES as usize);
    assert!(all == *copy, "the whole disk");
}

#[test]
fn an_overlay_reads_as_written_and_is_kept() {
    for parent in [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"] {
        let setup = match Setup::within(Path::new(parent)) {
            Ok(setup) => setup,
            Err(error) => {
                println!("SKIPPED: {parent}: {error}");
                continue;
            }
        };
        let original = setup.image("base", BYTES);
        let mut copy = original.clone();
        for seed in [1, 2, 3] {
            // Each round finds what the one before it left, flushed or not: the overlay was closed in order.
            let base = setup.file("base", &[]);
            let overlay = setup.overlay(&base, "over");
            let mut disk = setup.disk(&overlay);
            assert!(
                disk.read(0, BYTES as usize) == copy,
                "seed {seed}: as it was left"
            );
            torture(&setup, &overlay, &mut copy, seed);
        }
        assert!(std::fs::read(setup.path("base")).unwrap() == original);
        assert_eq!(setup.host.faults(), Vec::<String>::new());
    }
}

#[test]
fn what_is_not_kept_is_gone_and_leaves_nothing() {
    let setup = Setup::new();
    let original = setup.image("base", BYTES);
    let base = setup.file("base", &[]);
    for seed in [4, 5] {
        let options = [("keep", Value::from(false))];
        let overlay = setup.try_overlay(&base, "over", &options).unwrap();
        assert!(setup.disk(&overlay).read(0, BYTES as usize) == original);
        torture(&setup, &overlay, &mut original.clone(), seed);
        let names = std::fs::read_dir(setup.dir.path()).unwrap();
        assert_eq!(names.count(), 1, "only the base has a name");
    }
}

#[test]
fn over_memory_and_over_direct_io() {
    let setup = Setup::new();
    let root = load("vmm-plugin-memory").unwrap();
    let options: [(&str, Value); 3] = [
        ("size", BYTES.into()),
        ("block_size", 512u64.into()),
        ("read_only", true.into()),
    ];
    let memory = setup.host.block(root, "mem-async", &options).unwrap();
    let overlay = setup.overlay(&memory, "over-memory");
    torture(&setup, &overlay, &mut vec![0; BYTES as usize], 6);

    let mut original = setup.image("base", BYTES);
    let direct = setup.file(
        "base",
        &[("direct", true.into()), ("block_size", 512u64.into())],
    );
    let overlay = setup.overlay(&direct, "over-direct");
    torture(&setup, &overlay, &mut original, 7);
}

#[test]
fn overlays_share_a_base_and_stand_on_each_other() {
    let setup = Setup::new();
    let original = setup.image("base", BYTES);
    let base = setup.file("base", &[]);
    let (one, two) = (setup.overlay(&base, "one"), setup.overlay(&base, "two"));
    let (mut copy, mut other) = (original.clone(), original.clone());
    torture(&setup, &one, &mut copy, 8);
    torture(&setup, &two, &mut other, 9);
    assert!(setup.disk(&one).read(0, BYTES as usize) == copy);
    drop(one);
    let below = setup
        .try_overlay(&base, "one", &[("read_only", true.into())])
        .unwrap();
    let shared = setup
        .try_overlay(&base, "one", &[("read_only", true.into())])
        .unwrap();
    assert_eq!(setup.disk(&shared).write(WRITE, 0, &[1; 512]), -libc::EROFS);
    let three = setup.overlay(&below, "three");
    torture(&setup, &three, &mut copy, 10);
}

#[test]
fn scatter_lists_of_any_cut_and_batches_beyond_the_depth() {
    let setup = Setup::new();
    let copy = setup.image("base", BYTES);
    let base = setup.file("base", &[]);
    let overlay = setup.overlay(&base, "over");
    let mut disk = setup.disk(&overlay);
    // Every other block is in the file.
    let mut copy = copy;
    for block in (1..256).step_by(2) {
        let bytes = pattern(block, 512);
        assert_eq!(disk.write(WRITE, block * 512, &bytes), 0);
        copy[block as usize * 512..][..512].copy_from_slice(&bytes);
    }
    let memory = setup.host.memory();
    let mut batch = Batch::default();
    // 40 requests of 128 parts each at a depth of 16; segments of 300 and 724 bytes cross the blocks.
    for token in 0..40u64 {
        let list: Vec<_> = (0..64u64)
            .flat_map(|i| {
                let start = token * 65536 + i * 1024;
                [
                    memory.writable(start, 300).unwrap(),
                    memory.writable(start + 300, 724).unwrap(),
                ]
            })
            .collect();
        batch.transfer(token, BlockOp::Read, token * 512, &list);
    }
    let results = run_batch(&mut disk.queue, &mut batch).unwrap();
    assert_eq!(results.len(), 40);
    for (token, result) in results {
        assert_eq!(result, 0);
        let mut bytes = vec![0; 65536];
        memory.read(token * 65536, &mut bytes).unwrap();
        assert!(
            bytes == copy[token as usize * 512..][..65536],
            "request {token}"
        );
    }
}

#[test]
fn requests_outside_of_the_disk_are_refused() {
    let setup = Setup::new();
    setup.image("base", BYTES);
    let base = setup.file("base", &[]);
    let overlay = setup.overlay(&base, "over");
    let mut disk = setup.disk(&overlay);
    assert_eq!(disk.write(WRITE, BYTES, &[1; 512]), -libc::EINVAL);
    assert_eq!(disk.write(WRITE, BYTES - 512, &[1; 1024]), -libc::EINVAL);
    assert_eq!(disk.write(WRITE, 100, &[1; 512]), -libc::EINVAL);
    assert_eq!(
        disk.control(BlockOp::Discard, u64::MAX - 511, 512),
        -libc::EINVAL
    );
    assert_eq!(disk.control(BlockOp::WriteZeroes { unmap: true }, 0, 0), 0);
    let many = vec![setup.host.memory().writable(0, 1).unwrap(); 512];
    assert_eq!(
        run_transfer(&mut disk.queue, BlockOp::Read, 0, &many).unwrap(),
        -libc::EINVAL
    );
}

/// In memory both are read through mappings, each by its own plugin's copy, and each plugin has a handler for what is cut off.
#[test]
fn a_base_and_a_store_in_memory_that_are_cut() {
    let setup = match Setup::within(Path::new("/dev/shm")) {
        Ok(setup) => setup,
        Err(error) => return println!("SKIPPED: /dev/shm can't be used: {error}"),
    };
    setup.image("base", 4 * MIB);
    let base = setup.file("base", &[]);
    let overlay = setup.overlay(&base, "overlay");
    let mut disk = setup.disk(&overlay);
    assert_eq!(disk.write(WRITE, 2 * MIB, &pattern(3, 1 << 20)), 0);
    let before = disk.read(0, 4 << 20);
    let cut = |name: &str, bytes: u64| {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(setup.path(name));
        file.unwrap().set_len(bytes).unwrap();
    };
    let to = setup.host.memory().writable(0, 65536).unwrap();
    let mut code = |at| run_transfer(&mut disk.queue, BlockOp::Read, at, &[to]).unwrap();
    assert_eq!([code(MIB), code(2 * MIB), code(3 * MIB)], [0; 3]);
    cut("base", MIB);
    assert_eq!(
        [code(MIB), code(2 * MIB), code(3 * MIB)],
        [-libc::EIO, 0, -libc::EIO]
    );
    cut("overlay", MIB);
    assert_eq!(code(2 * MIB), -libc::EIO);
    assert!(disk.read(0, 1 << 20) == before[..1 << 20]);
}

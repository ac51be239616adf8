//! Random requests on images that qemu-img has made, and what qemu-img finds in them afterwards; and the other way round.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use support::{Disk, MIB, Random, SECTOR, Setup, exercise};
use vmm_plugin_api::BlockOp;

/// Runs a workload on `disk.qcow2`, which reads as `model` at first, twice with a closed image between.
fn workload(setup: &Setup, name: &str, mut model: Vec<u8>, seed: u64) {
    let mut random = Random(0xfeed_0000 + seed);
    for _ in 0..2 {
        let mut disk = setup.open("disk.qcow2", &[]);
        assert_eq!(disk.size, model.len() as u64);
        exercise(&mut disk, &mut model, &mut random, 100);
        assert!(disk.contents() == model, "{name}");
        drop(disk);
        setup.check("disk.qcow2");
        setup.compare("disk.qcow2", &model);
    }
}

#[test]
fn images_of_all_kinds_take_a_workload() {
    let Some(setup) = Setup::new() else { return };
    let kinds = [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=512,compat=0.10",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4096,refcount_bits=1",
        "cluster_size=4096,refcount_bits=2",
        "cluster_size=8192,refcount_bits=8",
        "cluster_size=65536,refcount_bits=32",
        "cluster_size=2M",
        "cluster_size=1M,compat=0.10",
        "preallocation=metadata",
        "preallocation=falloc,cluster_size=16384",
        "preallocation=full",
        "lazy_refcounts=on",
    ];
    for (seed, options) in kinds.into_iter().enumerate() {
        // The last cluster is no whole one.
        let size = 6 * MIB + 3 * SECTOR;
        setup.create("disk.qcow2", &["-o", options], &size.to_string());
        workload(&setup, options, vec![0; size as usize], seed as u64);
        println!("{options}: done");
    }
}

#[test]
fn chains_show_through_and_stay_as_they_are() {
    let Some(setup) = Setup::new() else { return };
    let mut random = Random(77);
    let base = random.bytes(3 * MIB as usize + 512);
    std::fs::write(setup.path("base.raw"), &base).unwrap();
    for (seed, options) in [
        "cluster_size=65536",
        "cluster_size=4096,compat=0.10",
        "cluster_size=512",
    ]
    .into_iter()
    .enumerate()
    {
        // The disk is longer than what is behind it, and that than what is behind that.
        setup.create(
            "middle.qcow2",
            &["-b", "base.raw", "-F", "raw", "-o", "cluster_size=8192"],
            "5M",
        );
        setup.qemu_io(
            "middle.qcow2",
            &[
                "write -P 0x77 1M 70k",
                "write -z 2M 100k",
                "write -P 0x78 4M 64k",
            ],
        );
        setup.qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "middle.qcow2",
            "-F",
            "qcow2",
            "-o",
            options,
            "disk.qcow2",
            "7M",
        ]);
        let before = std::fs::read(setup.path("middle.qcow2")).unwrap();
        setup.qemu_img(&[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "disk.qcow2",
            "all.raw",
        ]);
        let model = std::fs::read(setup.path("all.raw")).unwrap();
        assert!(setup.open("disk.qcow2", &[]).contents() == model);
        workload(&setup, options, model, 100 + seed as u64);
        assert!(std::fs::read(setup.path("middle.qcow2")).unwrap() == before);
        assert!(std::fs::read(setup.path("base.raw")).unwrap() == base);
    }
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    let Some(setup) = Setup::new() else { return };
    let mut random = Random(78);
    let mut model = vec![0; 5 * MIB as usize + 512];
    // Compresses, but not to nothing.
    for chunk in model.chunks_mut(700) {
        let byte = random.below(256) as u8;
        let alike = chunk.len().min(400);
        chunk[..alike].fill(byte);
    }
    std::fs::write(setup.path("all.raw"), &model).unwrap();
    let kinds = [
        "cluster_size=65536",
        "cluster_size=4096,compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "compression_type=zstd",
        "compression_type=zstd,cluster_size=2M",
    ];
    for (seed, options) in kinds.into_iter().enumerate() {
        setup.qemu_img(&[
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            options,
            "all.raw",
            "disk.qcow2",
        ]);
        let mut disk = setup.open("disk.qcow2", &[("read_only", true.into())]);
        assert!(disk.contents() == model, "{options}");
        assert_eq!(disk.try_write(0, &[1; 512]), -libc::EROFS);
        drop(disk);
        workload(&setup, options, model.clone(), 200 + seed as u64);
    }
}

#[test]
fn snapshots_keep_what_they_have() {
    let Some(setup) = Setup::new() else { return };
    let mut random = Random(79);
    setup.create("disk.qcow2", &["-o", "cluster_size=4096"], "6M");
    let mut model = vec![0; 6 * MIB as usize];
    let mut disk = setup.open("disk.qcow2", &[]);
    exercise(&mut disk, &mut model, &mut random, 150);
    drop(disk);
    setup.qemu_img(&["snapshot", "-c", "then", "disk.qcow2"]);
    let then = model.clone();
    workload(&setup, "with a snapshot", model, 300);
    setup.qemu_img(&["snapshot", "-a", "then", "disk.qcow2"]);
    setup.check("disk.qcow2");
    setup.compare("disk.qcow2", &then);
    workload(&setup, "after going back", then, 301);
}

#[test]
fn what_qemu_writes_is_read() {
    let Some(setup) = Setup::new() else { return };
    setup.create("disk.qcow2", &["-o", "cluster_size=65536"], "64M");
    setup.qemu_io(
        "disk.qcow2",
        &[
            "write -P 0x11 0 200k",
            "write -z 64k 64k",
            "write -P 0x22 33M 1k",
            "discard 0 64k",
            "write -z -u 33M 64k",
            "write -P 0x33 -c 40M 64k",
        ],
    );
    setup.qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        "disk.qcow2",
        "all.raw",
    ]);
    assert!(
        setup.open("disk.qcow2", &[]).contents() == std::fs::read(setup.path("all.raw")).unwrap()
    );
    setup.check("disk.qcow2");
}

/// Neighbouring sectors of the same clusters, from four queues at once.
#[test]
fn queues_share_clusters() {
    let Some(setup) = Setup::new() else { return };
    const QUEUES: u64 = 4;
    for (round, options) in [
        "cluster_size=65536",
        "cluster_size=4096",
        "cluster_size=512",
    ]
    .into_iter()
    .enumerate()
    {
        let base = Random(5).bytes(4 * MIB as usize);
        std::fs::write(setup.path("base.raw"), &base).unwrap();
        setup.create(
            "disk.qcow2",
            &["-b", "base.raw", "-F", "raw", "-o", options],
            "4M",
        );
        let backend = setup.try_open("disk.qcow2", &[]).unwrap();
        let mut model = base;
        let sectors = model.len() as u64 / SECTOR;
        let written: Vec<_> = std::thread::scope(|scope| {
            let block = backend.as_block().unwrap();
            let threads: Vec<_> = (0..QUEUES)
                .map(|number| {
                    let mut queue = block.open_queue(16).unwrap();
                    let memory = setup.host.memory().writable(number * MIB, MIB).unwrap();
                    scope.spawn(move || {
                        let mut random = Random(900 + number + 10 * round as u64);
                        let mut written = std::collections::BTreeMap::new();
                        for step in 0..150 {
                            let mut batch = vmm_plugin_api::Batch::default();
                            let mut used = std::collections::BTreeSet::new();
                            for token in 0..8u64 {
                                // Each queue has the sectors with its number.
                                let sector = random.below(sectors / QUEUES) * QUEUES + number;
                                if !used.insert(sector) {
                                    continue;
                                }
                                let bytes = random.bytes(SECTOR as usize);
                                let piece = memory.part((token * SECTOR) as usize, SECTOR as usize);
                                piece.write(0, &bytes);
                                batch.transfer(
                                    token,
                                    BlockOp::Write { fua: false },
                                    sector * SECTOR,
                                    &[piece],
                                );
                                written.insert(sector, bytes);
                            }
                            if step % 20 == number {
                                batch.control(100, BlockOp::Flush, 0, 0);
                            }
                            assert!(
                                support::run(&mut queue, &mut batch)
                                    .values()
                                    .all(|code| *code == 0)
                            );
                        }
                        written
                    })
                })
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        for (sector, bytes) in written {
            let at = (sector * SECTOR) as usize;
            model[at..at + SECTOR as usize].copy_from_slice(&bytes);
        }
        let mut disk = Disk::new(&setup.host, backend, 0);
        assert!(disk.contents() == model, "{options}");
        drop(disk);
        setup.check("disk.qcow2");
        setup.compare("disk.qcow2", &model);
    }
}

/// Many small clusters: refcount blocks and a longer refcount table are needed.
#[test]
fn the_refcount_table_grows() {
    let Some(setup) = Setup::new() else { return };
    setup.create(
        "disk.qcow2",
        &["-o", "cluster_size=512,refcount_bits=64"],
        "40M",
    );
    let mut disk = setup.open("disk.qcow2", &[("skip_flush", true.into())]);
    let bytes = Random(4).bytes(MIB as usize);
    for at in (0..40).map(|i| i * MIB) {
        disk.write(at, &bytes);
    }
    assert!((0..40).all(|i| disk.read(i * MIB, MIB) == bytes));
    drop(disk);
    setup.check("disk.qcow2");
    let mut disk = setup.open("disk.qcow2", &[]);
    assert_eq!(disk.request(BlockOp::Discard, 0, 40 * MIB), 0);
    disk.flush();
    assert!(disk.contents().iter().all(|byte| *byte == 0));
    drop(disk);
    setup.check("disk.qcow2");
    use std::os::unix::fs::MetadataExt;
    let blocks = std::fs::metadata(setup.path("disk.qcow2"))
        .unwrap()
        .blocks();
    assert!(
        blocks * 512 < 10 * MIB,
        "{blocks} blocks are left of 40 MiB"
    );
}

//! Drives the disk as a device does, through the ABI.

#![allow(clippy::expect_used)] // helpers of tests

use vmm_plugin_api::abi::block::{BLOCK_DISCARD, BLOCK_READ_ONLY, BLOCK_WRITE_ZEROES};
use vmm_plugin_api::testing::{Backend, FakeHost, Value};
use vmm_plugin_api::{Batch, BlockDone, BlockOp, BlockQueueHandle};
use vmm_plugin_memory::VMM_PLUGIN;

const MIB: u64 = 1 << 20;

fn disk(host: &FakeHost, size: u64, block: u64, read_only: bool) -> Result<Backend, String> {
    let options: [(&str, Value); 5] = [
        ("size", size.into()),
        ("block_size", block.into()),
        ("read_only", read_only.into()),
        ("workers", 8u64.into()),
        ("skip_flush", false.into()),
    ];
    host.block(&VMM_PLUGIN, "mem-async", &options)
        .map_err(|e| format!("{e:#}"))
}

fn finish(queue: &mut BlockQueueHandle, batch: &mut Batch) -> Vec<(u64, i32)> {
    queue.submit(batch);
    let mut done = [BlockDone::default(); 64];
    let count = queue.reap(&mut done);
    done[..count].iter().map(|d| (d.token, d.result)).collect()
}

/// Resident kilobytes of this process.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc");
    let line = status
        .lines()
        .find(|l| l.starts_with("RssAnon:"))
        .expect("RssAnon");
    line.split_whitespace()
        .nth(1)
        .expect("number")
        .parse()
        .expect("number")
}

#[test]
fn what_is_written_in_pieces_reads_back_whole() {
    let host = FakeHost::new(4 * MIB);
    let memory = host.memory();
    let backend = disk(&host, 64 * MIB, 512, false).expect("create");
    let block = backend.as_block().expect("block");
    assert!(block.info().expect("info").features & (BLOCK_DISCARD | BLOCK_WRITE_ZEROES) != 0);
    let mut queue = block.open_queue(8).expect("queue");
    assert!(queue.fd().is_none());
    let pattern: Vec<u8> = (0..4096u32).map(|i| (i * 7 % 251) as u8).collect();
    memory.write(0x1000, &pattern).expect("fill");
    let pieces = [(0x1000, 100), (0x1064, 924), (0x1400, 3072)]
        .map(|(a, n)| memory.readable(a, n).expect("RAM"));
    let mut batch = Batch::default();
    batch.transfer(1, BlockOp::Write { fua: true }, 63 * MIB, &pieces);
    batch.control(2, BlockOp::Flush, 0, 0);
    batch.transfer(
        3,
        BlockOp::Read,
        63 * MIB,
        &[memory.writable(0x8000, 4096).expect("RAM")],
    );
    assert_eq!(finish(&mut queue, &mut batch), [(1, 0), (2, 0), (3, 0)]);
    let mut back = vec![0; 4096];
    memory.read(0x8000, &mut back).expect("RAM");
    assert_eq!(back, pattern);
}

#[test]
fn cleared_ranges_read_as_zero_and_give_their_pages_back() {
    let host = FakeHost::new(4 * MIB);
    let memory = host.memory();
    let backend = disk(&host, 64 * MIB, 512, false).expect("create");
    let mut queue = backend
        .as_block()
        .expect("block")
        .open_queue(64)
        .expect("queue");
    let buffer = memory.writable(0, MIB).expect("RAM");
    buffer.fill(0xaa);
    let before = resident();
    let mut batch = Batch::default();
    for i in 0..64 {
        batch.transfer(i, BlockOp::Write { fua: false }, i * MIB, &[buffer]);
    }
    assert!(finish(&mut queue, &mut batch).iter().all(|d| d.1 == 0));
    let full = resident();
    assert!(
        full > before + 50_000,
        "the disk's pages are resident: {before} then {full} kB"
    );
    batch.control(1, BlockOp::Discard, 512, 32 * MIB - 512);
    batch.control(
        2,
        BlockOp::WriteZeroes { unmap: true },
        32 * MIB,
        32 * MIB - 512,
    );
    assert_eq!(finish(&mut queue, &mut batch), [(1, 0), (2, 0)]);
    let cleared = resident();
    println!(
        "anonymous memory: {before} kB, {full} kB with a full disk, {cleared} kB after discard"
    );
    assert!(
        cleared + 45_000 < full,
        "pages came back: {full} then {cleared} kB"
    );
    // The first and the last block are outside the cleared ranges, the ones beside them inside.
    for (offset, byte) in [
        (0, 0xaa),
        (512, 0),
        (4096, 0),
        (40 * MIB, 0),
        (64 * MIB - 1024, 0),
        (64 * MIB - 512, 0xaa),
    ] {
        let slice = memory.writable(0, 512).expect("RAM");
        slice.fill(1);
        batch.transfer(3, BlockOp::Read, offset, &[slice]);
        assert_eq!(finish(&mut queue, &mut batch), [(3, 0)]);
        let mut got = [1; 512];
        slice.read(0, &mut got);
        assert_eq!(got, [byte; 512], "block at {offset}");
    }
}

#[test]
fn a_full_queue_takes_no_more_until_reaped() {
    let host = FakeHost::new(MIB);
    let backend = disk(&host, MIB, 512, false).expect("create");
    let mut queue = backend
        .as_block()
        .expect("block")
        .open_queue(4)
        .expect("queue");
    let mut batch = Batch::default();
    for i in 0..6 {
        batch.control(i, BlockOp::Flush, 0, 0);
    }
    assert_eq!(queue.submit(&mut batch), 4);
    assert_eq!(queue.submit(&mut batch), 0);
    let mut done = [BlockDone::default(); 2];
    assert_eq!(queue.reap(&mut done), 2);
    assert_eq!(queue.submit(&mut batch), 2);
    assert!(batch.is_empty());
}

#[test]
fn requests_outside_or_across_the_end_or_on_a_read_only_disk_fail() {
    let host = FakeHost::new(MIB);
    let memory = host.memory();
    let slice = memory.writable(0, 4096).expect("RAM");
    let backend = disk(&host, MIB, 4096, false).expect("create");
    let mut queue = backend
        .as_block()
        .expect("block")
        .open_queue(16)
        .expect("queue");
    let mut batch = Batch::default();
    batch.transfer(1, BlockOp::Read, MIB, &[slice]);
    batch.transfer(2, BlockOp::Read, 512, &[slice]);
    batch.transfer(3, BlockOp::Write { fua: false }, u64::MAX - 4095, &[slice]);
    batch.control(4, BlockOp::Discard, 0, MIB + 4096);
    batch.transfer(5, BlockOp::Read, MIB - 4096, &[slice]);
    let results: Vec<i32> = finish(&mut queue, &mut batch).iter().map(|d| d.1).collect();
    assert_eq!(
        results,
        [
            -libc::EINVAL,
            -libc::EINVAL,
            -libc::EINVAL,
            -libc::EINVAL,
            0
        ]
    );

    let backend = disk(&host, MIB, 512, true).expect("create");
    let block = backend.as_block().expect("block");
    assert_eq!(block.info().expect("info").features, BLOCK_READ_ONLY);
    let mut queue = block.open_queue(16).expect("queue");
    batch.transfer(1, BlockOp::Write { fua: false }, 0, &[slice]);
    batch.control(2, BlockOp::WriteZeroes { unmap: false }, 0, 512);
    batch.transfer(3, BlockOp::Read, 0, &[slice]);
    let results: Vec<i32> = finish(&mut queue, &mut batch).iter().map(|d| d.1).collect();
    assert_eq!(results, [-libc::EROFS, -libc::EROFS, 0]);
}

#[test]
fn bad_sizes_are_refused_with_the_reason() {
    let host = FakeHost::new(MIB);
    for (size, block, expected) in [
        (MIB + 1, 512, "multiple of `block_size` (512)"),
        (0, 512, "above 0"),
        (MIB, 1000, "power of two from 512 to 65536"),
        (MIB, 131_072, "power of two from 512 to 65536"),
        (1 << 60, 512, "this machine has"),
    ] {
        let error = disk(&host, size, block, false).err().expect("refused");
        assert!(
            error.contains(expected),
            "{size} in blocks of {block}: {error}"
        );
    }
}

#[test]
fn queues_of_one_disk_run_in_parallel() {
    let host = FakeHost::new(8 * MIB);
    let memory = host.memory();
    let backend = disk(&host, 8 * MIB, 512, false).expect("create");
    let block = backend.as_block().expect("block");
    std::thread::scope(|scope| {
        for n in 0..8u64 {
            let mut queue = block.open_queue(4).expect("queue");
            scope.spawn(move || {
                let slice = memory.writable(n * MIB, 65536).expect("RAM");
                let mut batch = Batch::default();
                for round in 0..50u8 {
                    slice.fill(round ^ n as u8);
                    batch.transfer(1, BlockOp::Write { fua: false }, n * MIB, &[slice]);
                    assert_eq!(finish(&mut queue, &mut batch), [(1, 0)]);
                    slice.fill(0xff);
                    batch.transfer(2, BlockOp::Read, n * MIB, &[slice]);
                    assert_eq!(finish(&mut queue, &mut batch), [(2, 0)]);
                    let mut got = vec![0; 65536];
                    slice.read(0, &mut got);
                    assert!(got.iter().all(|b| *b == round ^ n as u8));
                }
            });
        }
    });
}

//! Reads and writes of clusters that are there allocate nothing.

#![allow(clippy::expect_used, unsafe_code)] // tests; a global allocator is unsafe to write

mod support;

use support::{MIB, Setup, wait};
use vmm_plugin_api::testing::{CountingAllocator, allocations, allocations_elsewhere};
use vmm_plugin_api::{Batch, BlockDone, BlockOp, BlockQueueHandle};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// As `support::run`, without its map.
fn finish(queue: &mut BlockQueueHandle, batch: &mut Batch) {
    let mut done = [BlockDone::default(); 64];
    let mut left = batch.len();
    while !batch.is_empty() || left > 0 {
        queue.submit(batch);
        let count = queue.reap(&mut done);
        left -= count;
        assert!(done[..count].iter().all(|d| d.result == 0));
        if left > 0 && count == 0 {
            wait(queue);
        }
    }
}

#[test]
fn batches_of_reads_and_writes_allocate_nothing() {
    let Some(setup) = Setup::new() else { return };
    setup.create("disk.qcow2", &["-o", "cluster_size=4096"], "1M");
    let backend = setup
        .try_open("disk.qcow2", &[("workers", 1u64.into())])
        .expect("open");
    let mut queue = backend
        .as_block()
        .expect("block")
        .open_queue(64)
        .expect("queue");
    let slice = setup.host.memory().writable(0, MIB).expect("RAM");
    let mut batch = Batch::default();
    batch.transfer(0, BlockOp::Write { fua: true }, 0, &[slice]);
    finish(&mut queue, &mut batch);
    let list = vec![slice.part(0, 512); 8];
    let mut round = || {
        for i in 0..32 {
            let op = if i % 2 == 0 {
                BlockOp::Read
            } else {
                BlockOp::Write { fua: i == 31 }
            };
            // Half of a cluster and half of the next, which need not stand behind it.
            batch.transfer(i, op, i * 4096 + 2048, &list);
        }
        finish(&mut queue, &mut batch);
        batch.transfer(0, BlockOp::Read, 0, &list);
        finish(&mut queue, &mut batch);
    };
    (0..5).for_each(|_| round());
    let before = allocations() + allocations_elsewhere();
    (0..50).for_each(|_| round());
    let allocations = (allocations() + allocations_elsewhere()) - before;
    assert_eq!(allocations, 0, "allocations in 1650 requests");
}

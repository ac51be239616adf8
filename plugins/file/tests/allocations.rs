//! Requests allocate nothing.

#![allow(clippy::expect_used, unsafe_code)] // tests; a global allocator is unsafe to write

mod support;

use support::{MIB, each_mode, wait};
use vmm_plugin_api::testing::{CountingAllocator, allocations};
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
    each_mode(|setup| {
        let backend = setup.open(&setup.image("disk", MIB), &[]);
        let mut queue = backend
            .as_block()
            .expect("block")
            .open_queue(64)
            .expect("queue");
        let slice = setup.host.memory().writable(0, 4096).expect("RAM");
        let list = vec![slice.part(0, 512); 8];
        let mut batch = Batch::default();
        let mut round = || {
            for i in 0..32 {
                let op = if i % 2 == 0 {
                    BlockOp::Read
                } else {
                    BlockOp::Write { fua: i == 31 }
                };
                batch.transfer(i, op, i * 4096, &list);
            }
            finish(&mut queue, &mut batch);
            batch.transfer(0, BlockOp::Read, 0, &list);
            finish(&mut queue, &mut batch);
        };
        round();
        let before = allocations();
        for _ in 0..50 {
            round();
        }
        assert_eq!(
            allocations() - before,
            0,
            "{:?}: allocations in 1650 requests",
            setup.mode
        );
    });
}

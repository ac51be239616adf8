//! Requests allocate nothing.

#![allow(clippy::expect_used, unsafe_code)] // tests; a global allocator is unsafe to write

mod support;

use support::{MIB, disk};
use vmm_plugin_api::testing::FakeHost;
use vmm_plugin_api::testing::{CountingAllocator, allocations};
use vmm_plugin_api::{Batch, BlockDone, BlockOp};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

#[test]
fn batches_of_reads_allocate_nothing() {
    let host = FakeHost::new(2 * MIB as u64);
    let backend = disk(&host, &[("user-data", "#cloud-config\n")], 512).expect("create");
    let mut queue = backend
        .as_block()
        .expect("block")
        .open_queue(64)
        .expect("queue");
    let slice = host.memory().writable(0, 4096).expect("RAM");
    let list = vec![slice.part(0, 512); 8];
    let mut batch = Batch::default();
    let mut done = [BlockDone::default(); 64];
    let mut round = || {
        for i in 0..32 {
            batch.transfer(i, BlockOp::Read, (i % 4) * 512, &list);
        }
        queue.submit(&mut batch);
        assert_eq!(queue.reap(&mut done), 32);
        assert!(done[..32].iter().all(|d| d.result == 0));
    };
    round();
    let before = allocations();
    for _ in 0..50 {
        round();
    }
    assert_eq!(allocations() - before, 0, "allocations in 1600 requests");
}

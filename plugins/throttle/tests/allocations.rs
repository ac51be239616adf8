//! Requests allocate nothing, whether they wait or not.

#![allow(clippy::unwrap_used, clippy::expect_used, unsafe_code)] // tests; a global allocator is unsafe to write

use vmm_plugin_api::testing::{CountingAllocator, allocations};
use vmm_plugin_api::testing::{FakeHost, Value, load};
use vmm_plugin_api::{Batch, BlockDone, BlockOp, BlockQueueHandle};
use vmm_plugin_throttle::VMM_PLUGIN;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn finish(queue: &mut BlockQueueHandle, batch: &mut Batch) {
    let mut done = [BlockDone::default(); 64];
    let mut left = batch.len();
    while left > 0 {
        queue.submit(batch);
        let count = queue.reap(&mut done);
        left -= count;
        assert!(done[..count].iter().all(|d| d.result == 0));
        if left > 0 && count == 0 {
            let fd = queue.fd().unwrap();
            let wait = rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN);
            rustix::event::poll(&mut [wait], None).unwrap();
            queue.drain();
        }
    }
}

#[test]
fn requests_allocate_nothing() {
    let host = FakeHost::new(1 << 20);
    let options: [(&str, Value); 3] = [
        ("size", (1u64 << 20).into()),
        ("block_size", 512u64.into()),
        ("read_only", false.into()),
    ];
    let root = load("vmm-plugin-memory").unwrap();
    let memory = host.block(root, "mem-async", &options).unwrap();
    let options: [(&str, Value); 4] = [
        ("backing", Value::from(&memory)),
        ("bytes_per_second", 300_000_000u64.into()),
        ("ops_per_second", 60_000u64.into()),
        ("read_only", false.into()),
    ];
    let layer = host.block(&VMM_PLUGIN, "throttle", &options).unwrap();
    let mut queue = layer.as_block().unwrap().open_queue(64).unwrap();
    let slice = host.memory().writable(0, 4096).unwrap();
    let list = vec![slice.part(0, 512); 8];
    let mut batch = Batch::default();
    let mut round = || {
        for i in 0..32 {
            let op = match i % 2 {
                0 => BlockOp::Read,
                _ => BlockOp::Write { fua: i == 31 },
            };
            batch.transfer(i, op, i * 512, &list);
        }
        finish(&mut queue, &mut batch);
        batch.control(0, BlockOp::Flush, 0, 0);
        finish(&mut queue, &mut batch);
    };
    for _ in 0..20 {
        round();
    }
    let before = allocations();
    for _ in 0..50 {
        round();
    }
    assert_eq!(allocations() - before, 0, "allocations in 1650 requests");
    drop(std::hint::black_box(vec![1u8]));
    assert!(allocations() > before, "allocations are counted");
    assert_eq!(host.faults(), Vec::<String>::new());
}

//! Requests allocate nothing.

#![allow(clippy::expect_used, unsafe_code)] // tests; a global allocator is unsafe to write

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use support::{MIB, disk};
use vmm_plugin_api::testing::FakeHost;
use vmm_plugin_api::{Batch, BlockDone, BlockOp};

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: hands every call on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|c| c.set(c.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

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
    let before = COUNT.get();
    for _ in 0..50 {
        round();
    }
    assert_eq!(COUNT.get() - before, 0, "allocations in 1600 requests");
}

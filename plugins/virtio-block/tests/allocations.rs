//! The data path allocates nothing once it has warmed up.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::*;

/// Counts what other threads than the test's allocate, which is the queue's: the backend here has none.
struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static IS_TEST: Cell<bool> = const { Cell::new(false) };
}

fn note() {
    if !IS_TEST.try_with(Cell::get).unwrap_or(true) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
}

#[allow(unsafe_code)] // a global allocator
// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
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
fn requests_allocate_nothing() {
    IS_TEST.set(true);
    let setup = Setup::new(Shape {
        null: true,
        ..Shape::default()
    });
    let mut disk = setup.disk();
    let mut round = || {
        let pending: Vec<_> = (0..16).map(|i| disk.add(T_IN, i, &[], 512)).collect();
        disk.queue.kick(&setup.device);
        for _ in &pending {
            assert!(disk.queue.wait(WAIT).is_some());
        }
        assert!(pending.iter().all(|p| disk.status(p) == S_OK));
    };
    for _ in 0..20 {
        round();
    }
    let before = COUNT.load(Ordering::Relaxed);
    for _ in 0..200 {
        round();
    }
    assert_eq!(COUNT.load(Ordering::Relaxed), before);
    std::thread::spawn(|| drop(std::hint::black_box(vec![1u8])))
        .join()
        .unwrap();
    assert!(
        COUNT.load(Ordering::Relaxed) > before,
        "allocations are counted"
    );
}

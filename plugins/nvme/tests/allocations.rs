//! The data path allocates nothing once it has warmed up.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

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
fn commands_allocate_nothing() {
    IS_TEST.set(true);
    for shadow in [false, true] {
        let setup = Setup::new(Shape {
            null: true,
            ..Shape::default()
        });
        let (mut driver, mut pair) = setup.disk();
        if shadow {
            driver.enable_shadow();
        }
        let at = driver.allocate(64 << 10, 4096);
        let long = driver.with_prps(Cmd::rw(READ, 0, 128), at, 64 << 10);
        let mut round = || {
            for i in 0..16 {
                let short = Cmd::rw(WRITE, i, 1).prp(at, 0);
                let zero = Cmd::rw(WRITE_ZEROES, i, 3000);
                let cmd = [short, long, zero, Cmd::rw(COMPARE, 0, 1).prp(at, 0)];
                driver.add(&mut pair, cmd[i as usize % 4]);
            }
            driver.ring(&mut pair);
            for _ in 0..16 {
                let status = driver.wait(&mut pair).status;
                assert!(status == OK || status == COMPARE_FAILURE);
            }
        };
        for _ in 0..20 {
            round();
        }
        let before = COUNT.load(Ordering::Relaxed);
        for _ in 0..200 {
            round();
        }
        assert_eq!(COUNT.load(Ordering::Relaxed), before);
    }
    let before = COUNT.load(Ordering::Relaxed);
    std::thread::spawn(|| drop(std::hint::black_box(vec![1u8])))
        .join()
        .unwrap();
    assert!(
        COUNT.load(Ordering::Relaxed) > before,
        "allocations are counted"
    );
}

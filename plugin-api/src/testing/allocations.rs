//! Counts what tests of hot paths allocate.

#![allow(unsafe_code)] // a global allocator

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

static ALL: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static OWN: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting. A test program makes it its own: `#[global_allocator] static A: CountingAllocator = CountingAllocator;`
pub struct CountingAllocator;

// SAFETY: every call goes on to the system's allocator as it came.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALL.fetch_add(1, Ordering::Relaxed);
        // A thread that ends has lost its count, and nobody reads it.
        let _ = OWN.try_with(|own| own.set(own.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

/// What the calling thread has allocated so far, if the program's allocator is a [`CountingAllocator`].
#[must_use]
pub fn allocations() -> u64 {
    OWN.get()
}

/// What all other threads have.
#[must_use]
pub fn allocations_elsewhere() -> u64 {
    ALL.load(Ordering::Relaxed) - OWN.get()
}

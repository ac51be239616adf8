//! The data path allocates nothing once it has warmed up.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod support;

use support::*;
use vmm_plugin_api::testing::{CountingAllocator, allocations_elsewhere};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

#[test]
fn commands_allocate_nothing() {
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
        let before = allocations_elsewhere();
        for _ in 0..200 {
            round();
        }
        assert_eq!(allocations_elsewhere(), before);
    }
    let before = allocations_elsewhere();
    std::thread::spawn(|| drop(std::hint::black_box(vec![1u8])))
        .join()
        .unwrap();
    assert!(allocations_elsewhere() > before, "allocations are counted");
}

//! The data path allocates nothing once it has warmed up.

mod support;

use support::*;
use vmm_plugin_api::testing::{CountingAllocator, allocations_elsewhere};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

#[test]
fn requests_allocate_nothing() {
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
    let before = allocations_elsewhere();
    for _ in 0..200 {
        round();
    }
    assert_eq!(allocations_elsewhere(), before);
    std::thread::spawn(|| drop(std::hint::black_box(vec![1u8])))
        .join()
        .unwrap();
    assert!(allocations_elsewhere() > before, "allocations are counted");
}

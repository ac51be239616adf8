//! Reset, pause and stop under load, several queues, interrupts, and backends that fail.

mod support;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use support::*;
use vmm_plugin_api::testing::VirtioDriver;

const F_EVENT: u64 = 1 << 29;

fn threaded() -> Shape {
    Shape {
        threaded: true,
        ..Shape::default()
    }
}

fn eventually(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + WAIT;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[test]
fn one_interrupt_for_a_batch_and_none_that_is_not_wanted() {
    for features in [u64::MAX, !F_EVENT] {
        let setup = Setup::new(Shape::default());
        let mut disk = setup.disk_with(features, 64);
        disk.queue.want_interrupt(None);
        disk.write(0, &[1; 512]);
        // Added while nothing looks at the queue, so that they are one batch.
        setup.device.pause().unwrap();
        disk.queue.want_interrupt(Some(0));
        let pending: Vec<_> = (0..16).map(|i| disk.add(T_IN, i, &[], 512)).collect();
        assert_eq!(setup.device.interrupts(0), 0);
        let submits = setup.control.submits.load(Ordering::Relaxed);
        assert!(disk.queue.kick(&setup.device), "the device wants to know");
        setup.device.resume().unwrap();
        for _ in &pending {
            assert!(disk.queue.wait(WAIT).is_some());
        }
        eventually("an interrupt", || setup.device.interrupts(0) == 1);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(setup.device.interrupts(0), 0, "only one");
        assert_eq!(setup.control.submits.load(Ordering::Relaxed), submits + 1);
        assert!(pending.iter().all(|p| disk.status(p) == S_OK));
        assert_eq!(setup.device.interrupts(1), 0, "no configuration change");
    }
}

#[test]
fn intx_is_raised_until_the_isr_is_read() {
    let setup = Setup::new(Shape::default());
    setup.device.enable_msix(false);
    for modern in [true, false] {
        let mut disk = if modern {
            setup.disk()
        } else {
            setup.legacy_disk(0)
        };
        let rises = setup.device.pin_rises(0);
        disk.write(0, &[1; 512]);
        eventually("the pin rises", || setup.device.pin(0));
        assert_eq!(disk.driver.isr(), 1);
        assert!(!setup.device.pin(0));
        assert_eq!(disk.driver.isr(), 0);
        disk.queue.want_interrupt(Some(0));
        disk.write(0, &[1; 512]);
        eventually("it rises again", || setup.device.pin_rises(0) == rises + 2);
        disk.driver.reset(WAIT).unwrap();
        assert!(!setup.device.pin(0), "reset lowers the pin");
        assert_eq!(setup.device.interrupts(0), 0);
    }
}

#[test]
fn queues_work_side_by_side() {
    for shape in [Shape::default(), threaded()] {
        let setup = Setup::with(shape, &[("queues", 4u64.into())]);
        let mut driver = VirtioDriver::modern(&setup.host, &setup.device).unwrap();
        driver.negotiate(u64::MAX).unwrap();
        let queues: Vec<_> = (0..4).map(|i| driver.queue(i, 32, i).unwrap()).collect();
        driver.ready().unwrap();
        let mut disk = Disk {
            device: &setup.device,
            driver,
            queue: setup_queue(&setup),
        };
        let mut pending = Vec::new();
        for (i, queue) in (0u64..).zip(queues) {
            disk.queue = queue;
            let data = pattern(i, 4096);
            let p: Vec<_> = (0..10)
                .map(|n| disk.add(T_OUT, i * 100 + n * 8, &data, 0))
                .collect();
            disk.queue.kick(&setup.device);
            pending.push((std::mem::replace(&mut disk.queue, setup_queue(&setup)), p));
        }
        for (i, (mut queue, p)) in (0u32..).zip(pending) {
            for _ in 0..10 {
                assert!(queue.wait(WAIT).is_some(), "queue {i}");
            }
            assert!(p.iter().all(|p| disk.status(p) == S_OK));
            eventually("its interrupt", || setup.device.interrupts(i) > 0);
        }
        for i in 0..4 {
            let at = i as usize * 100 * 512;
            assert_eq!(setup.control.bytes(at, 4096), pattern(i, 4096));
        }
        assert_eq!(setup.device.counter("writes"), 40);
    }
}

/// A queue that is never used: something to put in a place.
fn setup_queue(setup: &Setup) -> vmm_plugin_api::testing::DriverQueue {
    vmm_plugin_api::testing::DriverQueue::detached(&setup.host)
}

#[test]
fn reset_under_load_waits_for_the_backend_and_touches_nothing_after() {
    let setup = Setup::new(threaded());
    for round in 0..20u64 {
        let mut disk = setup.disk();
        setup.control.hold(true);
        let pending: Vec<_> = (0..8).map(|i| disk.add(T_IN, i, &[], 512)).collect();
        disk.queue.kick(&setup.device);
        if round.is_multiple_of(2) {
            std::thread::sleep(Duration::from_millis(2));
        }
        disk.driver.begin_reset();
        let busy = setup.control.submits.load(Ordering::Relaxed) > 0;
        if round == 0 && busy {
            assert_ne!(
                disk.driver.status(),
                0,
                "the backend still writes to memory"
            );
        }
        setup.control.hold(false);
        disk.driver.reset(WAIT).unwrap();
        // The driver takes its memory back: from here on the device must leave it alone.
        let pages = disk.queue.descriptors..disk.driver.allocate(1, 4096);
        let len = (pages.end - pages.start) as u32;
        let memory = disk.driver.memory();
        memory
            .write(pages.start, &vec![S_NONE; len as usize])
            .unwrap();
        let _ = setup.device.interrupts(0);
        std::thread::sleep(Duration::from_millis(1));
        let after = disk.bytes(pages.start, len);
        assert!(after.iter().all(|b| *b == S_NONE), "round {round}");
        assert_eq!(setup.device.interrupts(0), 0, "round {round}");
        drop(pending);
    }
    setup.disk().read(0, 512);
    assert_eq!(setup.host.faults(), Vec::<String>::new());
}

#[test]
fn pause_finishes_what_is_in_flight_and_resume_takes_the_rest() {
    for shape in [Shape::default(), threaded()] {
        let setup = Setup::new(shape);
        let mut disk = setup.disk();
        for round in 0..50u64 {
            let pending: Vec<_> = (0..8).map(|i| disk.add(T_IN, i, &[], 512)).collect();
            disk.queue.kick(&setup.device);
            if round.is_multiple_of(3) {
                std::thread::sleep(Duration::from_micros(100));
            }
            setup.device.pause().unwrap();
            let mut seen = 0;
            while disk.queue.take_used().is_some() {
                seen += 1;
            }
            let ops = setup.control.ops().len();
            assert_eq!(ops % 8, seen % 8, "what was started is finished");
            std::thread::sleep(Duration::from_micros(200));
            assert_eq!(setup.control.ops().len(), ops, "nothing moves while paused");
            assert!(disk.queue.take_used().is_none());
            setup.device.resume().unwrap();
            for _ in seen..8 {
                assert!(disk.queue.wait(WAIT).is_some(), "round {round}");
            }
            assert!(pending.iter().all(|p| disk.status(p) == S_OK));
        }
        let pending = disk.add(T_IN, 0, &[], 512);
        setup.device.pause().unwrap();
        setup.device.reset().unwrap();
        assert_eq!(disk.driver.status(), 0);
        setup.device.resume().unwrap();
        disk.queue.notify(&setup.device);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(
            disk.status(&pending),
            S_NONE,
            "after reset there are no queues"
        );
        setup.disk().read(0, 512);
    }
}

#[test]
fn stop_under_load_finishes_what_was_taken() {
    let setup = Setup::new(threaded());
    let mut disk = setup.disk();
    let pending: Vec<_> = (0..8).map(|i| disk.add(T_OUT, i, &[7; 512], 0)).collect();
    disk.queue.kick(&setup.device);
    eventually("the backend starts", || !setup.control.ops().is_empty());
    setup.device.stop();
    let done = pending.iter().filter(|p| disk.status(p) == S_OK).count();
    let untouched = pending.iter().filter(|p| disk.status(p) == S_NONE).count();
    assert!(done > 0);
    assert_eq!(
        done,
        setup.control.ops().len(),
        "what was taken is answered"
    );
    assert_eq!(done + untouched, 8);
}

#[test]
fn backend_errors_reach_the_guest_and_nothing_else_fails() {
    for shape in [Shape::default(), threaded()] {
        let setup = Setup::new(shape);
        let mut disk = setup.disk();
        setup.control.bad.store(10 * 512, Ordering::Relaxed);
        assert_eq!(disk.request(T_IN, 8, &[], 4096).0, S_IOERR);
        assert_eq!(disk.request(T_OUT, 10, &[1; 512], 0).0, S_IOERR);
        disk.read(11, 512);
        eventually("counted", || setup.device.counter("errors") == 2);
    }
}

#[test]
fn a_backend_that_takes_little_at_a_time_gets_everything() {
    for shape in [Shape::default(), threaded()] {
        let setup = Setup::new(shape);
        setup.control.room.store(3, Ordering::Relaxed);
        let mut disk = setup.disk();
        let pending: Vec<_> = (0..40).map(|i| disk.add(T_IN, i, &[], 512)).collect();
        disk.queue.kick(&setup.device);
        for _ in 0..40 {
            assert!(disk.queue.wait(WAIT).is_some());
        }
        assert!(pending.iter().all(|p| disk.status(p) == S_OK));
    }
}

#[test]
fn a_dead_backend_fails_requests_and_the_device_does_not_spin() {
    for shape in [Shape::default(), threaded()] {
        let setup = Setup::new(shape);
        let mut disk = setup.disk();
        disk.read(0, 512);
        setup.control.dead.store(true, Ordering::Relaxed);
        assert_eq!(disk.request(T_IN, 0, &[], 512).0, S_IOERR);
        let submits = setup.control.submits.load(Ordering::Relaxed);
        assert_eq!(disk.request(T_IN, 0, &[], 512).0, S_IOERR);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(setup.control.submits.load(Ordering::Relaxed), submits);
        setup.device.pause().unwrap();
        setup.device.resume().unwrap();
    }
}

#[test]
fn a_backend_that_panics_is_a_dead_backend() {
    let setup = Setup::new(Shape::default());
    let mut disk = setup.disk();
    setup.control.panic.store(true, Ordering::Relaxed);
    assert_eq!(disk.request(T_IN, 0, &[], 512).0, S_IOERR);
    assert_eq!(disk.request(T_FLUSH, 0, &[], 0).0, S_IOERR);
    let faults = setup.host.faults();
    assert!(
        faults.len() == 1 && faults[0].contains("told to panic"),
        "{faults:?}"
    );
    disk.driver.reset(WAIT).unwrap();
}

#[test]
fn requests_of_a_backend_that_fails_elsewhere_do_not_hang() {
    let setup = Setup::with(threaded(), &[("queues", 2u64.into())]);
    let mut driver = VirtioDriver::modern(&setup.host, &setup.device).unwrap();
    driver.negotiate(u64::MAX).unwrap();
    let queue = driver.queue(0, 16, 0).unwrap();
    let other = driver.queue(1, 16, 1).unwrap();
    driver.ready().unwrap();
    let mut disk = Disk {
        device: &setup.device,
        driver,
        queue,
    };
    setup.control.hold(true);
    let stuck = disk.add(T_IN, 0, &[], 512);
    disk.queue.kick(&setup.device);
    eventually("the backend has it", || {
        setup.control.submits.load(Ordering::Relaxed) == 1
    });
    // The backend panics under another queue's thread, and never completes what this queue has given it.
    setup.control.panic.store(true, Ordering::Relaxed);
    let mut queue = std::mem::replace(&mut disk.queue, other);
    assert_eq!(disk.request(T_IN, 0, &[], 512).0, S_IOERR);
    assert!(queue.wait(WAIT).is_some(), "the device notices");
    assert_eq!(disk.status(&stuck), S_IOERR);
    setup.device.pause().unwrap();
    setup.device.resume().unwrap();
    setup.control.hold(false);
}

#[test]
fn pages_that_requests_write_are_marked() {
    let setup = Setup::new(threaded());
    let mut disk = setup.disk_with(0, 16);
    setup.control.hold(true);
    let pending = disk.add(T_IN, 0, &[], 512);
    disk.queue.kick(&setup.device);
    std::thread::sleep(Duration::from_millis(5));
    setup.host.track_dirty(true);
    let _ = setup.host.take_dirty();
    setup.control.hold(false);
    assert!(disk.queue.wait(WAIT).is_some());
    setup.device.pause().unwrap();
    let dirty = setup.host.take_dirty();
    for address in [pending.data, pending.status, disk.queue.used] {
        assert!(
            dirty.contains(&(address & !0xfff)),
            "{address:#x} in {dirty:x?}"
        );
    }
}

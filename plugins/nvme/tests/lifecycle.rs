//! Reset, shutdown, deletion, pause and stop under load; interrupts, shadow doorbells, and backends that fail.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use support::*;
use vmm_plugin_api::BlockOp;

/// Adds `count` reads of one block each, all into one page.
fn add_reads(driver: &mut Driver<'_>, pair: &mut Pair, count: u64) -> u64 {
    let page = driver.page();
    for i in 0..count {
        driver.add(pair, Cmd::rw(READ, i, 1).prp(page, 0));
    }
    page
}

#[test]
fn one_interrupt_for_a_batch() {
    let setup = Setup::new(Shape::default());
    let (mut driver, mut pair) = setup.disk();
    driver.write(&mut pair, 0, &[1; 512]);
    let _ = setup.device.interrupts(1);
    // Added while nothing looks at the queue, so that they are one batch.
    setup.device.pause().unwrap();
    add_reads(&mut driver, &mut pair, 16);
    driver.ring(&mut pair);
    let submits = setup.control.submits.load(Ordering::Relaxed);
    assert_eq!(setup.device.interrupts(1), 0);
    setup.device.resume().unwrap();
    for _ in 0..16 {
        assert_eq!(driver.wait(&mut pair).status, OK);
    }
    eventually("an interrupt", || setup.device.interrupts(1) == 1);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(setup.device.interrupts(1), 0, "only one");
    assert_eq!(setup.control.submits.load(Ordering::Relaxed), submits + 1);
    // A queue whose interrupts are off.
    let mut quiet = driver.rings(2, 16, 16);
    let cmd = Driver::create_cq(&quiet, 7);
    driver.must(cmd.dw(11, 1 | 7 << 16));
    driver.must(Driver::create_sq(&quiet));
    driver.write(&mut quiet, 0, &[1; 512]);
    assert_eq!(setup.device.interrupts(7), 0);
}

#[test]
fn intx_is_raised_until_everything_is_taken() {
    for shadow in [false, true] {
        let setup = Setup::new(threaded());
        setup.device.enable_msix(false);
        let mut driver = setup.driver();
        let mut pair = driver.pair(1, 16, 0);
        if shadow {
            driver.enable_shadow();
        }
        assert!(!setup.device.pin(0));
        for _ in 0..40 {
            add_reads(&mut driver, &mut pair, 3);
            driver.ring(&mut pair);
            eventually("the pin rises", || setup.device.pin(0));
            for _ in 0..3 {
                driver.wait(&mut pair);
            }
            eventually("it falls", || !setup.device.pin(0));
        }
        // Masked, it stays low; unmasked, it rises.
        driver.set_reg(INTMS, 1);
        assert_eq!(driver.reg(INTMC), 1);
        add_reads(&mut driver, &mut pair, 1);
        driver.ring(&mut pair);
        eventually("the read", || setup.device.counter("reads") == 121);
        std::thread::sleep(Duration::from_millis(2));
        assert!(!setup.device.pin(0));
        driver.set_reg(INTMC, 1);
        eventually("unmasked", || setup.device.pin(0));
        driver.begin_disable();
        driver.wait_ready(false);
        assert!(!setup.device.pin(0), "reset lowers the pin");
        assert_eq!(setup.device.interrupts(0), 0);
    }
}

#[test]
fn shadow_doorbells_spare_the_registers() {
    for shape in [Shape::default(), threaded()] {
        let setup = Setup::new(shape);
        let mut driver = setup.driver();
        // One queue before the shadow is set up, one after, with odd sizes.
        let mut one = driver.pair(1, 33, 1);
        driver.enable_shadow();
        let mut two = driver.pair(2, 47, 2);
        for _ in 0..100 {
            for pair in [&mut one, &mut two] {
                add_reads(&mut driver, pair, 20);
                driver.ring(pair);
                for _ in 0..20 {
                    assert_eq!(driver.wait(pair).status, OK);
                }
            }
        }
        // Rung under load, one command at a time: the device does not want to know of each.
        let before = one.kicks;
        let page = driver.page();
        setup.device.pause().unwrap();
        for i in 0..30 {
            driver.add(&mut one, Cmd::rw(READ, i, 1).prp(page, 0));
            driver.ring(&mut one);
        }
        setup.device.resume().unwrap();
        for _ in 0..30 {
            assert_eq!(driver.wait(&mut one).status, OK);
        }
        assert!(one.kicks - before <= 2, "{} writes", one.kicks - before);
        // After a reset registers count again.
        driver.enable();
        let mut pair = driver.pair(1, 33, 1);
        driver.write(&mut pair, 3, &[7; 512]);
        assert_eq!(driver.read(&mut pair, 3, 512), [7; 512]);
        assert_eq!(setup.host.faults(), Vec::<String>::new());
    }
}

#[test]
fn a_host_without_doorbells_gets_them_as_writes() {
    let setup = Setup::new(Shape::default());
    setup.device.refuse_doorbells();
    let mut driver = setup.driver();
    let mut pair = driver.pair(1, 16, 1);
    driver.enable_shadow();
    for _ in 0..50 {
        driver.write(&mut pair, 0, &[1; 4096]);
    }
}

#[test]
fn a_full_completion_queue_waits_for_the_guest() {
    for (shadow, threads) in [(false, false), (true, false), (false, true), (true, true)] {
        let setup = Setup::new(Shape {
            threaded: threads,
            ..Shape::default()
        });
        let mut driver = setup.driver();
        let mut pair = driver.rings(1, 64, 4);
        driver.must(Driver::create_cq(&pair, 1));
        driver.must(Driver::create_sq(&pair));
        if shadow {
            driver.enable_shadow();
        }
        for _ in 0..5 {
            add_reads(&mut driver, &mut pair, 40);
            driver.ring(&mut pair);
            std::thread::sleep(Duration::from_millis(2));
            for _ in 0..40 {
                assert_eq!(driver.wait(&mut pair).status, OK);
            }
        }
        assert_eq!(setup.device.counter("reads"), 200);
    }
}

#[test]
fn queues_work_side_by_side() {
    for shape in [Shape::default(), threaded()] {
        let setup = Setup::new(shape);
        let mut driver = setup.driver();
        driver.must(Cmd::new(9).dw(10, 7).dw(11, 62 | 62 << 16));
        let mut pairs: Vec<_> = (1..=63).map(|id| driver.pair(id, 8, id)).collect();
        for pair in &mut pairs {
            let at = driver.page();
            let data = pattern(pair.id.into(), 4096);
            driver.memory.write(at, &data).unwrap();
            let lba = 8 * u64::from(pair.id);
            driver.add(pair, Cmd::rw(WRITE, lba, 8).prp(at, 0));
            driver.ring(pair);
        }
        for pair in &mut pairs {
            assert_eq!(driver.wait(pair).status, OK, "queue {}", pair.id);
            let id = u32::from(pair.id);
            eventually("its interrupt", || setup.device.interrupts(id) > 0);
            let at = 4096 * id as usize;
            assert_eq!(setup.control.bytes(at, 4096), pattern(id.into(), 4096));
        }
        driver.enable();
        driver.pair(63, 8, 63);
    }
}

#[test]
fn reset_under_load_waits_for_the_backend_and_touches_nothing_after() {
    let setup = Setup::new(threaded());
    for round in 0..20u64 {
        let shadow = round % 4 < 2;
        let (mut driver, mut pair) = setup.disk();
        if shadow {
            driver.enable_shadow();
        }
        let begin = driver.admin.sq_at;
        setup.control.hold(true);
        let before = setup.control.submits.load(Ordering::Relaxed);
        let page = add_reads(&mut driver, &mut pair, 8);
        driver.ring(&mut pair);
        if round.is_multiple_of(2) {
            eventually("the backend has them", || {
                setup.control.submits.load(Ordering::Relaxed) > before
            });
        }
        driver.begin_disable();
        if round.is_multiple_of(2) {
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(
                driver.reg(CSTS) & 1,
                1,
                "the backend still writes to memory"
            );
        }
        setup.control.hold(false);
        driver.wait_ready(false);
        // The driver takes its memory back: from here on the device must leave it alone.
        let len = (page + 4096 - begin) as usize;
        driver.memory.write(begin, &vec![0xee; len]).unwrap();
        for vector in 0..2 {
            let _ = setup.device.interrupts(vector);
        }
        driver.set_reg(driver.doorbell(1, false), 3);
        driver.set_reg(driver.doorbell(0, false), 3);
        std::thread::sleep(Duration::from_millis(1));
        assert!(
            driver.bytes(begin, len).iter().all(|b| *b == 0xee),
            "round {round}"
        );
        assert_eq!(setup.device.interrupts(0) + setup.device.interrupts(1), 0);
    }
    let (mut driver, mut pair) = setup.disk();
    driver.read(&mut pair, 0, 512);
    assert_eq!(setup.host.faults(), Vec::<String>::new());
}

#[test]
fn deleting_a_queue_under_load_completes_what_was_taken() {
    for shadow in [false, true] {
        let setup = Setup::new(threaded());
        let mut driver = setup.driver();
        let mut pair = driver.pair(1, 64, 1);
        let mut other = driver.rings(2, 64, 2);
        other.cq = 1;
        driver.must(Driver::create_sq(&other));
        if shadow {
            driver.enable_shadow();
        }
        setup.control.hold(true);
        let data = driver.page();
        for i in 0..8 {
            driver.add(&mut pair, Cmd::rw(WRITE, i, 1).prp(data, 0));
            driver.add(&mut other, Cmd::rw(WRITE, 100 + i, 1).prp(data, 0));
        }
        for (n, pair) in (1..).zip([&mut pair, &mut other]) {
            driver.ring(pair);
            eventually("the backend has them", || {
                setup.control.submits.load(Ordering::Relaxed) == n
            });
        }
        let mut admin = driver.admin.clone();
        driver.add(&mut admin, Cmd::new(0).dw(10, 1));
        driver.ring(&mut admin);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(driver.take(&mut admin), None, "writes are under way");
        setup.control.hold(false);
        assert_eq!(driver.wait(&mut admin).status, OK);
        // What was taken has been answered by now; nothing more comes of it.
        let mut answered = 0;
        while let Some(cqe) = driver.take(&mut pair) {
            answered += u32::from(cqe.sq == 1);
        }
        assert_eq!(answered, 8);
        driver.acknowledge(&pair, 0);
        // The rest of the other queue comes.
        let mut rest = 16 - pair.head;
        while rest > 0 {
            assert_eq!(driver.wait(&mut pair).sq, 2);
            rest -= 1;
        }
        driver.admin = admin;
        driver.must(Cmd::new(0).dw(10, 2));
        driver.must(Cmd::new(4).dw(10, 1));
        let done = setup.control.ops().len();
        assert_eq!(done, 16);
        let mut again = driver.pair(1, 64, 1);
        driver.write(&mut again, 0, &[1; 512]);
    }
}

#[test]
fn a_shutdown_finishes_and_flushes() {
    for (shape, kind) in [(Shape::default(), 1), (threaded(), 1), (threaded(), 2)] {
        let setup = Setup::new(shape);
        let (mut driver, mut pair) = setup.disk();
        let data = driver.page();
        setup.control.hold(true);
        let before = setup.control.submits.load(Ordering::Relaxed);
        for i in 0..8 {
            driver.add(&mut pair, Cmd::rw(WRITE, i, 1).prp(data, 0));
        }
        driver.ring(&mut pair);
        eventually("the backend has them", || {
            setup.control.submits.load(Ordering::Relaxed) > before
        });
        driver.set_reg(CC, ENABLE | kind << 14);
        let under_way = driver.reg(CSTS) >> 2 & 3;
        assert!(under_way == 1 || !shape.threaded);
        setup.control.hold(false);
        eventually("shutdown", || driver.reg(CSTS) >> 2 & 3 == 2);
        let ops = setup.control.ops();
        assert_eq!(ops.last().unwrap().0, BlockOp::Flush, "{ops:?}");
        assert_eq!(ops.len(), 9);
        // As a driver goes on after a suspend, or another one after a kexec.
        driver.enable();
        assert_eq!(driver.reg(CSTS), 1);
        let mut pair = driver.pair(1, 16, 1);
        driver.read(&mut pair, 0, 512);
    }
}

#[test]
fn pause_finishes_what_is_in_flight_and_resume_takes_the_rest() {
    for shape in [Shape::default(), threaded()] {
        let setup = Setup::new(shape);
        let (mut driver, mut pair) = setup.disk();
        for round in 0..50u64 {
            add_reads(&mut driver, &mut pair, 8);
            driver.ring(&mut pair);
            if round.is_multiple_of(3) {
                std::thread::sleep(Duration::from_micros(100));
            }
            setup.device.pause().unwrap();
            let before = pair.head;
            let mut seen = 0;
            while driver.take(&mut pair).is_some() {
                seen += 1;
            }
            let ops = setup.control.ops().len();
            assert_eq!(ops % 8, seen % 8, "what was started is finished");
            std::thread::sleep(Duration::from_micros(200));
            assert_eq!(setup.control.ops().len(), ops, "nothing moves while paused");
            assert!(driver.take(&mut pair).is_none());
            driver.acknowledge(&pair, before);
            setup.device.resume().unwrap();
            for _ in seen..8 {
                assert_eq!(driver.wait(&mut pair).status, OK, "round {round}");
            }
        }
        // The machine is reset.
        add_reads(&mut driver, &mut pair, 1);
        setup.device.pause().unwrap();
        setup.device.reset().unwrap();
        assert_eq!(
            (driver.reg(CC), driver.reg(CSTS), driver.reg(AQA)),
            (0, 0, 0)
        );
        setup.device.resume().unwrap();
        driver.ring(&mut pair);
        std::thread::sleep(Duration::from_millis(2));
        assert!(driver.take(&mut pair).is_none(), "there are no queues");
        let (mut driver, mut pair) = setup.disk();
        driver.read(&mut pair, 0, 512);
    }
}

#[test]
fn reset_before_the_start_and_stop_twice() {
    let setup = Setup::not_started(Shape::default(), &[]);
    setup.device.reset().unwrap();
    setup.device.pause().unwrap();
    setup.device.resume().unwrap();
    setup.device.stop();
    setup.device.start().unwrap();
    let (mut driver, mut pair) = setup.disk();
    driver.read(&mut pair, 0, 512);
    setup.device.stop();
    setup.device.stop();
}

#[test]
fn stop_under_load_finishes_what_was_taken() {
    let setup = Setup::new(threaded());
    let (mut driver, mut pair) = setup.disk();
    let page = driver.page();
    for i in 0..8 {
        driver.add(&mut pair, Cmd::rw(WRITE, i, 1).prp(page, 0));
    }
    driver.ring(&mut pair);
    eventually("the backend starts", || !setup.control.ops().is_empty());
    setup.device.stop();
    let mut done = 0;
    while let Some(cqe) = driver.take(&mut pair) {
        assert_eq!(cqe.status, OK);
        done += 1;
    }
    assert!(done > 0);
    assert_eq!(
        done,
        setup.control.ops().len(),
        "what was taken is answered"
    );
}

#[test]
fn a_backend_that_takes_little_at_a_time_gets_everything() {
    for shape in [Shape::default(), threaded()] {
        let setup = Setup::new(shape);
        setup.control.room.store(3, Ordering::Relaxed);
        let (mut driver, mut pair) = setup.disk();
        add_reads(&mut driver, &mut pair, 60);
        driver.ring(&mut pair);
        for _ in 0..60 {
            assert_eq!(driver.wait(&mut pair).status, OK);
        }
    }
}

#[test]
fn a_dead_backend_fails_commands_and_the_device_does_not_spin() {
    for shape in [Shape::default(), threaded()] {
        let setup = Setup::new(shape);
        let (mut driver, mut pair) = setup.disk();
        driver.read(&mut pair, 0, 512);
        setup.control.dead.store(true, Ordering::Relaxed);
        let page = driver.page();
        let read = Cmd::rw(READ, 0, 1).prp(page, 0);
        assert_eq!(driver.run(&mut pair, read).status, INTERNAL);
        let submits = setup.control.submits.load(Ordering::Relaxed);
        assert_eq!(driver.run(&mut pair, read).status, INTERNAL);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(setup.control.submits.load(Ordering::Relaxed), submits);
        setup.device.pause().unwrap();
        setup.device.resume().unwrap();
        // A shutdown ends all the same, and the operator reads of it.
        driver.set_reg(CC, ENABLE | 1 << 14);
        eventually("shutdown", || driver.reg(CSTS) >> 2 & 3 == 2);
        let logs = setup.host.logs();
        assert!(
            logs.iter().any(|l| l.contains("can't be flushed")),
            "{logs:?}"
        );
    }
}

#[test]
fn a_backend_that_panics_is_a_dead_backend() {
    let setup = Setup::new(Shape::default());
    let (mut driver, mut pair) = setup.disk();
    setup.control.panic.store(true, Ordering::Relaxed);
    let page = driver.page();
    let read = Cmd::rw(READ, 0, 1).prp(page, 0);
    assert_eq!(driver.run(&mut pair, read).status, INTERNAL);
    let faults = setup.host.faults();
    assert!(
        faults.len() == 1 && faults[0].contains("told to panic"),
        "{faults:?}"
    );
    driver.enable();
}

#[test]
fn pages_that_commands_write_are_marked() {
    let setup = Setup::new(threaded());
    let (mut driver, mut pair) = setup.disk();
    driver.enable_shadow();
    setup.control.hold(true);
    let at = driver.allocate(3 * 4096, 4096);
    let cmd = driver.with_prps(Cmd::rw(READ, 0, 24), at, 3 * 4096);
    driver.add(&mut pair, cmd);
    driver.ring(&mut pair);
    std::thread::sleep(Duration::from_millis(5));
    setup.host.track_dirty(true);
    let _ = setup.host.take_dirty();
    setup.control.hold(false);
    driver.wait(&mut pair);
    setup.device.pause().unwrap();
    let dirty = setup.host.take_dirty();
    let (_, events) = driver.shadow.unwrap();
    for address in [at, at + 4096, at + 8192, pair.cq_at, events] {
        assert!(dirty.contains(&address), "{address:#x} in {dirty:x?}");
    }
}

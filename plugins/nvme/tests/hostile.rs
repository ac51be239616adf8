//! Guests that break the rules: they get the status that the specification has for it, and the host lives.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::{Duration, Instant};

use support::*;

#[test]
fn doorbells_of_every_kind_of_wrong() {
    for shadow in [false, true] {
        let setup = Setup::new(threaded());
        let (mut driver, mut pair) = setup.disk();
        if shadow {
            driver.enable_shadow();
        }
        let mut admin = driver.admin.clone();
        driver.add(&mut admin, Cmd::new(0xc));
        driver.ring(&mut admin);
        driver.admin = admin;
        // No queue, no such queue, odd places and widths, values outside, heads of entries that were never posted.
        for (offset, width, value) in [
            (DOORBELLS + 16, 4, 1),
            (0x1200, 4, 1),
            (0x3ffc, 4, 1),
            (DOORBELLS + 1, 4, 1),
            (DOORBELLS + 2, 2, 1),
            (DOORBELLS, 8, u64::MAX),
            (DOORBELLS, 4, 32),
            (DOORBELLS, 4, 0xffff_ffff),
            (DOORBELLS + 12, 4, 64),
            (DOORBELLS + 12, 4, 63),
            (DOORBELLS + 4, 4, 31),
        ] {
            setup.device.write(0, offset, width, value);
        }
        if shadow {
            let (doorbells, _) = driver.shadow.unwrap();
            for slot in [2, 3] {
                let wrong = 0x1_0005u32.to_le_bytes();
                driver.memory.write(doorbells + 4 * slot, &wrong).unwrap();
                setup.device.write(0, DOORBELLS + 8, 4, 5);
                std::thread::sleep(Duration::from_millis(1));
                driver.memory.write(doorbells + 4 * slot, &[0; 4]).unwrap();
            }
        }
        let mut admin = driver.admin.clone();
        let event = driver.wait(&mut admin);
        assert_eq!(
            (event.status, event.result & 0xff),
            (OK, 0),
            "an error event"
        );
        driver.admin = admin;
        // It goes on.
        driver.write(&mut pair, 0, &[5; 512]);
        assert_eq!(driver.read(&mut pair, 0, 512), [5; 512]);
        assert_eq!(setup.host.faults(), Vec::<String>::new());
    }
}

#[test]
fn data_over_the_queues_harms_the_guest_only() {
    let setup = Setup::new(Shape::default());
    for place in 0..4 {
        let (driver, mut pair) = setup.disk();
        let target = [
            pair.sq_at,
            pair.cq_at,
            driver.admin.sq_at,
            driver.admin.cq_at,
        ][place];
        driver.add(&mut pair, Cmd::rw(READ, 0, 8).prp(target, 0));
        driver.ring(&mut pair);
        std::thread::sleep(Duration::from_millis(3));
        let mut driver = Driver::new(&setup.host, &setup.device);
        driver.enable();
    }
    let (mut driver, mut pair) = setup.disk();
    driver.read(&mut pair, 0, 512);
    assert_eq!(setup.host.faults(), Vec::<String>::new());
}

#[test]
fn shadow_buffers_that_are_none() {
    let setup = Setup::new(Shape::default());
    let mut driver = setup.driver();
    let page = driver.page();
    for (doorbells, events, status) in [
        (0, page, INVALID_FIELD),
        (page, 0, INVALID_FIELD),
        (page + 64, page, PRP_OFFSET),
        (page, page + 4, PRP_OFFSET),
        (1 << 45, page, TRANSFER_ERROR),
        (page, u64::MAX - 4095, TRANSFER_ERROR),
    ] {
        let cqe = driver.admin(Cmd::new(0x7c).prp(doorbells, events));
        assert_eq!(cqe.status, status, "{doorbells:#x} {events:#x}");
    }
    // Both in one page, and over a queue: allowed, and bad for the guest alone.
    let pair = driver.pair(1, 16, 1);
    driver.must(Cmd::new(0x7c).prp(pair.sq_at, pair.sq_at));
    setup.device.write(0, DOORBELLS + 8, 4, 1);
    driver.enable();
}

#[test]
fn enabling_and_disabling_in_a_hurry() {
    let setup = Setup::new(threaded());
    let mut driver = setup.driver();
    for round in 0..200 {
        driver.set_reg(CC, 0x46_0000);
        driver.set_reg(CC, ENABLE);
        if round % 3 == 0 {
            driver.set_reg(CC, ENABLE | 1 << 14);
        }
        driver.set_reg(DOORBELLS, round % 32);
    }
    // A shutdown of what is not enabled does not keep it from being enabled.
    driver.begin_disable();
    driver.wait_ready(false);
    driver.set_reg(CC, 0x46_4000);
    eventually("shutdown", || driver.reg(CSTS) >> 2 & 3 == 2);
    driver.set_reg(CC, ENABLE);
    driver.wait_ready(true);
    driver.enable();
    driver.identify(1, 0).unwrap();
    assert_eq!(setup.host.faults(), Vec::<String>::new());
}

/// The one that was disabled before it was ready must not tell the next driver that its own is.
#[test]
fn an_enabling_that_was_called_off_is_not_the_next_ones() {
    let setup = Setup::new(Shape::default());
    let mut driver = setup.driver();
    let mut called_off = 0;
    for round in 0..1000 {
        driver.enable();
        driver.begin_disable();
        driver.wait_ready(false);
        driver.set_reg(CC, ENABLE);
        // Somewhere in what the controller does by then.
        for _ in 0..round * 7 % 2000 {
            std::hint::spin_loop();
        }
        driver.begin_disable();
        // Queues are as `enable` has left them: nothing is between the two writes.
        if driver.reg(CSTS) & 1 == 0 {
            called_off += 1;
            driver.set_reg(CC, ENABLE);
            driver.wait_ready(true);
            driver.free = 0x10_0000;
            driver.identify(1, 0).unwrap();
        }
    }
    println!("{called_off} called off");
    assert_eq!(setup.host.faults(), Vec::<String>::new());
}

/// A command as a driver might write it, now and then a wild one.
fn random_command(random: &mut Random, pool: u64) -> Cmd {
    let mut cmd = Cmd::default();
    if random.below(8) == 0 {
        for word in &mut cmd.0 {
            *word = random.next() as u32;
        }
        return cmd;
    }
    let address = |random: &mut Random| match random.below(12) {
        0 => random.next(),
        1 => pool + random.below(128 << 20),
        2 => pool + random.below(0x8000),
        _ => pool + random.below(8) * 4096,
    };
    let psdt = [0, 0, 1, 2, 3][random.below(5) as usize];
    cmd.0[0] = random.below(16) as u32 | psdt << 14;
    cmd.0[1] = [1, 1, 1, 1, 0, 2, u32::MAX][random.below(7) as usize];
    let lba = if random.below(8) == 0 {
        random.next()
    } else {
        random.below(8300)
    };
    let mut cmd = cmd
        .prp(address(random), address(random))
        .qw(10, lba)
        .dw(12, random.below(300) as u32);
    if psdt != 0 {
        let kinds = [0, 0, 0x20, 0x30, 0x10];
        cmd.0[8] = random.below(4) as u32 * 4096 + random.below(33) as u32 * 16;
        cmd.0[9] = kinds[random.below(5) as usize] << 24;
    }
    cmd
}

fn random_admin(random: &mut Random, pool: u64) -> Cmd {
    let opcodes = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 0x7c, 0x80];
    let mut cmd = random_command(random, pool);
    let opcode = opcodes[random.below(12) as usize];
    cmd.0[0] = cmd.0[0] & !0xff | opcode;
    if random.below(3) > 0 {
        cmd.0[0] &= 0xffff_00ff;
        cmd = cmd
            .dw(10, random.below(5) as u32 | (random.below(70) as u32) << 16)
            .dw(11, random.below(4) as u32 | (random.below(5) as u32) << 16)
            .prp(pool + random.below(8) * 4096, pool + random.below(8) * 4096);
    }
    cmd
}

#[test]
fn random_registers_doorbells_and_commands_never_hurt_the_host() {
    let seed = 0x5eed_cafe_f00d_0002;
    let end = Instant::now() + Duration::from_secs(4);
    let mut random = Random(seed);
    let mut rounds = 0;
    let setups = [false, true].map(|threaded| {
        let mut shape = Shape {
            threaded,
            ..Shape::default()
        };
        shape.info.alignment = if threaded { 512 } else { 1 };
        shape.info.max_discard = if threaded { 4096 } else { 1 << 20 };
        Setup::new(shape)
    });
    while Instant::now() < end {
        let setup = &setups[rounds % 2];
        let mut driver = setup.driver();
        let mut pairs = [driver.pair(1, 16, 1), driver.pair(2, 7, 2)];
        if random.below(2) == 0 {
            driver.enable_shadow();
        }
        let pool = driver.allocate(0x8000, 4096);
        for _ in 0..60 {
            // Lists that lead into the pool, and noise.
            for at in (0..0x8000).step_by(8) {
                let entry = match random.below(8) {
                    0 => random.next(),
                    _ => pool + random.below(8) * 4096,
                };
                if random.below(16) == 0 {
                    driver
                        .memory
                        .write(pool + at, &entry.to_le_bytes())
                        .unwrap();
                }
            }
            for pair in &mut pairs {
                for _ in 0..random.below(4) {
                    let cmd = random_command(&mut random, pool);
                    driver.add(pair, cmd);
                }
                driver.ring(pair);
                let before = pair.head;
                while driver.take(pair).is_some() {}
                if random.below(4) > 0 {
                    driver.acknowledge(pair, before);
                }
            }
            if random.below(3) == 0 {
                let mut admin = driver.admin.clone();
                let cmd = random_admin(&mut random, pool);
                driver.add(&mut admin, cmd);
                driver.ring(&mut admin);
                while driver.take(&mut admin).is_some() {}
                let head = u64::from(admin.head);
                driver.set_reg(driver.doorbell(0, true), head);
                driver.admin = admin;
            }
            if random.below(4) == 0 {
                let width = 1 << random.below(4);
                let offset = match random.below(2) {
                    0 => random.below(0x40),
                    _ => 0x1000 + random.below(0x40),
                };
                let value = match random.below(3) {
                    0 => random.next(),
                    1 => ENABLE | random.below(4) << 14,
                    _ => random.below(70),
                };
                setup.device.write(0, offset, width, value);
                let _ = setup.device.read(0, random.below(0x4000), width);
            }
            if random.below(16) == 0 {
                setup.device.enable_msix(random.below(2) == 0);
            }
            if random.below(16) == 0 {
                setup.device.pause().unwrap();
                if random.below(4) == 0 {
                    setup.device.reset().unwrap();
                }
                setup.device.resume().unwrap();
            }
        }
        rounds += 1;
    }
    for setup in &setups {
        setup.device.enable_msix(true);
        let (mut driver, mut pair) = setup.disk();
        driver.write(&mut pair, 0, &pattern(4, 4096));
        assert_eq!(driver.read(&mut pair, 0, 4096), pattern(4, 4096));
        assert_eq!(setup.host.faults(), Vec::<String>::new(), "seed {seed:#x}");
    }
    println!("{rounds} rounds");
    assert!(rounds > 2);
}

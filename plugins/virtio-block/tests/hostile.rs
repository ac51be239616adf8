//! Drivers that break the rules: the device asks for a reset, works after it, and the host lives.

mod support;

use std::time::{Duration, Instant};

use support::*;
use vmm_plugin_api::testing::DriverQueue;

const NEEDS_RESET: u8 = 0x40;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Vector of configuration changes: behind that of the one queue.
const CONFIG: u16 = 1;

fn wait_needs_reset(disk: &Disk<'_>, what: &str) {
    let end = Instant::now() + WAIT;
    while disk.driver.status() & NEEDS_RESET == 0 {
        assert!(
            Instant::now() < end,
            "{what}: the device does not ask for a reset"
        );
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// What a driver does to a queue, with a page of guest memory to use.
type Attack = fn(&mut DriverQueue, u64);

/// Every way to break a queue.
fn attacks() -> Vec<(&'static str, Attack)> {
    vec![
        ("index outside of the table", |q, _| q.publish(0x7fff)),
        ("a loop", |q, at| {
            q.set_descriptor(0, at, 16, NEXT, 1);
            q.set_descriptor(1, at, 16, NEXT, 0);
            q.publish(0);
        }),
        ("next outside of the table", |q, at| {
            q.set_descriptor(0, at, 16, NEXT, 64);
            q.publish(0);
        }),
        ("address that is no RAM", |q, _| {
            q.set_descriptor(0, 1 << 45, 16, 0, 0);
            q.publish(0);
        }),
        ("address and length that wrap", |q, _| {
            q.set_descriptor(0, u64::MAX - 7, 16, WRITE, 0);
            q.publish(0);
        }),
        ("length behind the end of RAM", |q, at| {
            q.set_descriptor(0, at, u32::MAX, WRITE, 0);
            q.publish(0);
        }),
        ("no bytes", |q, at| {
            q.set_descriptor(0, at, 0, 0, 0);
            q.publish(0);
        }),
        ("no byte for the status", |q, at| {
            q.set_descriptor(0, at, 16, 0, 0);
            q.publish(0);
        }),
        ("readable after writable", |q, at| {
            q.set_descriptor(0, at, 16, WRITE | NEXT, 1);
            q.set_descriptor(1, at, 16, 0, 0);
            q.publish(0);
        }),
        ("indirect table of odd length", |q, at| {
            q.set_descriptor(0, at, 24, INDIRECT, 0);
            q.publish(0);
        }),
        ("indirect table with a next descriptor", |q, at| {
            q.set_descriptor(0, at, 32, INDIRECT | NEXT, 1);
            q.publish(0);
        }),
        ("indirect table that is no RAM", |q, _| {
            q.set_descriptor(0, 1 << 45, 32, INDIRECT, 0);
            q.publish(0);
        }),
        ("available index that jumps", |q, _| {
            for _ in 0..200 {
                q.publish(0);
            }
        }),
    ]
}

#[test]
fn every_attack_ends_in_needs_reset_and_a_reset_heals() {
    for threaded in [false, true] {
        let began = Instant::now();
        let setup = Setup::new(Shape {
            threaded,
            ..Shape::default()
        });
        for (name, attack) in attacks() {
            let mut disk = setup.disk();
            assert_eq!(disk.driver.config_vector(CONFIG), CONFIG);
            disk.write(1, &[3; 512]);
            let _ = setup.device.interrupts(CONFIG.into());
            let at = disk.driver.allocate(4096, 4096);
            attack(&mut disk.queue, at);
            disk.queue.notify(&setup.device);
            wait_needs_reset(&disk, name);
            let end = Instant::now() + WAIT;
            while setup.device.interrupts(CONFIG.into()) == 0 {
                assert!(Instant::now() < end, "{name}: no configuration interrupt");
            }
            disk.queue.notify(&setup.device);
        }
        setup.disk().write(0, &[1; 512]);
        assert_eq!(setup.host.faults(), Vec::<String>::new());
        let logs = setup.host.logs();
        let lines = logs.iter().filter(|l| l.contains("waits for a reset"));
        let allowed = 1 + began.elapsed().as_secs() as usize;
        assert!(
            (1..=allowed).contains(&lines.count()),
            "rate limited: {logs:?}"
        );
    }
}

#[test]
fn requests_before_a_broken_chain_are_answered() {
    let setup = Setup::new(Shape::default());
    let mut disk = setup.disk();
    let good = disk.add(T_IN, 0, &[], 512);
    disk.queue.publish(0xffff);
    disk.queue.notify(&setup.device);
    assert!(disk.queue.wait(WAIT).is_some());
    assert_eq!(disk.status(&good), S_OK);
    wait_needs_reset(&disk, "the second chain");
}

#[test]
fn buffers_over_the_rings_harm_the_guest_only() {
    let setup = Setup::new(Shape::default());
    for place in 0..3 {
        let mut disk = setup.disk();
        let target = [
            disk.queue.descriptors,
            disk.queue.available,
            disk.queue.used,
        ][place];
        let header = disk.header(T_IN, 0);
        disk.queue.set_descriptor(0, header, 16, NEXT, 1);
        disk.queue.set_descriptor(1, target, 512, WRITE | NEXT, 2);
        disk.queue.set_descriptor(2, header, 1, WRITE, 0);
        disk.queue.publish(0);
        disk.queue.notify(&setup.device);
        std::thread::sleep(Duration::from_millis(3));
        disk.driver.reset(WAIT).unwrap();
    }
    setup.disk().read(0, 512);
    assert_eq!(setup.host.faults(), Vec::<String>::new());
}

/// A small generator: the test's sequence is the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// A descriptor as a driver might write it, now and then a wild one.
fn random_descriptor(random: &mut Random, pool: u64) -> (u64, u32, u16, u16) {
    let address = match random.below(16) {
        0 => random.next(),
        1 => pool + random.below(64 << 20),
        _ => pool + random.below(0x8000),
    };
    let len = match random.below(8) {
        0 => random.next() as u32,
        1 => 0,
        2 => 1,
        3 => 16,
        _ => 512 * (1 + random.below(16) as u32),
    };
    let flags = match random.below(12) {
        0 => random.next() as u16,
        1 => INDIRECT,
        n => (n as u16 & 1) | (n as u16 & 2),
    };
    (address, len, flags, random.below(70) as u16)
}

#[test]
fn random_rings_and_registers_never_hurt_the_host() {
    let seed = 0x5eed_cafe_f00d_0001;
    let end = Instant::now() + Duration::from_secs(3);
    let mut random = Random(seed);
    let mut rounds = 0;
    let setups = [false, true].map(|threaded| {
        let mut shape = Shape {
            threaded,
            ..Shape::default()
        };
        shape.info.alignment = if threaded { 512 } else { 1 };
        Setup::new(shape)
    });
    while Instant::now() < end {
        // A device has room in guest RAM for so many drivers' rings: each round starts at the same place.
        let setup = &setups[rounds % 2];
        let mut disk = setup.disk_with(random.next(), 64);
        let pool = disk.driver.allocate(0x8000, 4096);
        let noise: Vec<u8> = (0..0x8000)
            .map(|_| random.next() as u8 & random.next() as u8)
            .collect();
        disk.driver.memory().write(pool, &noise).unwrap();
        for _ in 0..40 {
            for i in 0..64 {
                let (address, len, flags, next) = random_descriptor(&mut random, pool);
                disk.queue.set_descriptor(i, address, len, flags, next);
            }
            // Requests that the device accepts up to some point lead deeper than noise.
            let header = disk.header(random.below(14) as u32, random.below(9000));
            disk.queue
                .set_descriptor(0, header, 16, NEXT, 1 + random.below(63) as u16);
            for _ in 0..random.below(8) {
                let head = if random.below(4) == 0 {
                    random.next() as u16
                } else {
                    0
                };
                disk.queue.publish(head);
            }
            disk.queue.notify(&setup.device);
            let offset = random.below(0x3100);
            let width = 1 << random.below(4);
            if random.below(3) == 0 {
                setup.device.write(2, offset, width, random.next());
                let _ = setup.device.read(2, offset, width);
            }
            if random.below(8) == 0 {
                let _ = setup.device.read(0, random.below(0x200), width);
                setup
                    .device
                    .write(0, random.below(0x40), width, random.next());
                setup
                    .device
                    .write_capability(0, random.below(18) as u32, 4, random.next() as u32);
                let _ = setup.device.read_capability(0, random.below(18) as u32, 4);
            }
            if random.below(16) == 0 {
                setup.device.pause().unwrap();
                setup.device.resume().unwrap();
            }
            while disk.queue.take_used().is_some() {}
        }
        disk.driver.reset(WAIT).unwrap();
        rounds += 1;
    }
    for setup in &setups {
        let mut disk = setup.disk();
        disk.write(0, &pattern(4, 4096));
        assert_eq!(disk.read(0, 4096), pattern(4, 4096));
        assert_eq!(setup.host.faults(), Vec::<String>::new(), "seed {seed:#x}");
    }
    println!("{rounds} rounds");
    assert!(rounds > 2);
}

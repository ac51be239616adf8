//! What the controller costs without a guest: requests per second and core, by depth, on a disk in memory. A core is the
//! processor time of the queue's thread; the driver's side does not count.

#![allow(clippy::expect_used, clippy::unwrap_used, missing_docs, dead_code)] // a bench

#[path = "../tests/support/driver.rs"]
mod driver;

use std::time::{Duration, Instant};

use driver::{Cmd, Driver, OK, READ};
use vmm_plugin_api::testing::{FakeHost, Value, load, processor_time};

/// How long the driver waits for a completion.
const WAIT: Duration = Duration::from_secs(20);
const DISK: u64 = 64 << 20;

fn measure(shadow: bool, depth: u32, bytes: u64) {
    let host = FakeHost::new(64 << 20);
    let root = load("vmm-plugin-memory").expect("the backend");
    let options: [(&str, Value); 3] = [
        ("size", DISK.into()),
        ("block_size", 512u64.into()),
        ("workers", 1u64.into()),
    ];
    let disk = host.block(root, "mem-async", &options).expect("a disk");
    let options = [("block_dev", Value::from(&disk))];
    let plugin = &vmm_plugin_nvme::VMM_PLUGIN;
    let device = host.device(plugin, "pci-nvme", &options).expect("a device");
    device.start().expect("it starts");
    let mut driver = Driver::new(&host, &device);
    driver.enable();
    let mut pair = driver.pair(1, 1024, 1);
    if shadow {
        driver.enable_shadow();
    }
    let at = driver.allocate(bytes, 4096);
    let blocks = (bytes / 512) as u32;
    let cmd = driver.with_prps(Cmd::rw(READ, 0, blocks), at, bytes);
    let mut lba = 0;
    let mut batch = |driver: &Driver<'_>, count: u32| {
        for _ in 0..count {
            lba = (lba + 12_345 * u64::from(blocks)) % (DISK / 512 - u64::from(blocks));
            driver.add(&mut pair, cmd.qw(10, lba));
        }
        driver.ring(&mut pair);
        for _ in 0..count {
            assert_eq!(driver.wait(&mut pair).status, OK);
        }
    };
    for _ in 0..100 {
        batch(&driver, depth);
    }
    let (began, cpu) = (Instant::now(), processor_time("nvme-q1"));
    let mut requests = 0u64;
    while began.elapsed() < Duration::from_secs(1) {
        batch(&driver, depth);
        requests += u64::from(depth);
    }
    let (wall, cpu) = (
        began.elapsed().as_nanos() as u64,
        (processor_time("nvme-q1") - cpu).as_nanos() as u64,
    );
    println!(
        "{:>9} depth {depth:3} {:4} KiB: {:8} requests/s on a core, {:6} ns of it each; {:8} requests/s seen",
        if shadow { "shadow" } else { "registers" },
        bytes >> 10,
        requests * 1_000_000_000 / cpu.max(1),
        cpu / requests.max(1),
        requests * 1_000_000_000 / wall,
    );
}

fn main() {
    for bytes in [4096, 128 << 10] {
        for shadow in [false, true] {
            for depth in [1, 32, 256] {
                measure(shadow, depth, bytes);
            }
        }
    }
}

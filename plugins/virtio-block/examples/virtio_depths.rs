//! What the device costs without a guest: requests per second and core, by depth, on a disk in memory. A core is the processor
//! time of the queue's thread; the driver's side does not count.

#![allow(clippy::expect_used, missing_docs)] // a bench

use std::time::{Duration, Instant};

use vmm_plugin_api::testing::{Buffer, FakeHost, Value, VirtioDriver, load, processor_time};

/// How long the driver waits for a completion.
const WAIT: Duration = Duration::from_secs(20);
const DISK: u64 = 64 << 20;
/// VIRTIO_BLK_T_IN (virtio 1.2, section 5.2.6).
const READ: u32 = 0;

/// The thread that serves the queue.
const QUEUE_THREAD: &str = "virtio-blk-q0";

fn measure(depth: u32, bytes: u32) {
    let host = FakeHost::new(64 << 20);
    let root = load("vmm-plugin-memory").expect("the backend");
    let options: [(&str, Value); 3] = [
        ("size", DISK.into()),
        ("block_size", 512u64.into()),
        ("workers", 1u64.into()),
    ];
    let disk = host.block(root, "mem-async", &options).expect("a disk");
    let options = [("block_dev", Value::from(&disk))];
    let plugin = &vmm_plugin_virtio_block::VMM_PLUGIN;
    let device = host
        .device(plugin, "pci-virtio-block", &options)
        .expect("a device");
    device.start().expect("it starts");
    let mut driver = VirtioDriver::modern(&host, &device).expect("a driver");
    driver.negotiate(u64::MAX).expect("features");
    let mut queue = driver.queue(0, 256, 0).expect("a queue");
    driver.ready().expect("ready");
    let sectors = u64::from(bytes / 512);
    let requests: Vec<_> = (0..depth)
        .map(|n| {
            let header = driver.allocate(16, 16);
            let sector = u64::from(n) * 12_345 * sectors % (DISK / 512 - sectors);
            let head = [u64::from(READ), sector].map(u64::to_le_bytes).concat();
            driver.memory().write(header, &head).expect("RAM");
            let data = driver.allocate(u64::from(bytes), 4096);
            let status = driver.allocate(1, 1);
            let table = driver.allocate(48, 16);
            let chain = [
                Buffer::readable(header, 16),
                Buffer::writable(data, bytes),
                Buffer::writable(status, 1),
            ];
            (table, chain, status)
        })
        .collect();
    let mut batch = || {
        for (table, chain, _) in &requests {
            queue.add_indirect(*table, chain);
        }
        queue.kick(&device);
        let end = Instant::now() + WAIT;
        for _ in &requests {
            while queue.take_used().is_none() {
                assert!(Instant::now() < end, "no completion");
                std::thread::yield_now();
            }
        }
    };
    for _ in 0..100 {
        batch();
    }
    let (began, cpu) = (Instant::now(), processor_time(QUEUE_THREAD));
    let mut count = 0u64;
    while began.elapsed() < Duration::from_secs(1) {
        batch();
        count += u64::from(depth);
    }
    let (wall, cpu) = (
        began.elapsed().as_nanos() as u64,
        (processor_time(QUEUE_THREAD) - cpu).as_nanos() as u64,
    );
    for (_, _, status) in &requests {
        let mut byte = [1];
        driver.memory().read(*status, &mut byte).expect("RAM");
        assert_eq!(byte, [0], "a request has failed");
    }
    println!(
        "depth {depth:3} {:4} KiB: {:8} requests/s on a core, {:6} ns of it each; {:8} requests/s seen",
        bytes >> 10,
        count * 1_000_000_000 / cpu.max(1),
        cpu / count.max(1),
        count * 1_000_000_000 / wall,
    );
}

fn main() {
    for bytes in [4096, 128 << 10] {
        for depth in [1, 32, 128] {
            measure(depth, bytes);
        }
    }
}

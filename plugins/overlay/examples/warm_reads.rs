//! What an overlay adds to reads that the page cache has: `warm_reads FOLDER` (on the filesystem in question).
//!
//! The minimum over many rounds of the plain file, of an overlay that has nothing, and of one that has all, taken in turns, so that
//! other load on the machine hardly shows.

#![allow(clippy::expect_used)] // a bench

use std::path::Path;
use std::time::Instant;

use vmm_plugin_api::testing::{Backend, FakeHost, Value, load};
use vmm_plugin_api::{Batch, BlockDone, BlockOp, BlockQueueHandle};

const BYTES: u64 = 64 << 20;

fn finish(queue: &mut BlockQueueHandle, batch: &mut Batch) {
    let mut done = [BlockDone::default(); 64];
    let mut left = batch.len();
    while left > 0 {
        queue.submit(batch);
        let count = queue.reap(&mut done);
        assert!(done[..count].iter().all(|d| d.result == 0));
        left -= count;
        if left > 0 && count == 0 {
            let fd = queue.fd().expect("descriptor");
            let wait = rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN);
            rustix::event::poll(&mut [wait], None).expect("poll");
            queue.drain();
        }
    }
}

fn overlay(host: &FakeHost, folder: &Path, name: &str, base: &Backend) -> Backend {
    let path = folder.join(name);
    let options: [(&str, Value); 5] = [
        ("backing", base.into()),
        ("path", path.to_str().expect("UTF-8").into()),
        ("keep", true.into()),
        ("read_only", false.into()),
        ("workers", 8u64.into()),
    ];
    host.block(&vmm_plugin_overlay::VMM_PLUGIN, "overlay", &options)
        .expect("overlay")
}

fn main() {
    let parent = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    let folder = Path::new(&parent).join("vmm-bench-overlay");
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("base"), vec![1u8; BYTES as usize]).expect("an image");
    let host = FakeHost::new(16 << 20);
    let path = folder.join("base");
    let options: [(&str, Value); 7] = [
        ("path", path.to_str().expect("UTF-8").into()),
        ("read_only", true.into()),
        ("block_size", 512u64.into()),
        ("workers", 8u64.into()),
        ("skip_flush", false.into()),
        ("direct", false.into()),
        ("discard", true.into()),
    ];
    let root = load("vmm-plugin-file").expect("the file plugin");
    let file = host.block(root, "file", &options).expect("file");
    let (empty, full) = (
        overlay(&host, &folder, "empty", &file),
        overlay(&host, &folder, "full", &file),
    );
    let open = |backend: &Backend| {
        let device = backend.as_block().expect("block");
        device.open_queue(64).expect("queue")
    };
    let mut queues = [open(&file), open(&empty), open(&full)];
    let mut batch = Batch::default();
    let megabyte = host.memory().writable(0, 1 << 20).expect("RAM");
    for at in (0..BYTES).step_by(1 << 20) {
        batch.transfer(0, BlockOp::Write { fua: false }, at, &[megabyte]);
        finish(&mut queues[2], &mut batch);
    }
    for (name, len) in [("4 KiB", 4096u64), ("128 KiB", 131_072)] {
        for depth in [1u64, 8, 32] {
            let mut best = [f64::MAX; 3];
            for round in 0..3000u64 {
                for (which, (queue, best)) in (0u64..).zip(queues.iter_mut().zip(&mut best)) {
                    for i in 0..depth {
                        // Places of its own in each turn: what another disk has just read would be in the CPU's cache.
                        let place = (round * 3 + which) * 33 + i;
                        let at = place * 7919 % 512 * 131_072;
                        let slice = host.memory().writable(i * len, len).expect("RAM");
                        batch.transfer(i, BlockOp::Read, at, &[slice]);
                    }
                    let start = Instant::now();
                    finish(queue, &mut batch);
                    *best = best.min(start.elapsed().as_nanos() as f64 / depth as f64);
                }
            }
            let [plain, below, own] = best;
            println!(
                "{name:7} read, depth {depth:2}: file {plain:6.0} ns, overlay from its base {below:6.0} ns ({:.3}), from its own file {own:6.0} ns ({:.3})",
                below / plain,
                own / plain
            );
        }
    }
    drop(queues);
    drop((file, empty, full));
    drop(std::fs::remove_dir_all(folder));
}

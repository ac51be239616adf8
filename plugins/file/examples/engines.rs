//! Time per request of a disk in a file, by engine and depth: `engines FOLDER [ROUNDS]` (on the filesystem in question).
//!
//! The minimum over many rounds, so that other load on the machine hardly shows. Under QEMU with `-icount shift=0` a nanosecond is an
//! instruction, of this program and of the kernel, and 50 rounds are enough.

#![allow(clippy::expect_used)] // a bench

use std::path::Path;
use std::time::Instant;

use vmm_plugin_api::testing::{FakeHost, Value};
use vmm_plugin_api::{Batch, BlockDone, BlockOp, BlockQueueHandle};

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
            let mut fds = [rustix::event::PollFd::new(
                &fd,
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut fds, None).expect("poll");
            queue.drain();
        }
    }
}

fn main() {
    let folder = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    let rounds = std::env::args()
        .nth(2)
        .map(|n| n.parse().expect("a number"));
    let path = Path::new(&folder).join("vmm-bench-disk");
    std::fs::write(&path, vec![1u8; 64 << 20]).expect("an image");
    let host = FakeHost::new(16 << 20);
    for (engine, direct, pin) in [
        ("page cache", false, false),
        ("direct", true, false),
        ("direct, pinned", true, true),
    ] {
        // What the page cache still holds, direct I/O would have to write and drop first.
        let file = std::fs::File::open(&path).expect("the image");
        file.sync_all().expect("write the image");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("drop its pages");
        let options: [(&str, Value); 8] = [
            ("path", path.to_str().expect("UTF-8").into()),
            ("read_only", false.into()),
            ("block_size", 4096u64.into()),
            ("workers", 8u64.into()),
            ("skip_flush", false.into()),
            ("direct", direct.into()),
            ("discard", true.into()),
            ("pin_memory", pin.into()),
        ];
        let backend = match host.block(&vmm_plugin_file::VMM_PLUGIN, "file", &options) {
            Ok(backend) => backend,
            Err(error) => {
                println!("{engine}: {error:#}");
                continue;
            }
        };
        let mut queue = backend
            .as_block()
            .expect("block")
            .open_queue(64)
            .expect("queue");
        for (name, op, len) in [
            ("4 KiB read", BlockOp::Read, 4096u64),
            ("4 KiB write", BlockOp::Write { fua: false }, 4096),
            ("128 KiB read", BlockOp::Read, 131_072),
            ("128 KiB write", BlockOp::Write { fua: false }, 131_072),
        ] {
            for depth in [1u64, 2, 8, 32] {
                let mut batch = Batch::default();
                let rounds = rounds.unwrap_or(if direct { 300 } else { 3000 });
                let mut best = f64::MAX;
                for round in 0..rounds {
                    for i in 0..depth {
                        let at = (round * 7919 + i * 104_729) % 512 * 131_072;
                        let slice = host.memory().writable(i * len, len).expect("RAM");
                        batch.transfer(i, op, at, &[slice]);
                    }
                    let start = Instant::now();
                    finish(&mut queue, &mut batch);
                    best = best.min(start.elapsed().as_nanos() as f64 / depth as f64);
                }
                println!("{engine:14}  {name:13} depth {depth:2}: {best:8.0} ns per request");
            }
        }
    }
    drop(std::fs::remove_file(path));
}

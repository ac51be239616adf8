//! The rate that a disk gets, over all its queues, and what is refused.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests

use std::time::{Duration, Instant};

use vmm_plugin_api::testing::{
    Backend, FakeHost, Value, load, run_batch, run_control, run_transfer,
};
use vmm_plugin_api::{Batch, BlockDone, BlockOp};
use vmm_plugin_throttle::VMM_PLUGIN;

const MIB: u64 = 1 << 20;
const WRITE: BlockOp = BlockOp::Write { fua: false };

fn memory(host: &FakeHost, read_only: bool) -> Backend {
    let options: [(&str, Value); 3] = [
        ("size", (4 * MIB).into()),
        ("block_size", 512u64.into()),
        ("read_only", read_only.into()),
    ];
    host.block(load("vmm-plugin-memory").unwrap(), "mem-async", &options)
        .unwrap()
}

fn throttle(host: &FakeHost, limits: &[(&str, u64)], read_only: bool) -> Result<Backend, String> {
    let memory = memory(host, false);
    let mut options = vec![
        ("backing", Value::from(&memory)),
        ("read_only", read_only.into()),
    ];
    options.extend(
        limits
            .iter()
            .map(|(key, value)| (*key, Value::from(*value))),
    );
    host.block(&VMM_PLUGIN, "throttle", &options)
        .map_err(|e| format!("{e:#}"))
}

/// Reads `count` times 4 KiB in batches of 16, on each of `queues` queues; how long that takes.
fn time(host: &FakeHost, disk: &Backend, queues: u64, count: u64) -> Duration {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for queue in 0..queues {
            let (host, disk) = (host.clone(), disk.as_block().unwrap());
            scope.spawn(move || {
                let mut queue_ = disk.open_queue(16).unwrap();
                let slice = host.memory().writable(queue * 4096, 4096).unwrap();
                let mut batch = Batch::default();
                for first in (0..count).step_by(16) {
                    for token in 0..16.min(count - first) {
                        batch.transfer(token, BlockOp::Read, token * 4096, &[slice]);
                    }
                    for (token, result) in run_batch(&mut queue_, &mut batch).unwrap() {
                        assert_eq!(result, 0, "request {token}");
                    }
                }
            });
        }
    });
    start.elapsed()
}

/// A limit can't be beaten, however slow the machine. That the time is not longer than it must be, a busy machine can't tell: the tests of
/// the bucket do, whose clock is a number.
fn at_least(took: Duration, least: u64) {
    println!("took {took:?}");
    assert!(took >= Duration::from_millis(least), "too fast: {took:?}");
}

/// Reads `count` times 4 KiB on a queue of its own; how many are complete without any waiting.
fn at_once(host: &FakeHost, disk: &Backend, count: u64) -> usize {
    let mut queue = disk.as_block().unwrap().open_queue(count as u32).unwrap();
    let slice = host.memory().writable(0, 4096).unwrap();
    let mut batch = Batch::default();
    for token in 0..count {
        batch.transfer(token, BlockOp::Read, token * 4096, &[slice]);
    }
    assert_eq!(queue.submit(&mut batch), count as usize);
    let mut done = vec![BlockDone::default(); count as usize];
    let complete = queue.reap(&mut done);
    assert!(done[..complete].iter().all(|one| one.result == 0));
    complete
}

#[test]
fn operations_per_second_over_all_queues() {
    let host = FakeHost::new(MIB);
    // 160 requests, of which 10 go at once.
    let limits = [("ops_per_second", 500), ("burst_ops", 10)];
    for queues in [1, 4] {
        let disk = throttle(&host, &limits, false).unwrap();
        at_least(time(&host, &disk, queues, 160 / queues), 299);
    }
}

#[test]
fn bytes_per_second_and_the_burst() {
    let host = FakeHost::new(MIB);
    let limits = [("bytes_per_second", MIB), ("burst_bytes", MIB / 2)];
    let disk = throttle(&host, &limits, false).unwrap();
    // The burst goes at once, the rest at the rate: 128 requests are half a MiB.
    let start = Instant::now();
    assert_eq!(at_once(&host, &disk, 128), 128);
    time(&host, &disk, 1, 64);
    at_least(start.elapsed(), 249);
}

#[test]
fn a_burst_of_more_than_a_second() {
    let host = FakeHost::new(MIB);
    let limits = [("ops_per_second", 10), ("burst_ops", 200)];
    let disk = throttle(&host, &limits, false).unwrap();
    assert_eq!(at_once(&host, &disk, 160), 160);
}

#[test]
fn flushes_cost_no_bytes_and_keep_their_place() {
    let host = FakeHost::new(MIB);
    let limits = [("bytes_per_second", 64 << 10), ("burst_bytes", 4096)];
    let disk = throttle(&host, &limits, false).unwrap();
    let mut queue = disk.as_block().unwrap().open_queue(64).unwrap();
    let start = Instant::now();
    for _ in 0..1000 {
        assert_eq!(run_control(&mut queue, BlockOp::Flush, 0, 0).unwrap(), 0);
    }
    let slice = host.memory().writable(0, 4096).unwrap();
    let mut batch = Batch::default();
    for token in 0..4 {
        batch.transfer(token, WRITE, token * 4096, &[slice]);
    }
    batch.control(4, BlockOp::Flush, 0, 0);
    assert_eq!(run_batch(&mut queue, &mut batch).unwrap().len(), 5);
    // Three of the writes wait 62 ms each; the flush behind them as long as they do.
    at_least(start.elapsed(), 187);
}

#[test]
fn what_waits_when_the_queue_ends_is_done() {
    let host = FakeHost::new(MIB);
    // A quarter of an hour for all of it.
    let disk = throttle(&host, &[("bytes_per_second", 4096)], false).unwrap();
    let mut queue = disk.as_block().unwrap().open_queue(8).unwrap();
    let slice = host.memory().writable(0, MIB / 2).unwrap();
    slice.fill(0x55);
    let mut batch = Batch::default();
    for token in 0..8 {
        batch.transfer(token, WRITE, token * MIB / 2, &[slice]);
    }
    let start = Instant::now();
    assert_eq!(queue.submit(&mut batch), 8);
    drop(queue);
    let mut queue = disk.as_block().unwrap().open_queue(8).unwrap();
    // There is no look past the debt, so this one ends its queue as well.
    batch.transfer(0, BlockOp::Read, 7 * MIB / 2, &[slice]);
    assert_eq!(queue.submit(&mut batch), 1);
    slice.fill(0);
    drop(queue);
    // It was not waited for: no machine is that busy.
    assert!(start.elapsed() < Duration::from_secs(500));
    let mut bytes = [0; 512];
    slice.read(MIB as usize / 2 - 512, &mut bytes);
    assert_eq!(bytes, [0x55; 512]);
}

#[test]
fn errors_and_bad_options() {
    let host = FakeHost::new(MIB);
    let disk = throttle(&host, &[("ops_per_second", 1000)], true).unwrap();
    let mut queue = disk.as_block().unwrap().open_queue(8).unwrap();
    let slice = host.memory().writable(0, 512).unwrap();
    assert_eq!(
        run_transfer(&mut queue, WRITE, 0, &[slice]).unwrap(),
        -libc::EROFS
    );
    assert_eq!(
        run_transfer(&mut queue, BlockOp::Read, 4 * MIB, &[slice]).unwrap(),
        -libc::EINVAL
    );
    for (limits, text) in [
        (&[][..], "without a limit"),
        (&[("bytes_per_second", 100)], "at least 4096"),
        (
            &[("burst_bytes", 4096), ("ops_per_second", 5)],
            "`burst_bytes` has no effect without `bytes_per_second`",
        ),
        (
            &[("burst_ops", 4096), ("bytes_per_second", 4096)],
            "`burst_ops` has no effect",
        ),
        (
            &[("bytes_per_second", 4096), ("burst_bytes", 0)],
            "`burst_bytes` is 0",
        ),
    ] {
        let error = throttle(&host, limits, false).err().unwrap();
        assert!(error.contains(text), "{error}");
    }
    assert_eq!(host.faults(), Vec::<String>::new());
}

//! What rules do to requests, seen from above.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests

use std::time::{Duration, Instant};

use vmm_plugin_api::testing::{
    Backend, FakeHost, Value, load, run_batch, run_control, run_transfer,
};
use vmm_plugin_api::{Batch, BlockOp, BlockQueueHandle, GuestSlice};
use vmm_plugin_fault::VMM_PLUGIN;

const WRITE: BlockOp = BlockOp::Write { fua: false };

fn fault(host: &FakeHost, rules: &str) -> Result<Backend, String> {
    let options: [(&str, Value); 3] = [
        ("size", (1u64 << 20).into()),
        ("block_size", 512u64.into()),
        ("read_only", false.into()),
    ];
    let root = load("vmm-plugin-memory").unwrap();
    let memory = host.block(root, "mem-async", &options).unwrap();
    let options: [(&str, Value); 3] = [
        ("backing", Value::from(&memory)),
        ("rules", rules.into()),
        ("read_only", false.into()),
    ];
    host.block(&VMM_PLUGIN, "fault", &options)
        .map_err(|e| format!("{e:#}"))
}

fn disk(rules: &str) -> (FakeHost, Backend, BlockQueueHandle, GuestSlice) {
    let host = FakeHost::new(1 << 20);
    let backend = fault(&host, rules).unwrap();
    let queue = backend.as_block().unwrap().open_queue(8).unwrap();
    let slice = host.memory().writable(0, 4096).unwrap();
    (host, backend, queue, slice)
}

fn bytes(slice: GuestSlice) -> Vec<u8> {
    let mut bytes = vec![0; slice.len()];
    slice.read(0, &mut bytes);
    bytes
}

#[test]
fn errors_come_where_and_when_they_are_asked_for() {
    let (host, _backend, mut queue, slice) = disk(
        "write 4096..8192 error ENOSPC after 1 times 2; flush error EIO every 3; zero error ENOTSUP",
    );
    slice.fill(1);
    let mut write = |at| run_transfer(&mut queue, WRITE, at, &[slice]).unwrap();
    let got = [write(4096), write(0), write(4096), write(4096), write(4096)];
    assert_eq!(got, [0, 0, -libc::ENOSPC, -libc::ENOSPC, 0]);
    let mut control = |op| run_control(&mut queue, op, 0, 0).unwrap();
    let flushes: Vec<i32> = (0..6).map(|_| control(BlockOp::Flush)).collect();
    assert_eq!(flushes, [0, 0, -libc::EIO, 0, 0, -libc::EIO]);
    assert_eq!(
        control(BlockOp::WriteZeroes { unmap: false }),
        -libc::ENOTSUP
    );
    assert_eq!(host.faults(), Vec::<String>::new());
}

#[test]
fn a_failed_write_stores_nothing_and_a_torn_one_its_start() {
    let (host, _backend, mut queue, slice) = disk("write 0..4096 error EIO; write 4096.. torn 1K");
    slice.fill(7);
    let list = [slice.part(0, 700), slice.part(700, 3396)];
    for at in [0, 8192] {
        assert_eq!(
            run_transfer(&mut queue, WRITE, at, &list).unwrap(),
            -libc::EIO
        );
    }
    slice.fill(1);
    assert_eq!(
        run_transfer(&mut queue, BlockOp::Read, 0, &[slice]).unwrap(),
        0
    );
    assert!(bytes(slice).iter().all(|byte| *byte == 0));
    assert_eq!(
        run_transfer(&mut queue, BlockOp::Read, 8192, &[slice]).unwrap(),
        0
    );
    let bytes = bytes(slice);
    assert!(bytes[..1024].iter().all(|byte| *byte == 7));
    assert!(bytes[1024..].iter().all(|byte| *byte == 0));
    assert_eq!(host.faults(), Vec::<String>::new());
}

#[test]
fn delays_hold_what_they_are_for_and_nothing_else() {
    let (_host, _backend, mut queue, slice) =
        disk("read 0..512 delay 80ms; read 0..512 delay 40ms after 1");
    let mut batch = Batch::default();
    batch.transfer(0, BlockOp::Read, 0, &[slice.part(0, 512)]);
    batch.transfer(1, BlockOp::Read, 512, &[slice.part(512, 512)]);
    let start = Instant::now();
    queue.submit(&mut batch);
    let mut done = [Default::default(); 4];
    assert_eq!((queue.reap(&mut done), done[0].token), (1, 1));
    assert_eq!(run_batch(&mut queue, &mut batch).unwrap().len(), 0);
    // The rest comes with a signal.
    let fd = queue.fd().unwrap();
    let wait = rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN);
    rustix::event::poll(&mut [wait], None).unwrap();
    queue.drain();
    assert_eq!((queue.reap(&mut done), done[0].token), (1, 0));
    assert!(start.elapsed() >= Duration::from_millis(80));
    let start = Instant::now();
    assert_eq!(
        run_transfer(&mut queue, BlockOp::Read, 0, &[slice.part(0, 512)]).unwrap(),
        0
    );
    assert!(
        start.elapsed() >= Duration::from_millis(120),
        "delays add up"
    );
    // Nothing is left that would wake anybody.
    let fd = queue.fd().unwrap();
    let mut wait = [rustix::event::PollFd::new(
        &fd,
        rustix::event::PollFlags::IN,
    )];
    let moment = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 200_000_000,
    };
    assert_eq!(rustix::event::poll(&mut wait, Some(&moment)).unwrap(), 0);
}

#[test]
fn a_queue_that_ends_does_what_it_has_taken() {
    let (_host, backend, mut queue, slice) = disk("write delay 1s");
    slice.fill(3);
    let mut batch = Batch::default();
    batch.transfer(0, WRITE, 0, &[slice]);
    assert_eq!(queue.submit(&mut batch), 1);
    drop(queue);
    slice.fill(0);
    let mut queue = backend.as_block().unwrap().open_queue(8).unwrap();
    assert_eq!(
        run_transfer(&mut queue, BlockOp::Read, 0, &[slice]).unwrap(),
        0
    );
    assert!(bytes(slice).iter().all(|byte| *byte == 3));
}

#[test]
fn bad_rules_are_refused_with_their_column() {
    let host = FakeHost::new(4096);
    let error = fault(&host, "read delay 10ms; write torn 100")
        .err()
        .unwrap();
    assert!(
        error.contains(
            "`rules`, column 29: expected a number of bytes in whole blocks of 512, found `100`"
        ),
        "{error}"
    );
}

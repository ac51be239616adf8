//! Data goes where it should, on every engine.

#![allow(clippy::expect_used)] // tests

mod support;

use std::path::Path;
use std::time::Duration;

use support::{MIB, Mode, Random, each_mode, run, succeed, wait};
use vmm_plugin_api::abi::block::{BLOCK_DISCARD, BLOCK_VOLATILE_CACHE, BLOCK_WRITE_ZEROES};
use vmm_plugin_api::{Batch, BlockDone, BlockOp, GuestMemory, GuestSlice};

const WRITE: BlockOp = BlockOp::Write { fua: false };

fn any_name(dir: &str, name: impl Fn(&Path) -> Option<String>, wanted: &str) -> bool {
    std::fs::read_dir(dir)
        .expect("proc")
        .flatten()
        .filter_map(|e| name(&e.path()))
        .any(|n| n.contains(wanted))
}

#[test]
fn each_mode_uses_the_engine_it_is_named_after() {
    each_mode(|setup| {
        let backend = setup.open(&setup.image("disk", MIB), &[]);
        let queue = backend
            .as_block()
            .expect("block")
            .open_queue(8)
            .expect("queue");
        let thread = || {
            any_name(
                "/proc/self/task",
                |p| std::fs::read_to_string(p.join("comm")).ok(),
                "disk\n",
            )
        };
        assert_eq!(queue.fd().is_none(), setup.mode == Mode::Memory);
        match setup.mode {
            // A thread takes its name when it first runs.
            Mode::Threads => assert!(
                (0..200).any(|_| thread() || {
                    std::thread::sleep(Duration::from_millis(10));
                    false
                }),
                "no worker"
            ),
            Mode::Uring | Mode::Direct | Mode::Pinned if !ring() => {
                println!("SKIPPED: {:?}: this machine has no io_uring", setup.mode)
            }
            _ => {}
        }
    });
}

/// Splits `len` bytes at guest address `at` into random pieces of multiples of `unit`.
fn scatter(
    memory: GuestMemory,
    random: &mut Random,
    at: u64,
    len: u64,
    unit: u64,
) -> Vec<GuestSlice> {
    let (mut pieces, mut done) = (Vec::new(), 0);
    while done < len {
        let count = (unit * (1 + random.below(8))).min(len - done);
        pieces.push(memory.writable(at + done, count).expect("RAM"));
        done += count;
    }
    // More than a backend takes.
    if pieces.len() > 256 {
        return vec![memory.writable(at, len).expect("RAM")];
    }
    pieces
}

/// Random batches of every operation against a plain array; requests of one batch do not overlap.
#[test]
fn random_requests_match_a_model() {
    each_mode(|setup| {
        const STRIPE: u64 = 64 << 10;
        let path = setup.image("disk", 32 * STRIPE);
        let backend = setup.open(&path, &[]);
        let block = backend.as_block().expect("block");
        let needed = BLOCK_WRITE_ZEROES | BLOCK_VOLATILE_CACHE;
        assert_eq!(block.info().expect("info").features & needed, needed);
        let can_discard = block.info().expect("info").features & BLOCK_DISCARD != 0;
        let mut queue = block.open_queue(16).expect("queue");
        let (memory, mut random) = (setup.host.memory(), Random(0x1234_5678_9abc_def1));
        let mut model = vec![0u8; (32 * STRIPE) as usize];
        let mut batch = Batch::default();
        for round in 0..60 {
            let (mut reads, mut cleared) = (Vec::new(), Vec::new());
            for stripe in 0..1 + random.below(32) {
                let offset = stripe * STRIPE + 512 * random.below(64);
                let len = 512 * (1 + random.below(64));
                let range = offset as usize..(offset + len) as usize;
                // Unaligned memory takes another way when I/O is direct.
                let (at, unit) = if random.below(4) == 0 {
                    (stripe * STRIPE * 2 + 3, 7)
                } else {
                    (stripe * STRIPE * 2, 512)
                };
                match random.below(7) {
                    0 => {
                        batch.control(
                            stripe,
                            BlockOp::WriteZeroes {
                                unmap: round % 2 == 0,
                            },
                            offset,
                            len,
                        );
                        cleared.push(range);
                    }
                    1 if can_discard => {
                        batch.control(stripe, BlockOp::Discard, offset, len);
                        cleared.push(range);
                    }
                    2 => batch.control(stripe, BlockOp::Flush, 0, 0),
                    3 | 4 => {
                        let bytes: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
                        memory.write(at, &bytes).expect("RAM");
                        let pieces = scatter(memory, &mut random, at, len, unit);
                        batch.transfer(
                            stripe,
                            BlockOp::Write {
                                fua: random.below(4) == 0,
                            },
                            offset,
                            &pieces,
                        );
                        model[range].copy_from_slice(&bytes);
                    }
                    _ => {
                        let pieces = scatter(memory, &mut random, at, len, unit);
                        batch.transfer(stripe, BlockOp::Read, offset, &pieces);
                        reads.push((at, range));
                    }
                }
            }
            succeed(&mut queue, &mut batch);
            for range in cleared {
                model[range].fill(0);
            }
            for (at, range) in reads {
                let mut got = vec![0; range.len()];
                memory.read(at, &mut got).expect("RAM");
                assert!(
                    got == model[range.clone()],
                    "round {round}: {range:?} differs from the model"
                );
            }
        }
        drop(queue);
        assert!(
            std::fs::read(&path).expect("read") == model,
            "the file differs from the model"
        );
    });
}

#[test]
fn many_queues_run_in_parallel() {
    each_mode(|setup| {
        let backend = setup.open(&setup.image("disk", 16 * MIB), &[]);
        let block = backend.as_block().expect("block");
        let memory = setup.host.memory();
        let mode = setup.mode;
        std::thread::scope(|scope| {
            for n in 0..8u64 {
                // The filter that forbids io_uring holds for this thread: open here, use there.
                let mut queue = block.open_queue(32).expect("queue");
                scope.spawn(move || {
                    let mut batch = Batch::default();
                    for round in 0..20u64 {
                        let slices: Vec<_> = (0..32)
                            .map(|i| memory.writable(n * 2 * MIB + i * 4096, 4096).expect("RAM"))
                            .collect();
                        for (i, slice) in (0u64..).zip(&slices) {
                            slice.fill((n ^ round ^ i) as u8);
                            batch.transfer(i, WRITE, n * 2 * MIB + i * 8192, &[*slice]);
                        }
                        succeed(&mut queue, &mut batch);
                        for (i, slice) in (0u64..).zip(&slices) {
                            slice.fill(0xff);
                            batch.transfer(i, BlockOp::Read, n * 2 * MIB + i * 8192, &[*slice]);
                        }
                        batch.control(99, BlockOp::Flush, 0, 0);
                        succeed(&mut queue, &mut batch);
                        for (i, slice) in (0u64..).zip(&slices) {
                            let mut got = [0; 4096];
                            slice.read(0, &mut got);
                            assert_eq!(
                                got,
                                [(n ^ round ^ i) as u8; 4096],
                                "{mode:?}, queue {n}, round {round}, block {i}"
                            );
                        }
                    }
                });
            }
        });
    });
}

#[test]
fn a_full_queue_takes_no_more_until_reaped() {
    each_mode(|setup| {
        let backend = setup.open(&setup.image("disk", MIB), &[]);
        let mut queue = backend
            .as_block()
            .expect("block")
            .open_queue(4)
            .expect("queue");
        let slice = setup.host.memory().writable(0, 4096).expect("RAM");
        let mut batch = Batch::default();
        for i in 0..6 {
            batch.transfer(i, BlockOp::Read, i * 4096, &[slice]);
        }
        assert_eq!(queue.submit(&mut batch), 4);
        assert_eq!(queue.submit(&mut batch), 0);
        let mut one = [BlockDone::default()];
        while queue.reap(&mut one) == 0 {
            wait(&queue);
        }
        assert_eq!(queue.submit(&mut batch), 1);
        let mut left = 4;
        while left > 0 {
            let count = queue.reap(&mut one);
            left -= count;
            if count == 0 {
                wait(&queue);
            }
        }
        assert_eq!(queue.submit(&mut batch), 1, "the sixth");
    });
}

/// What is in flight when a queue is closed still happens.
#[test]
fn closing_a_queue_waits_for_its_writes() {
    each_mode(|setup| {
        let path = setup.image("disk", 4 * MIB);
        let backend = setup.open(&path, &[]);
        let mut queue = backend
            .as_block()
            .expect("block")
            .open_queue(64)
            .expect("queue");
        let slice = setup.host.memory().writable(0, 65536).expect("RAM");
        slice.fill(0x5a);
        let mut batch = Batch::default();
        for i in 0..64 {
            batch.transfer(i, BlockOp::Write { fua: true }, i * 65536, &[slice]);
        }
        assert_eq!(queue.submit(&mut batch), 64);
        drop(queue);
        assert!(
            std::fs::read(&path)
                .expect("read")
                .iter()
                .all(|b| *b == 0x5a)
        );
    });
}

#[test]
fn bad_requests_fail_alone() {
    each_mode(|setup| {
        let backend = setup.open(&setup.image("disk", MIB), &[("block_size", 4096u64.into())]);
        let mut queue = backend
            .as_block()
            .expect("block")
            .open_queue(16)
            .expect("queue");
        let memory = setup.host.memory();
        let slice = memory.writable(0, 4096).expect("RAM");
        let mut batch = Batch::default();
        batch.transfer(0, BlockOp::Read, MIB, &[slice]);
        batch.transfer(1, BlockOp::Read, 512, &[slice]);
        batch.transfer(2, WRITE, u64::MAX - 4095, &[slice]);
        batch.transfer(3, WRITE, 0, &[memory.writable(0, 100).expect("RAM")]);
        batch.transfer(4, BlockOp::Read, 0, &vec![slice.part(0, 16); 257 * 256]);
        batch.control(5, BlockOp::Discard, MIB, 4096);
        batch.transfer(6, BlockOp::Read, 0, &[]);
        batch.transfer(7, BlockOp::Read, MIB - 4096, &[slice]);
        let results: Vec<i32> = run(&mut queue, &mut batch).into_values().collect();
        let invalid = -libc::EINVAL;
        assert_eq!(
            results,
            [invalid, invalid, invalid, invalid, invalid, invalid, 0, 0]
        );
    });
}

#[test]
fn a_file_that_was_cut_short_under_the_disk_gives_an_error() {
    each_mode(|setup| {
        let path = setup.image("disk", 4 * MIB);
        let backend = setup.open(&path, &[]);
        let mut queue = backend
            .as_block()
            .expect("block")
            .open_queue(16)
            .expect("queue");
        std::fs::File::options()
            .write(true)
            .open(&path)
            .and_then(|f| f.set_len(MIB))
            .expect("truncate");
        let slice = setup.host.memory().writable(0, 65536).expect("RAM");
        let mut batch = Batch::default();
        batch.transfer(0, BlockOp::Read, 2 * MIB, &[slice]);
        assert_eq!(run(&mut queue, &mut batch)[&0], -libc::EIO, "alone");
        batch.transfer(0, BlockOp::Read, MIB - 32768, &[slice]);
        batch.transfer(1, BlockOp::Read, 0, &[slice]);
        let results = run(&mut queue, &mut batch);
        assert_eq!((results[&0], results[&1]), (-libc::EIO, 0), "in a batch");
    });
}

fn blocks(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).expect("stat").blocks()
}

#[test]
fn discard_frees_space_unless_told_not_to() {
    each_mode(|setup| {
        for discard in [true, false] {
            let path = setup.path("disk");
            std::fs::write(&path, vec![7u8; 4 << 20]).expect("fill");
            let backend = setup.open(&path, &[("discard", discard.into())]);
            let block = backend.as_block().expect("block");
            let full = blocks(&path);
            let offered = block.info().expect("info").features & BLOCK_DISCARD != 0;
            if discard && !offered {
                println!("SKIPPED: discard_frees_space: no holes on this filesystem");
                continue;
            }
            assert_eq!(offered, discard);
            let mut queue = block.open_queue(16).expect("queue");
            let mut batch = Batch::default();
            batch.control(0, BlockOp::Discard, 0, MIB);
            batch.control(1, BlockOp::WriteZeroes { unmap: true }, MIB, MIB);
            batch.control(2, BlockOp::WriteZeroes { unmap: false }, 2 * MIB, MIB);
            let results: Vec<i32> = run(&mut queue, &mut batch).into_values().collect();
            assert_eq!(results, [if discard { 0 } else { -libc::ENOTSUP }, 0, 0]);
            let data = std::fs::read(&path).expect("read");
            let mib = MIB as usize;
            assert!(
                data[mib..3 * mib].iter().all(|b| *b == 0)
                    && data[3 * mib..].iter().all(|b| *b == 7)
            );
            assert!(
                data[..mib]
                    .iter()
                    .all(|b| *b == if discard { 0 } else { 7 })
            );
            let freed = full.saturating_sub(blocks(&path)) * 512 / MIB;
            assert_eq!(
                freed,
                if discard { 2 } else { 0 },
                "MiB freed with discard = {discard}"
            );
        }
    });
}

#[test]
fn skip_flush_completes_flushes_without_the_disk() {
    each_mode(|setup| {
        let backend = setup.open(&setup.image("disk", MIB), &[("skip_flush", true.into())]);
        let block = backend.as_block().expect("block");
        assert_eq!(
            block.info().expect("info").features & BLOCK_VOLATILE_CACHE,
            0
        );
        let mut queue = block.open_queue(16).expect("queue");
        let mut batch = Batch::default();
        batch.control(1, BlockOp::Flush, 0, 0);
        assert_eq!(queue.submit(&mut batch), 1);
        let mut done = [BlockDone::default()];
        assert_eq!(queue.reap(&mut done), 1, "complete when submit returns");
        assert_eq!(done[0].result, 0);
    });
}

/// Completions during submit raise no signal; those after it do. Neither is ever lost.
#[test]
fn the_descriptor_signals_only_what_submit_left_open() {
    let Some(setup) = support::Setup::new(Mode::Uring) else {
        return;
    };
    let backend = setup.open(&setup.image("disk", MIB), &[]);
    let mut queue = backend
        .as_block()
        .expect("block")
        .open_queue(32)
        .expect("queue");
    let slice = setup.host.memory().writable(0, 4096).expect("RAM");
    let mut batch = Batch::default();
    for i in 0..32 {
        batch.transfer(i, WRITE, i * 4096, &[slice]);
    }
    succeed(&mut queue, &mut batch);
    for i in 0..32 {
        batch.transfer(i, BlockOp::Read, i * 4096, &[slice]);
    }
    queue.submit(&mut batch);
    let mut done = [BlockDone::default(); 33];
    assert_eq!(queue.reap(&mut done), 32, "cached reads complete in submit");
    let fd = queue.fd().expect("descriptor");
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let ready = rustix::event::poll(
        &mut [rustix::event::PollFd::new(
            &fd,
            rustix::event::PollFlags::IN,
        )],
        Some(&now),
    );
    assert_eq!(ready.expect("poll"), 0, "and leave no signal behind");
    for i in 0..500 {
        batch.control(i, BlockOp::Flush, 0, 0);
        succeed(&mut queue, &mut batch);
    }
}

/// Whether this process has a ring.
fn ring() -> bool {
    any_name(
        "/proc/self/fd",
        |p| Some(std::fs::read_link(p).ok()?.to_string_lossy().into_owned()),
        "io_uring",
    )
}

/// Whether this user may lock as much memory as these tests have.
#[cfg(target_os = "linux")]
fn may_lock() -> bool {
    use std::os::unix::fs::MetadataExt;
    let root = std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0);
    let limits = std::fs::read_to_string("/proc/self/limits").expect("limits");
    let line = limits
        .lines()
        .find_map(|l| l.strip_prefix("Max locked memory"));
    let limit = line.and_then(|l| l.split_whitespace().next());
    root || limit == Some("unlimited")
}

/// kB of memory that the kernel holds for this process.
#[cfg(target_os = "linux")]
fn pinned() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix("VmPin:"));
    let number = line.and_then(|l| l.split_whitespace().next());
    number.and_then(|n| n.parse().ok()).expect("VmPin")
}

#[cfg(target_os = "linux")]
#[test]
fn guest_memory_is_registered_for_as_long_as_the_queue_is_there() {
    let Some(setup) = support::Setup::new(Mode::Pinned) else {
        return;
    };
    let backend = setup.open(&setup.image("disk", MIB), &[]);
    let queue = backend.as_block().expect("block").open_queue(8);
    if !ring() || !may_lock() {
        println!("SKIPPED: memory to pin: no io_uring here, or a limit on locked memory");
        return;
    }
    // Other tests of this program may hold more.
    assert!(pinned() >= 16 << 10, "{} kB", pinned());
    drop(queue);
}

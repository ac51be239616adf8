//! The controller on the real backends, each from its shared object, with many commands in flight.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::BTreeMap;

use support::*;
use vmm_plugin_api::testing::{Backend, FakeHost, Value, load};
use vmm_plugin_nvme::VMM_PLUGIN;

const BLOCKS: u64 = 8192;

/// Random reads, writes, flushes, zeroing and comparisons, up to 16 at a time on each of two queues, compared with a copy kept here.
fn torture(backend: impl Fn(&FakeHost) -> Backend, shadow: bool) {
    let host = FakeHost::new(192 << 20);
    let disk = backend(&host);
    let options = [("block_dev", Value::from(&disk))];
    let device = host.device(&VMM_PLUGIN, "pci-nvme", &options).unwrap();
    device.start().unwrap();
    let setup = Setup::on(host, device);
    let mut driver = setup.driver();
    let mut pairs = [driver.pair(1, 64, 1), driver.pair(2, 50, 2)];
    if shadow {
        driver.enable_shadow();
    }
    let mut copy = vec![0u8; BLOCKS as usize * 512];
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for round in 0..40u64 {
        // Commands in flight together touch different places: slot `i` owns a part of the disk.
        let mut flying = BTreeMap::new();
        for i in 0..1 + random.below(32) {
            let which = (i % 2) as usize;
            let first = i * (BLOCKS / 32) + random.below(BLOCKS / 32 - 64);
            let blocks = 1 + random.below(64);
            let range = first as usize * 512..(first + blocks) as usize * 512;
            let bytes = blocks * 512;
            let at = driver.allocate(bytes + 8192, 4096) + 4 * random.below(1024);
            let kind = random.below(6);
            let cmd = match kind {
                0 | 1 => {
                    let data = pattern(round * 100 + i, range.len());
                    copy[range.clone()].copy_from_slice(&data);
                    driver.memory.write(at, &data).unwrap();
                    driver.with_prps(Cmd::rw(WRITE, first, blocks as u32), at, bytes)
                }
                2 => {
                    copy[range.clone()].fill(0);
                    Cmd::rw(WRITE_ZEROES, first, blocks as u32)
                }
                3 => Cmd::new(FLUSH).nsid(1),
                4 => {
                    driver.memory.write(at, &copy[range.clone()]).unwrap();
                    driver.with_prps(Cmd::rw(COMPARE, first, blocks as u32), at, bytes)
                }
                _ => Cmd::rw(READ, first, blocks as u32).sgl(at, bytes as u32, 0),
            };
            let cid = driver.add(&mut pairs[which], cmd);
            flying.insert((which, cid), (kind, at, range));
        }
        for (which, pair) in pairs.iter_mut().enumerate() {
            driver.ring(pair);
            while flying.keys().any(|key| key.0 == which) {
                let cqe = driver.wait(pair);
                let (kind, at, range) = flying.remove(&(which, cqe.cid)).expect("in flight");
                assert_eq!(cqe.status, OK, "round {round}, kind {kind}");
                if kind == 5 {
                    let same = driver.bytes(at, range.len()) == copy[range];
                    assert!(same, "round {round}: what was read is what was written");
                }
            }
        }
        if round % 10 == 9 {
            setup.device.pause().unwrap();
            setup.device.resume().unwrap();
        }
    }
    for first in (0..BLOCKS).step_by(1024) {
        let all = driver.read(&mut pairs[0], first, 1024 * 512);
        assert!(all[..] == copy[first as usize * 512..][..1024 * 512]);
    }
    assert_eq!(setup.host.faults(), Vec::<String>::new());
    assert_eq!(setup.device.counter("errors"), 0);
}

#[test]
fn memory() {
    let root = load("vmm-plugin-memory").unwrap();
    let options: [(&str, Value); 3] = [
        ("size", (BLOCKS * 512).into()),
        ("block_size", 512u64.into()),
        ("workers", 4u64.into()),
    ];
    for shadow in [false, true] {
        torture(
            |host| host.block(root, "mem-async", &options).unwrap(),
            shadow,
        );
    }
}

#[test]
fn file_through_the_page_cache_and_around_it() {
    let root = load("vmm-plugin-file").unwrap();
    for direct in [false, true] {
        let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        image.as_file().set_len(BLOCKS * 512).unwrap();
        let options: [(&str, Value); 5] = [
            ("path", image.path().to_str().unwrap().into()),
            ("block_size", 512u64.into()),
            ("workers", 4u64.into()),
            ("direct", direct.into()),
            ("discard", true.into()),
        ];
        torture(|host| host.block(root, "file", &options).unwrap(), direct);
    }
}

/// A batch of which some commands fail, for want of space and otherwise: those fail as the specification names it, the others are
/// done, and the disk goes on.
#[test]
fn errors_in_the_middle_of_a_batch_hit_the_right_commands() {
    const COUNT: u64 = 60;
    let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    image.as_file().set_len(BLOCKS * 512).unwrap();
    let host = FakeHost::new(64 << 20);
    let options: [(&str, Value); 5] = [
        ("path", image.path().to_str().unwrap().into()),
        ("block_size", 512u64.into()),
        ("workers", 4u64.into()),
        ("direct", false.into()),
        ("discard", true.into()),
    ];
    let root = load("vmm-plugin-file").unwrap();
    let file = host.block(root, "file", &options).unwrap();
    let rules = "write 64K..128K error ENOSPC; write 192K..196K error EIO; \
        write 200K..204K torn 512; read 232K..236K error EIO; flush error EIO times 1";
    let options = [
        ("backing", Value::from(&file)),
        ("rules", rules.into()),
        ("read_only", false.into()),
    ];
    let root = load("vmm-plugin-fault").unwrap();
    let fault = host.block(root, "fault", &options).unwrap();
    let options = [("block_dev", Value::from(&fault))];
    let device = host.device(&VMM_PLUGIN, "pci-nvme", &options).unwrap();
    device.start().unwrap();
    let setup = Setup::on(host, device);
    let (mut driver, mut pair) = setup.disk();
    let data = driver.allocate(COUNT * 4096, 4096);
    let writes = |i: u64| i < 56;
    let status = |i: u64| match i {
        16..32 => CAPACITY_EXCEEDED,
        48 | 50 => WRITE_FAULT,
        58 => READ_ERROR,
        _ => OK,
    };
    let mut flying = BTreeMap::new();
    for i in 0..COUNT {
        let at = data + i * 4096;
        let opcode = if writes(i) { WRITE } else { READ };
        driver.memory.write(at, &pattern(i, 4096)).unwrap();
        let cid = driver.add(&mut pair, Cmd::rw(opcode, i * 8, 8).prp(at, 0));
        flying.insert(cid, i);
    }
    driver.ring(&mut pair);
    for _ in 0..COUNT {
        let cqe = driver.wait(&mut pair);
        let i = flying.remove(&cqe.cid).expect("in flight");
        assert_eq!(cqe.status, status(i), "command {i}");
    }
    for expected in [INTERNAL, OK] {
        let cqe = driver.run(&mut pair, Cmd::new(FLUSH).nsid(1));
        assert_eq!(cqe.status, expected, "{cqe:?}");
    }
    for i in (0..COUNT).filter(|i| *i != 58) {
        let expected = match (writes(i) && status(i) == OK, i) {
            (true, _) => pattern(i, 4096),
            // Torn: one sector, and it was said that it failed.
            (false, 50) => [&pattern(i, 512)[..], &[0; 3584]].concat(),
            _ => vec![0; 4096],
        };
        let found = driver.read(&mut pair, i * 8, 4096);
        assert!(found == expected, "blocks of command {i}");
    }
    assert_eq!(setup.host.faults(), Vec::<String>::new());
    assert_eq!(setup.device.counter("errors"), 20);
}

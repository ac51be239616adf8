//! Every request type, through both register layouts, on a backend that completes at once and on one with a thread.

mod support;

use support::*;
use vmm_plugin_api::abi::block::{BLOCK_READ_ONLY, BLOCK_VOLATILE_CACHE};
use vmm_plugin_api::testing::{Buffer, Value, VirtioDriver};
use vmm_plugin_api::{BlockInfo, BlockOp};

const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const F_ANY_LAYOUT: u64 = 1 << 27;
const F_INDIRECT: u64 = 1 << 28;
const F_EVENT: u64 = 1 << 29;

fn threaded() -> Shape {
    Shape {
        threaded: true,
        ..Shape::default()
    }
}

/// Writes, reads back, flushes, asks for the serial number; trims when the features are there.
fn exercise(setup: &Setup, mut disk: Disk<'_>) {
    let data = pattern(1, 8192);
    disk.write(100, &data);
    assert_eq!(disk.read(100, 8192), data);
    assert_eq!(setup.control.bytes(100 * 512, 8192), data);
    assert_eq!(disk.request(T_FLUSH, 0, &[], 0).0, S_OK);
    let (status, id) = disk.request(T_GET_ID, 0, &[], 20);
    assert_eq!(
        (status, &id[..]),
        (S_OK, &b"block_dev\0\0\0\0\0\0\0\0\0\0\0"[..])
    );
    let zeroes = disk.request(T_WRITE_ZEROES, 0, &range(101, 2, 1), 0);
    assert_eq!(zeroes.0, S_OK);
    let discard = disk.request(T_DISCARD, 0, &range(104, 1, 0), 0);
    assert_eq!(discard.0, S_OK);
    let mut expected = data.clone();
    expected[512..1536].fill(0);
    expected[2048..2560].fill(0xdd);
    assert_eq!(disk.read(100, 8192), expected);
    assert_eq!(disk.request(99, 0, &[], 0).0, S_UNSUPP);
    let ops: Vec<_> = setup.control.ops().iter().map(|o| o.0).collect();
    assert!(ops.contains(&BlockOp::Flush) && ops.contains(&BlockOp::WriteZeroes { unmap: true }));
    drop(disk);
    assert_eq!(setup.device.counter("reads"), 2);
    assert_eq!(setup.device.counter("read_bytes"), 16384);
    assert_eq!(setup.device.counter("write_bytes"), 8192);
    assert_eq!(setup.device.counter("errors"), 1);
    assert_eq!(setup.host.faults(), Vec::<String>::new());
}

#[test]
fn modern_driver_with_every_set_of_ring_features() {
    for shape in [Shape::default(), threaded()] {
        for ring in [0, F_INDIRECT, F_EVENT, F_INDIRECT | F_EVENT] {
            let setup = Setup::new(shape);
            let features = !(F_INDIRECT | F_EVENT) | ring;
            exercise(&setup, setup.disk_with(features, 16));
        }
    }
}

#[test]
fn legacy_driver_with_every_set_of_ring_features() {
    for shape in [Shape::default(), threaded()] {
        for ring in [0, F_INDIRECT, F_EVENT, F_INDIRECT | F_EVENT] {
            let setup = Setup::new(shape);
            let features = !(F_INDIRECT | F_EVENT) | ring;
            exercise(&setup, setup.legacy_disk(features));
        }
    }
}

#[test]
fn doorbells_that_the_host_refuses_arrive_as_register_writes() {
    let setup = Setup::not_started(Shape::default(), &[]);
    setup.device.refuse_doorbells();
    setup.device.start().unwrap();
    let mut disk = setup.disk();
    disk.write(0, &pattern(0, 512));
    drop(disk);
    let mut disk = setup.legacy_disk(0);
    assert_eq!(disk.read(0, 512), pattern(0, 512));
}

#[test]
fn configuration_space_describes_the_disk() {
    let setup = Setup::with(Shape::default(), &[("queues", 4u64.into())]);
    let driver = VirtioDriver::modern(&setup.host, &setup.device).unwrap();
    assert_eq!(driver.config(0, 8), (4 << 20) / 512, "capacity");
    assert_eq!(driver.config(12, 4), 128, "seg_max");
    assert_eq!(driver.config(20, 4), 512, "blk_size");
    assert_eq!(driver.config(24, 1), 3, "physical_block_exp");
    assert_eq!(driver.config(26, 2), 8, "min_io_size");
    assert_eq!(driver.config(34, 2), 4, "num_queues");
    assert_eq!(driver.config(36, 4), 2048, "max_discard_sectors");
    assert_eq!(driver.config(40, 4), 1, "max_discard_seg");
    assert_eq!(driver.config(44, 4), 8, "discard_sector_alignment");
    assert_eq!(driver.config(48, 4), 2048, "max_write_zeroes_sectors");
    assert_eq!(driver.config(56, 1), 1, "write_zeroes_may_unmap");
    assert_eq!(driver.config(64, 4), 0, "behind the end");
    assert_eq!(driver.queue_count(), 4);
    let offered = driver.offered();
    let expected = F_FLUSH | F_MQ | F_DISCARD | F_WRITE_ZEROES | F_INDIRECT | F_EVENT;
    assert_eq!(offered & expected, expected);
    assert_eq!(offered & (F_RO | F_ANY_LAYOUT), 0);
    let legacy = VirtioDriver::legacy(&setup.host, &setup.device).unwrap();
    assert_eq!(legacy.offered() & F_ANY_LAYOUT, F_ANY_LAYOUT);
    assert_eq!(legacy.config(20, 4), 512);
    setup.device.enable_msix(false);
    assert_eq!(legacy.config(20, 4), 512, "where it is without MSI-X");
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let mut shape = Shape::default();
    shape.info.features |= BLOCK_READ_ONLY;
    let setup = Setup::new(shape);
    let mut disk = setup.disk();
    let offered = disk.driver.offered();
    assert_eq!(offered & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    assert_eq!(disk.request(T_OUT, 0, &[1; 512], 0).0, S_IOERR);
    assert_eq!(disk.request(T_DISCARD, 0, &range(0, 1, 0), 0).0, S_IOERR);
    assert_eq!(
        disk.request(T_WRITE_ZEROES, 0, &range(0, 1, 0), 0).0,
        S_IOERR
    );
    assert_eq!(disk.read(0, 512), [0; 512]);
    assert_eq!(
        setup.control.ops().len(),
        1,
        "only the read reached the backend"
    );
}

#[test]
fn bad_ranges_fail_without_reaching_the_backend() {
    let setup = Setup::new(Shape {
        info: BlockInfo {
            logical: 4096,
            ..Shape::default().info
        },
        ..Shape::default()
    });
    let mut disk = setup.disk();
    let last = (4 << 20) / 512;
    for (sector, len) in [
        (last, 4096),
        (last - 8, 8192),
        (u64::MAX, 4096),
        (1 << 55, 4096),
    ] {
        assert_eq!(
            disk.request(T_IN, sector, &[], len).0,
            S_IOERR,
            "sector {sector}"
        );
    }
    assert_eq!(
        disk.request(T_IN, 1, &[], 4096).0,
        S_IOERR,
        "misaligned sector"
    );
    assert_eq!(
        disk.request(T_IN, 0, &[], 512).0,
        S_IOERR,
        "part of a block"
    );
    assert_eq!(disk.request(T_OUT, 0, &[0; 100], 0).0, S_IOERR);
    assert_eq!(disk.request(T_IN, 0, &[], 0).0, S_OK, "nothing to read");
    for (sectors, flags, expected) in [
        (4096, 0, S_IOERR),
        (7, 0, S_IOERR),
        (8, 1, S_UNSUPP),
        (8, 2, S_UNSUPP),
        (u32::MAX, 0, S_IOERR),
    ] {
        let discard = disk.request(T_DISCARD, 0, &range(0, sectors, flags), 0);
        assert_eq!(discard.0, expected, "{sectors} sectors, flags {flags}");
    }
    let two = [range(0, 8, 0), range(8, 8, 0)].concat();
    assert_eq!(disk.request(T_DISCARD, 0, &two, 0).0, S_IOERR, "two ranges");
    assert_eq!(disk.request(T_DISCARD, 0, &two[..15], 0).0, S_IOERR);
    assert_eq!(
        disk.request(T_WRITE_ZEROES, 0, &range(0, 8, 4), 0).0,
        S_UNSUPP
    );
    assert_eq!(setup.control.ops(), []);
    assert_eq!(
        disk.driver.status() & 0x40,
        0,
        "none of this breaks the queue"
    );
}

#[test]
fn framing_means_nothing() {
    let setup = Setup::new(Shape::default());
    let mut disk = setup.disk();
    let data = pattern(5, 1024);
    disk.write(7, &data);
    // The header in three pieces, data and status in one buffer.
    let header = disk.header(T_IN, 7);
    let to = disk.driver.allocate(1025, 1);
    let head = disk.queue.add(&[
        Buffer::readable(header, 1),
        Buffer::readable(header + 1, 10),
        Buffer::readable(header + 11, 5),
        Buffer::writable(to, 3),
        Buffer::writable(to + 3, 1022),
    ]);
    disk.queue.kick(disk.device);
    assert_eq!(disk.queue.wait(WAIT), Some((head, 1025)));
    assert_eq!(disk.bytes(to, 1024), data);
    assert_eq!(disk.bytes(to + 1024, 1), [S_OK]);
    // Header and data to write in one buffer.
    let out = disk.driver.allocate(16 + 512, 1);
    let header = disk.header(T_OUT, 9);
    let header = disk.bytes(header, 16);
    let bytes = [header, vec![0x5a; 512]].concat();
    disk.driver.memory().write(out, &bytes).unwrap();
    let status = disk.driver.allocate(1, 1);
    let head = disk
        .queue
        .add(&[Buffer::readable(out, 528), Buffer::writable(status, 1)]);
    disk.queue.kick(disk.device);
    assert_eq!(disk.queue.wait(WAIT), Some((head, 1)));
    assert_eq!(disk.read(9, 512), [0x5a; 512]);
}

#[test]
fn a_request_without_header_fails() {
    let setup = Setup::new(Shape::default());
    let mut disk = setup.disk();
    let header = disk.header(T_IN, 0);
    let status = disk.driver.allocate(1, 1);
    let head = disk
        .queue
        .add(&[Buffer::readable(header, 15), Buffer::writable(status, 1)]);
    disk.queue.kick(disk.device);
    assert_eq!(disk.queue.wait(WAIT), Some((head, 1)));
    assert_eq!(disk.bytes(status, 1), [S_IOERR]);
    disk.write(0, &[1; 512]);
}

#[test]
fn a_driver_without_flush_gets_durable_writes() {
    let setup = Setup::new(Shape::default());
    let fua = |features: u64| {
        let mut disk = setup.disk_with(features, 16);
        disk.write(0, &[0; 512]);
        setup.control.ops().last().unwrap().0
    };
    assert_eq!(fua(u64::MAX), BlockOp::Write { fua: false });
    assert_eq!(fua(!F_FLUSH), BlockOp::Write { fua: true });
    let mut shape = Shape::default();
    shape.info.features &= !BLOCK_VOLATILE_CACHE;
    let setup = Setup::new(shape);
    let mut disk = setup.disk();
    assert_eq!(disk.driver.offered() & F_FLUSH, 0);
    disk.write(0, &[0; 512]);
    assert_eq!(setup.control.ops()[0].0, BlockOp::Write { fua: false });
}

#[test]
fn misaligned_buffers_are_bounced_only_where_the_backend_needs_it() {
    for threaded in [false, true] {
        let mut shape = Shape {
            threaded,
            ..Shape::default()
        };
        shape.info.alignment = 512;
        shape.info.max_segments = 4;
        let setup = Setup::new(shape);
        let mut disk = setup.disk();
        assert_eq!(disk.driver.config(12, 4), 4);
        let data = pattern(9, 1 << 20);
        disk.write(0, &data);
        assert_eq!(
            setup.control.ops().len(),
            1,
            "aligned: straight from guest memory"
        );
        // Three requests of 1 MiB each in misaligned buffers of odd sizes, in flight together.
        let mut reads = Vec::new();
        for _ in 0..3 {
            let header = disk.header(T_IN, 0);
            let to = disk.driver.allocate((1 << 20) + 1, 4096) + 3;
            let mut chain = vec![Buffer::readable(header, 16)];
            for (from, len) in [(0, 1000), (1000, 600_001), (601_001, 447_575)] {
                chain.push(Buffer::writable(to + from, len));
            }
            chain.push(Buffer::writable(to + (1 << 20), 1));
            disk.queue.add(&chain);
            reads.push(to);
        }
        disk.queue.kick(disk.device);
        for _ in 0..3 {
            assert_eq!(disk.queue.wait(WAIT).unwrap().1, (1 << 20) + 1);
        }
        for to in reads {
            assert!(disk.bytes(to, 1 << 20) == data, "the data is whole");
            assert_eq!(disk.bytes(to + (1 << 20), 1), [S_OK]);
        }
        // More segments than the backend takes, for a write.
        let header = disk.header(T_OUT, 64);
        let from = disk.driver.allocate(4096, 512);
        disk.driver.memory().write(from, &pattern(3, 4096)).unwrap();
        let status = disk.driver.allocate(1, 1);
        let mut chain = vec![Buffer::readable(header, 16)];
        chain.extend((0..8).map(|i| Buffer::readable(from + i * 512, 512)));
        chain.push(Buffer::writable(status, 1));
        disk.queue.add(&chain);
        disk.queue.kick(disk.device);
        assert!(disk.queue.wait(WAIT).is_some());
        assert_eq!(disk.bytes(status, 1), [S_OK]);
        assert_eq!(disk.read(64, 4096), pattern(3, 4096));
        setup
            .control
            .bad
            .store(700_000, std::sync::atomic::Ordering::Relaxed);
        let header = disk.header(T_IN, 0);
        let to = disk.driver.allocate((1 << 20) + 1, 4096) + 3;
        disk.queue.add(&[
            Buffer::readable(header, 16),
            Buffer::writable(to, (1 << 20) + 1),
        ]);
        disk.queue.kick(disk.device);
        assert_eq!(disk.queue.wait(WAIT).unwrap().1, 1);
        assert_eq!(disk.bytes(to + (1 << 20), 1), [S_IOERR]);
        disk.read(3000, 512);
        assert_eq!(setup.host.faults(), Vec::<String>::new());
    }
}

#[test]
fn serial_numbers_and_options() {
    let setup = Setup::with(
        Shape::default(),
        &[("serial", "boot disk".into()), ("modern_only", true.into())],
    );
    assert!(VirtioDriver::legacy(&setup.host, &setup.device).is_err());
    assert_eq!(setup.device.pci().unwrap().device, 0x1042);
    let mut disk = setup.disk();
    let (status, id) = disk.request(T_GET_ID, 0, &[], 20);
    assert_eq!((status, &id[..10]), (S_OK, &b"boot disk\0"[..]));
    let (status, id) = disk.request(T_GET_ID, 0, &[], 4);
    assert_eq!((status, &id[..]), (S_OK, &b"boot"[..]));
    for (key, value, says) in [
        (
            "serial",
            Value::from("a serial number that is far too long"),
            "at most 20",
        ),
        ("queue_size", 100u64.into(), "power of two"),
        ("queues", 17u64.into(), "1 to 16"),
    ] {
        let (_, id) = Control::new(Shape::default());
        let error = options_error(id, key, value);
        assert!(error.contains(says), "{error}");
    }
}

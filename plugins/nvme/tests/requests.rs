//! The NVM commands and their data pointers, on a disk that the test looks into.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::atomic::Ordering;

use support::*;
use vmm_plugin_api::BlockOp;
use vmm_plugin_api::abi::block::{BLOCK_READ_ONLY, BLOCK_VOLATILE_CACHE};

const FUA: u32 = 1 << 30;

#[test]
fn what_is_written_is_read_back_in_every_shape_of_prps() {
    for shape in [Shape::default(), threaded()] {
        let setup = Setup::new(shape);
        let (mut driver, mut pair) = setup.disk();
        // Offset in the first page, bytes: one entry, two, a list; up to 1 MiB, whose list is longer than a page may be.
        for (offset, len) in [
            (0, 512),
            (3584, 512),
            (3584, 1024),
            (0, 8192),
            (512, 8192),
            (0, 12288),
            (4, 65536),
            (0, 1 << 20),
            (2048, 1 << 20),
        ] {
            let data = pattern(offset + len, len as usize);
            let at = driver.allocate(len + 8192, 4096) + offset;
            driver.memory.write(at, &data).unwrap();
            let blocks = len as u32 / 512;
            let write = driver.with_prps(Cmd::rw(WRITE, 8, blocks), at, len);
            assert_eq!(driver.run(&mut pair, write).status, OK, "{offset} {len}");
            assert_eq!(setup.control.bytes(4096, len as usize), data);
            driver.memory.write(at, &vec![0; len as usize]).unwrap();
            let read = driver.with_prps(Cmd::rw(READ, 8, blocks), at, len);
            assert_eq!(driver.run(&mut pair, read).status, OK, "{offset} {len}");
            assert!(driver.bytes(at, len as usize) == data, "{offset} {len}");
        }
        assert_eq!(setup.device.counter("errors"), 0);
    }
}

/// 512 KiB in pages that lie backwards, so that none are neighbours; returns the entries of a list from the second page on.
fn scattered(driver: &mut Driver<'_>, pages: u64) -> Vec<u64> {
    let at = driver.allocate(pages * 4096, 4096);
    (0..pages).rev().map(|i| at + 4096 * i).collect()
}

#[test]
fn chained_lists_are_followed() {
    let setup = Setup::new(Shape::default());
    let (mut driver, mut pair) = setup.disk();
    let pages = scattered(&mut driver, 256);
    let data = pattern(3, 1 << 20);
    for (page, data) in pages.iter().zip(data.chunks(4096)) {
        driver.memory.write(*page, data).unwrap();
    }
    // The list begins 4 entries before the end of a page: 3 of them, then the rest.
    let (first, second) = (driver.page(), driver.page());
    let bytes =
        |entries: &[u64]| -> Vec<u8> { entries.iter().flat_map(|e| e.to_le_bytes()).collect() };
    let mut head = pages[1..4].to_vec();
    head.push(second);
    driver
        .memory
        .write(first + 4096 - 32, &bytes(&head))
        .unwrap();
    driver.memory.write(second, &bytes(&pages[4..])).unwrap();
    let cmd = Cmd::rw(WRITE, 0, 2048).prp(pages[0], first + 4096 - 32);
    assert_eq!(driver.run(&mut pair, cmd).status, OK);
    assert!(setup.control.bytes(0, 1 << 20) == data);
    // 128 segments at most, as the backend says: it went through the buffer in pieces.
    let ops = setup.control.ops();
    assert!(ops.len() > 1 && ops.iter().all(|op| op.3 <= 128), "{ops:?}");
}

#[test]
fn sgls_of_one_block_a_segment_and_a_chain_of_them() {
    let setup = Setup::new(Shape::default());
    let (mut driver, mut pair) = setup.disk();
    let data = pattern(9, 8192);
    let at = driver.allocate(16384, 4096);
    let put = |driver: &Driver<'_>, list: u64, entries: &[(u64, u32, u8)]| {
        for (i, (address, len, kind)) in (0u64..).zip(entries) {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend([0, 0, 0, *kind]);
            driver.memory.write(list + 16 * i, &bytes).unwrap();
        }
    };
    let write = Cmd::rw(WRITE, 0, 16);
    driver.memory.write(at + 3, &data).unwrap();
    let one = write.sgl(at + 3, 8192, 0);
    assert_eq!(driver.run(&mut pair, one).status, OK);
    assert_eq!(setup.control.bytes(0, 8192), data);
    // Pieces of odd lengths, an empty one among them; the second segment is the last.
    let (first, second) = (driver.page(), driver.page());
    put(
        &driver,
        first,
        &[(at + 3, 1000, 0), (at, 0, 0), (second, 32, 0x30)],
    );
    put(
        &driver,
        second,
        &[(at + 1003, 7000, 0), (at + 8003, 192, 0)],
    );
    let read = Cmd::rw(READ, 0, 16).sgl(first, 48, 0x20);
    driver.memory.write(at, &vec![0; 16384]).unwrap();
    assert_eq!(driver.run(&mut pair, read).status, OK);
    assert_eq!(driver.bytes(at + 3, 8192), data);

    let status = |driver: &Driver<'_>, pair: &mut Pair, cmd| driver.run(pair, cmd).status;
    // Too short, too long, with a tail, of odd length, unknown, without end, after the last.
    assert_eq!(status(&driver, &mut pair, write.sgl(at, 8191, 0)), 0xf);
    assert_eq!(status(&driver, &mut pair, write.sgl(at, 8193, 0)), 0xf);
    assert_eq!(status(&driver, &mut pair, write.sgl(first, 24, 0x20)), 0xd);
    assert_eq!(status(&driver, &mut pair, write.sgl(first, 0, 0x30)), 0xd);
    assert_eq!(status(&driver, &mut pair, write.sgl(at, 8192, 0x10)), 0x11);
    assert_eq!(status(&driver, &mut pair, write.sgl(at, 8192, 1)), 0x11);
    put(&driver, first, &[(at, 8192, 0)]);
    assert_eq!(status(&driver, &mut pair, write.sgl(first, 16, 0x20)), 0xd);
    put(&driver, first, &[(at, 8192, 0), (second, 16, 0x30)]);
    assert_eq!(status(&driver, &mut pair, write.sgl(first, 32, 0x30)), 0xd);
    // A loop, a crowd, wild addresses.
    put(&driver, first, &[(first, 16, 0x20)]);
    assert_eq!(status(&driver, &mut pair, write.sgl(first, 16, 0x20)), 0xe);
    let crowd = write.sgl(first, 1025 * 16, 0x30);
    assert_eq!(status(&driver, &mut pair, crowd), 0xe);
    let huge = write.sgl(first, 0xffff_fff0, 0x30);
    assert_eq!(status(&driver, &mut pair, huge), 0xe);
    let wild = write.sgl(u64::MAX - 15, 16, 0x30);
    assert_eq!(status(&driver, &mut pair, wild), TRANSFER_ERROR);
    let wraps = write.sgl(u64::MAX - 4095, 8192, 0);
    assert_eq!(status(&driver, &mut pair, wraps), TRANSFER_ERROR);
    // Metadata in an SGL means nothing here; the fourth value is reserved.
    let mut reserved = one;
    reserved.0[0] |= 3 << 14;
    assert_eq!(status(&driver, &mut pair, reserved), INVALID_FIELD);
}

#[test]
fn prps_that_break_the_rules() {
    let setup = Setup::new(Shape::default());
    let (mut driver, mut pair) = setup.disk();
    let page = driver.page();
    let (two, many) = (Cmd::rw(READ, 0, 16), Cmd::rw(READ, 0, 2048));
    let list = driver.page();
    driver
        .memory
        .write(list + 4088, &(list + 4088).to_le_bytes())
        .unwrap();
    let chain = driver.page();
    driver
        .memory
        .write(chain + 4088, &chain.to_le_bytes())
        .unwrap();
    for (name, cmd, status) in [
        ("odd first", two.prp(page + 2, 0), PRP_OFFSET),
        ("offset in the second", two.prp(page, page + 8), PRP_OFFSET),
        ("odd list", many.prp(page, list + 4), PRP_OFFSET),
        (
            "a list that is its own next entry",
            many.prp(page, list + 4088),
            PRP_OFFSET,
        ),
        (
            "zeroes that lead to the list itself",
            many.prp(page, chain),
            OK,
        ),
        ("first outside", two.prp(1 << 45, page), TRANSFER_ERROR),
        ("second outside", two.prp(page, 1 << 45), TRANSFER_ERROR),
        ("list outside", many.prp(page, 1 << 45), TRANSFER_ERROR),
        (
            "behind the end",
            two.prp(u64::MAX - 4095, 0),
            TRANSFER_ERROR,
        ),
        (
            "behind the end of RAM",
            two.prp((64 << 20) - 4096, 64 << 20),
            TRANSFER_ERROR,
        ),
    ] {
        let cqe = driver.run(&mut pair, cmd);
        assert_eq!(cqe.status, status, "{name}");
        assert_eq!(cqe.more, status != OK, "{name}: the error log has it");
        assert_eq!(cqe.dnr, status != OK, "{name}: it fails again");
    }
}

#[test]
fn fields_that_are_wrong() {
    let setup = Setup::new(Shape::default());
    let (mut driver, mut pair) = setup.disk();
    let page = driver.page();
    let one = |op| Cmd::rw(op, 0, 1).prp(page, 0);
    let blocks = 8192;
    for (name, cmd, status) in [
        ("no opcode", one(0x7f), INVALID_OPCODE),
        ("reservation", one(0x0d), INVALID_OPCODE),
        ("fused", one(COMPARE).dw(0, 0x105), INVALID_FIELD),
        ("namespace 0", one(READ).nsid(0), INVALID_NAMESPACE),
        ("namespace 2", one(WRITE).nsid(2), INVALID_NAMESPACE),
        (
            "all namespaces",
            one(READ).nsid(u32::MAX),
            INVALID_NAMESPACE,
        ),
        (
            "behind the end",
            Cmd::rw(READ, blocks, 1).prp(page, 0),
            LBA_RANGE,
        ),
        (
            "over the end",
            Cmd::rw(WRITE, blocks - 1, 2).prp(page, 0),
            LBA_RANGE,
        ),
        ("wraps", Cmd::rw(WRITE, u64::MAX, 2).prp(page, 0), LBA_RANGE),
        (
            "wraps in bytes",
            Cmd::rw(READ, 1 << 55, 1).prp(page, 0),
            LBA_RANGE,
        ),
        (
            "more than MDTS",
            Cmd::rw(READ, 0, 2049).prp(page, 0),
            INVALID_FIELD,
        ),
        (
            "zeroes over the end",
            Cmd::rw(WRITE_ZEROES, blocks - 1, 2),
            LBA_RANGE,
        ),
        ("flush of no namespace", Cmd::new(FLUSH), INVALID_NAMESPACE),
        ("flush of all", Cmd::new(FLUSH).nsid(u32::MAX), OK),
        (
            "the last block",
            Cmd::rw(READ, blocks - 1, 1).prp(page, 0),
            OK,
        ),
    ] {
        assert_eq!(driver.run(&mut pair, cmd).status, status, "{name}");
    }
    assert!(
        setup.control.ops().len() == 2,
        "nothing else reached the disk"
    );
}

#[test]
fn flush_fua_and_the_write_cache() {
    let setup = Setup::new(Shape::default());
    let (mut driver, mut pair) = setup.disk();
    let page = driver.page();
    let mut run = |driver: &mut Driver<'_>, cmd: Cmd| {
        setup.control.log.lock().unwrap().clear();
        assert_eq!(driver.run(&mut pair, cmd).status, OK);
        let ops = setup.control.ops();
        ops.into_iter().map(|op| op.0).collect::<Vec<_>>()
    };
    let write = Cmd::rw(WRITE, 0, 8).prp(page, 0);
    let fua = |cmd: Cmd| cmd.dw(12, cmd.0[12] | FUA);
    let zero = Cmd::rw(WRITE_ZEROES, 0, 8);
    let read = Cmd::rw(READ, 0, 8).prp(page, 0);
    let unmap = |unmap| BlockOp::WriteZeroes { unmap };
    let durable = |fua| BlockOp::Write { fua };
    assert_eq!(run(&mut driver, write), [durable(false)]);
    assert_eq!(run(&mut driver, fua(write)), [durable(true)]);
    assert_eq!(run(&mut driver, zero), [unmap(false)]);
    assert_eq!(run(&mut driver, fua(zero)), [unmap(false), BlockOp::Flush]);
    let deallocate = zero.dw(12, zero.0[12] | 1 << 25);
    assert_eq!(run(&mut driver, deallocate), [unmap(true)]);
    assert_eq!(run(&mut driver, fua(read)), [BlockOp::Read, BlockOp::Flush]);
    assert_eq!(run(&mut driver, Cmd::new(FLUSH).nsid(1)), [BlockOp::Flush]);
    // Without the cache every write is durable.
    driver.must(Cmd::new(9).dw(10, 6).dw(11, 0));
    assert_eq!(run(&mut driver, write), [durable(true)]);
    assert_eq!(run(&mut driver, zero), [unmap(false), BlockOp::Flush]);
    assert_eq!(driver.must(Cmd::new(10).dw(10, 6)), 0);
    driver.must(Cmd::new(9).dw(10, 6).dw(11, 1));
    assert_eq!(run(&mut driver, write), [durable(false)]);
    assert_eq!(driver.must(Cmd::new(10).dw(10, 6)), 1);
}

#[test]
fn a_disk_without_a_cache_says_so() {
    let mut shape = Shape::default();
    shape.info.features &= !BLOCK_VOLATILE_CACHE;
    let setup = Setup::new(shape);
    let (mut driver, mut pair) = setup.disk();
    assert_eq!(driver.identify(1, 0).unwrap()[525] & 1, 0);
    assert_eq!(driver.admin(Cmd::new(9).dw(10, 6)).status, INVALID_FIELD);
    assert_eq!(driver.admin(Cmd::new(10).dw(10, 6)).status, INVALID_FIELD);
    let page = driver.page();
    let fua = Cmd::rw(WRITE, 0, 8).prp(page, 0).dw(12, 7 | FUA);
    assert_eq!(driver.run(&mut pair, fua).status, OK);
    assert_eq!(setup.control.ops()[0].0, BlockOp::Write { fua: false });
}

#[test]
fn compare_tells_equal_from_different() {
    for alignment in [1, 4096] {
        let mut shape = threaded();
        shape.info.alignment = alignment;
        let setup = Setup::new(shape);
        let (mut driver, mut pair) = setup.disk();
        // Longer than the buffer that it goes through.
        let data = pattern(1, 1 << 20);
        driver.write(&mut pair, 16, &data);
        let at = driver.allocate((1 << 20) + 4096, 4096) + 512;
        driver.memory.write(at, &data).unwrap();
        let cmd = driver.with_prps(Cmd::rw(COMPARE, 16, 2048), at, 1 << 20);
        assert_eq!(driver.run(&mut pair, cmd).status, OK);
        for wrong in [0, 300_000, (1 << 20) - 1] {
            driver
                .memory
                .write(at + wrong, &[!data[wrong as usize]])
                .unwrap();
            let cqe = driver.run(&mut pair, cmd);
            assert_eq!(cqe.status, COMPARE_FAILURE, "byte {wrong}");
            driver
                .memory
                .write(at + wrong, &data[wrong as usize..][..1])
                .unwrap();
        }
        assert_eq!(driver.run(&mut pair, cmd).status, OK);
        assert!(driver.bytes(at, 1 << 20) == data, "the guest's data stays");
        eventually("counted", || setup.device.counter("compares") == 2);
    }
}

/// A dataset management command with these ranges.
fn dsm(driver: &mut Driver<'_>, ranges: &[(u64, u32)], attributes: u32) -> Cmd {
    let list = driver.page();
    for (i, (first, blocks)) in (0u64..).zip(ranges) {
        let mut bytes = vec![0; 4];
        bytes.extend(blocks.to_le_bytes());
        bytes.extend(first.to_le_bytes());
        driver.memory.write(list + 16 * i, &bytes).unwrap();
    }
    Cmd::new(DSM)
        .nsid(1)
        .prp(list, 0)
        .dw(10, ranges.len() as u32 - 1)
        .dw(11, attributes)
}

#[test]
fn ranges_are_discarded_in_pieces_that_the_backend_takes() {
    for shape in [Shape::default(), threaded()] {
        let mut shape = shape;
        shape.info.max_discard = 64 << 10;
        let setup = Setup::new(shape);
        let (mut driver, mut pair) = setup.disk();
        driver.write(&mut pair, 0, &[1; 512]);
        setup.control.log.lock().unwrap().clear();
        let cmd = dsm(&mut driver, &[(0, 300), (1000, 0), (2000, 1)], 4);
        assert_eq!(driver.run(&mut pair, cmd).status, OK);
        let ops = setup.control.ops();
        let expected = [
            (0, 65536),
            (65536, 65536),
            (131_072, 300 * 512 - 131_072),
            (2000 * 512, 512),
        ];
        let ranges: Vec<_> = ops.iter().map(|op| (op.1, op.2)).collect();
        assert_eq!(ranges, expected);
        assert!(ops.iter().all(|op| op.0 == BlockOp::Discard));
        // Long zeroing in the same way.
        let cmd = Cmd::rw(WRITE_ZEROES, 0, 1000);
        assert_eq!(driver.run(&mut pair, cmd).status, OK);
        assert_eq!(setup.control.bytes(0, 512_000), vec![0; 512_000]);
        // 256 ranges; several commands at once; one bad range and nothing is done.
        let ranges: Vec<_> = (0..256).map(|i| (i * 8, 8)).collect();
        let cmd = dsm(&mut driver, &ranges, 4);
        for _ in 0..5 {
            driver.add(&mut pair, cmd);
        }
        driver.ring(&mut pair);
        for _ in 0..5 {
            assert_eq!(driver.wait(&mut pair).status, OK);
        }
        setup.control.log.lock().unwrap().clear();
        let bad = dsm(&mut driver, &[(0, 8), (8190, 3)], 4);
        assert_eq!(driver.run(&mut pair, bad).status, LBA_RANGE);
        let hint = dsm(&mut driver, &[(0, 8)], 1);
        assert_eq!(driver.run(&mut pair, hint).status, OK);
        let nothing = dsm(&mut driver, &[(0, 0)], 4);
        assert_eq!(driver.run(&mut pair, nothing).status, OK);
        assert_eq!(setup.control.ops().len(), 0);
    }
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let mut shape = Shape::default();
    shape.info.features |= BLOCK_READ_ONLY;
    let setup = Setup::new(shape);
    let (mut driver, mut pair) = setup.disk();
    let page = driver.page();
    assert_eq!(driver.identify(0, 1).unwrap()[99] & 1, 1);
    for op in [WRITE, WRITE_ZEROES, DSM] {
        let cmd = Cmd::rw(op, 0, 1).prp(page, 0);
        assert_eq!(driver.run(&mut pair, cmd).status, WRITE_PROTECTED, "{op}");
    }
    driver.read(&mut pair, 0, 512);
    let smart = driver.page_of(Cmd::new(2).dw(10, 2 | 127 << 16)).unwrap();
    assert_eq!(smart[0], 1 << 3);
}

#[test]
fn errors_of_the_backend_reach_the_guest_and_the_logs() {
    for shape in [Shape::default(), threaded()] {
        let setup = Setup::new(shape);
        let (mut driver, mut pair) = setup.disk();
        let page = driver.page();
        setup.control.bad.store(10 * 512, Ordering::Relaxed);
        let read = Cmd::rw(READ, 8, 8).prp(page, 0);
        let cqe = driver.run(&mut pair, read);
        assert_eq!((cqe.status, cqe.dnr, cqe.more), (READ_ERROR, false, true));
        let write = Cmd::rw(WRITE, 10, 1).prp(page, 0);
        let cqe = driver.run(&mut pair, write);
        assert_eq!(cqe.status, WRITE_FAULT);
        let compare = Cmd::rw(COMPARE, 10, 1).prp(page, 0);
        assert_eq!(driver.run(&mut pair, compare).status, READ_ERROR);
        driver.read(&mut pair, 11, 512);
        eventually("counted", || setup.device.counter("errors") == 3);
        let log = driver.page_of(Cmd::new(2).dw(10, 1 | 1023 << 16)).unwrap();
        let entry = &log[64..128];
        assert_eq!(entry[0], 2, "the second error");
        assert_eq!(entry[8..10], [1, 0], "queue");
        assert_eq!(entry[10..12], cqe.cid.to_le_bytes());
        assert_eq!(entry[16..24], 10u64.to_le_bytes());
        assert_eq!(entry[24], 1, "namespace");
        let smart = driver.page_of(Cmd::new(2).dw(10, 2 | 127 << 16)).unwrap();
        assert_eq!((smart[160], smart[176]), (3, 3));
    }
}

#[test]
fn a_backend_that_wants_alignment_gets_it() {
    let mut shape = threaded();
    shape.info.alignment = 512;
    let setup = Setup::new(shape);
    let (mut driver, mut pair) = setup.disk();
    for round in 0..20 {
        let data = pattern(round, 512 << 10);
        let at = driver.allocate((512 << 10) + 8192, 4096) + 4 * (round % 3);
        driver.memory.write(at, &data).unwrap();
        let write = driver.with_prps(Cmd::rw(WRITE, 0, 1024), at, 512 << 10);
        let read = driver.with_prps(Cmd::rw(READ, 0, 1024), at, 512 << 10);
        assert_eq!(driver.run(&mut pair, write).status, OK);
        driver.memory.write(at, &vec![0; 512 << 10]).unwrap();
        assert_eq!(driver.run(&mut pair, read).status, OK);
        assert!(driver.bytes(at, 512 << 10) == data);
    }
}

#[test]
fn blocks_of_4096_bytes() {
    let mut shape = Shape::default();
    shape.info.logical = 4096;
    let setup = Setup::new(shape);
    let (mut driver, mut pair) = setup.disk();
    let page = driver.identify(0, 1).unwrap();
    assert_eq!(page[..8], 1024u64.to_le_bytes());
    assert_eq!(page[130], 12);
    let at = driver.page();
    let read = Cmd::rw(READ, 1023, 1).prp(at, 0);
    assert_eq!(driver.run(&mut pair, read).status, OK);
    assert_eq!(setup.control.ops()[0].1, 1023 * 4096);
    let read = Cmd::rw(READ, 0, 257).prp(at, 0);
    assert_eq!(driver.run(&mut pair, read).status, INVALID_FIELD);
}

//! Registers, identity and admin commands.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod support;

use support::*;

const GET_LOG: u8 = 2;
const ABORT: u8 = 8;
const SET: u8 = 9;
const GET: u8 = 10;
const AER: u8 = 12;

fn feature(op: u8, id: u32, value: u32) -> Cmd {
    Cmd::new(op).dw(10, id).dw(11, value)
}

#[test]
fn registers_say_what_the_controller_is() {
    let setup = Setup::new(Shape::default());
    let device = &setup.device;
    let cap = device.read(0, CAP, 8);
    assert_eq!(cap & 0xffff, 1023, "1024 entries");
    assert_eq!(cap >> 16 & 1, 1, "contiguous queues");
    assert!(
        cap >> 24 & 0xff >= 20,
        "time to finish what the backend has"
    );
    assert_eq!(cap >> 32 & 0xf, 0, "doorbells of 4 bytes");
    assert_eq!(cap >> 37 & 0xff, 1, "the NVM command set");
    assert_eq!(cap >> 48, 0, "pages of 4 KiB");
    assert_eq!(device.read(0, CAP, 4), cap & 0xffff_ffff);
    assert_eq!(device.read(0, CAP + 4, 4), cap >> 32);
    assert_eq!(device.read(0, VS, 4), 0x1_0400);
    assert_eq!(device.read(0, CSTS, 4), 0);
    assert_eq!(device.read(0, 0x3ffc, 4), 0);
    let pci = device.pci().unwrap();
    assert_eq!((pci.vendor, pci.device, pci.class), (0x01de, 0, 0x01_08_02));
    assert_eq!((pci.msix_vectors, pci.msix_bar), (64, 4));
    let regions = device.regions();
    assert_eq!((regions.len(), regions[0].size), (1, 0x4000));
    // Halves and the whole of the 64-bit registers.
    device.write(0, ASQ, 4, 0x1234_5fff);
    device.write(0, ASQ + 4, 4, 7);
    assert_eq!(device.read(0, ASQ, 8), 0x7_1234_5000);
    device.write(0, ACQ, 8, u64::MAX);
    assert_eq!(device.read(0, ACQ, 8), u64::MAX - 0xfff);
    device.write(0, AQA, 4, u64::MAX);
    assert_eq!(device.read(0, AQA, 4), 0x0fff_0fff);
    // Widths and places that are no register's.
    for (at, width) in [(CC, 1), (CC, 2), (CC + 1, 4), (0x16, 4), (0x3000, 4)] {
        device.write(0, at, width, u64::MAX);
    }
    assert_eq!(device.read(0, CC, 4), 0);
}

#[test]
fn a_configuration_that_cannot_be_had_is_fatal_until_it_is_taken_back() {
    let setup = Setup::new(Shape::default());
    let mut driver = Driver::new(&setup.host, &setup.device);
    let at = driver.admin.sq_at;
    for (name, aqa, asq, cc) in [
        ("a command set", 0x1f_001f, at, ENABLE | 1 << 4),
        ("large pages", 0x1f_001f, at, ENABLE | 1 << 7),
        ("arbitration", 0x1f_001f, at, ENABLE | 1 << 11),
        ("one entry", 0x1f_0000, at, ENABLE),
        ("no RAM", 0x1f_001f, 1 << 45, ENABLE),
    ] {
        driver.set_reg(AQA, aqa);
        setup.device.write(0, ASQ, 8, asq);
        setup.device.write(0, ACQ, 8, at);
        driver.set_reg(CC, cc);
        eventually(name, || driver.reg(CSTS) == 2);
        driver.begin_disable();
        eventually(name, || driver.reg(CSTS) == 0);
    }
    driver.enable();
    driver.identify(1, 0).unwrap();
}

#[test]
fn identify_tells_who_it_is() {
    let setup = Setup::new(Shape::default());
    let mut driver = setup.driver();
    let page = driver.identify(1, 0).unwrap();
    assert_eq!(page[..4], [0xde, 1, 0xde, 1]);
    // The name that the backend has in this test.
    assert_eq!(page[4..24], *b"block_dev           ");
    assert_eq!(page[77], 8, "1 MiB");
    assert_eq!(page[512..514], [0x66, 0x44]);
    assert_eq!(page[516..520], [1, 0, 0, 0]);
    assert_eq!(page[256..258], [0, 1], "shadow doorbells alone");
    assert_eq!(page[520] & 0b1101, 0b1101, "compare, discard, zeroes");
    assert_eq!(page[525], 7);
    let text = String::from_utf8_lossy(&page[768..1024]);
    let name = text.trim_end_matches('\0');
    assert!(
        name.starts_with("nqn.2014-08.org.nvmexpress:uuid:") && name.len() == 68,
        "{name}"
    );
    let namespace = driver.identify(0, 1).unwrap();
    assert_eq!(namespace[..8], 8192u64.to_le_bytes());
    assert_eq!((namespace[25], namespace[26], namespace[130]), (0, 0, 9));
    assert_eq!(
        namespace[64..66],
        [7, 0],
        "4 KiB are written without a read"
    );
    let list = driver.identify(2, 0).unwrap();
    assert_eq!(list[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(driver.identify(2, 1).unwrap().iter().all(|b| *b == 0));
    let descriptors = driver.identify(3, 1).unwrap();
    assert_eq!(descriptors[..4], [3, 16, 0, 0]);
    assert_eq!(descriptors[10] >> 4, 8, "UUID version 8");
    assert_eq!(descriptors[20..24], [0; 4], "no more");
    assert_eq!(driver.identify(0x13, 0).unwrap()[..4], [1, 0, 1, 0]);
    assert_eq!(driver.identify(0x13 | 2 << 16, 0).unwrap()[..4], [0; 4]);
    assert_eq!(driver.identify(0x12, 1).unwrap()[..4], [1, 0, 1, 0]);
    for (cns, nsid, status) in [
        (0, 0, INVALID_NAMESPACE),
        (0, 2, INVALID_NAMESPACE),
        (0, u32::MAX, INVALID_NAMESPACE),
        (2, u32::MAX, INVALID_NAMESPACE),
        (3, 0, INVALID_NAMESPACE),
        (0x12, 2, INVALID_NAMESPACE),
        (0x10, 1, INVALID_FIELD),
        (0xff, 1, INVALID_FIELD),
    ] {
        assert_eq!(driver.identify(cns, nsid), Err(status), "{cns:#x} {nsid}");
    }
}

#[test]
fn the_serial_number_is_the_operators() {
    let setup = Setup::with(Shape::default(), &[("serial", "S1".into())]);
    let page = setup.driver().identify(1, 0).unwrap();
    assert_eq!(page[4..24], *b"S1                  ");
    let error = options_error("serial", "123456789012345678901".into());
    assert!(
        error.contains("has 21 bytes") && error.contains("at most 20"),
        "{error}"
    );
    let error = options_error("serial", "größe".into());
    assert!(
        error.contains("serial") && error.contains("printable ASCII"),
        "{error}"
    );
}

#[test]
fn features_are_kept_until_a_reset() {
    let setup = Setup::new(Shape::default());
    let mut driver = setup.driver();
    for (id, which, value, default) in [
        (0x01, 0, 0x0102_0304, 0),
        (0x02, 0, 0x20, 0),
        (0x04, 0, 400, 343),
        (0x04, 1 << 20, 1 << 20 | 5, 0),
        (0x05, 0, 77, 0),
        (0x08, 0, 0x1234, 0),
        (0x09, 3, 3 | 1 << 16, 3),
        (0x0a, 0, 1, 0),
        (0x0b, 0, 0x102, 0),
    ] {
        assert_eq!(driver.must(feature(GET, id, which)), default, "{id:#x}");
        driver.must(feature(SET, id, value));
        let expected = if id == 4 { value & 0xffff } else { value };
        assert_eq!(driver.must(feature(GET, id, which)), expected, "{id:#x}");
        assert_eq!(driver.must(feature(GET, id | 1 << 8, which)), default);
        assert_eq!(driver.must(feature(GET, id | 2 << 8, which)), default);
        assert_eq!(driver.must(feature(GET, id | 3 << 8, which)), 4);
    }
    driver.enable();
    assert_eq!(driver.must(feature(GET, 0x01, 0)), 0);
    assert_eq!(driver.must(feature(GET, 0x04, 0)), 343);
    for (name, cmd, status) in [
        ("feature 0", feature(GET, 0, 0), INVALID_FIELD),
        ("LBA ranges", feature(GET, 3, 0), INVALID_FIELD),
        ("unknown", feature(SET, 0x7f, 0), INVALID_FIELD),
        ("select", feature(GET, 1 | 4 << 8, 0), INVALID_FIELD),
        ("save", feature(SET, 1 | 1 << 31, 0), 0x10d),
        ("power state 1", feature(SET, 2, 1), INVALID_FIELD),
        ("a sensor", feature(SET, 4, 1 << 16), INVALID_FIELD),
        (
            "deallocated errors",
            feature(SET, 5, 1 << 16),
            INVALID_FIELD,
        ),
        ("vector 64", feature(SET, 9, 64), INVALID_FIELD),
        ("a namespace's", feature(SET, 1, 0).nsid(1), 0x10f),
        (
            "no namespace",
            feature(SET, 1, 0).nsid(5),
            INVALID_NAMESPACE,
        ),
        ("no queues", feature(SET, 7, 0xffff), INVALID_FIELD),
    ] {
        assert_eq!(driver.admin(cmd).status, status, "{name}");
    }
}

#[test]
fn as_many_queues_as_were_asked_for() {
    let setup = Setup::new(Shape::default());
    let mut driver = setup.driver();
    assert_eq!(driver.must(feature(GET, 7, 0)), 62 | 62 << 16);
    assert_eq!(driver.must(feature(SET, 7, 0xfffe_fffe)), 62 | 62 << 16);
    assert_eq!(driver.must(feature(SET, 7, 1 | 1 << 16)), 1 | 1 << 16);
    driver.pair(2, 16, 0);
    assert_eq!(driver.admin(feature(SET, 7, 3)).status, SEQUENCE_ERROR);
    let third = driver.rings(3, 16, 16);
    let cqe = driver.admin(Driver::create_cq(&third, 0));
    assert_eq!(cqe.status, QUEUE_ID, "beyond what was granted");
}

#[test]
fn queues_that_cannot_be_made_or_deleted() {
    let setup = Setup::new(Shape::default());
    let mut driver = setup.driver();
    let good = driver.pair(1, 16, 0);
    let other = driver.rings(2, 16, 16);
    let (cq, sq) = (Driver::create_cq(&other, 0), Driver::create_sq(&other));
    let delete = |op, id: u32| Cmd::new(op).dw(10, id);
    for (name, cmd, status) in [
        ("completion queue 0", cq.dw(10, 15 << 16), QUEUE_ID),
        ("completion queue 64", cq.dw(10, 64 | 15 << 16), QUEUE_ID),
        (
            "completion queue 1 again",
            cq.dw(10, 1 | 15 << 16),
            QUEUE_ID,
        ),
        ("one entry", cq.dw(10, 2), QUEUE_SIZE),
        ("1025 entries", cq.dw(10, 2 | 1024 << 16), QUEUE_SIZE),
        ("65536 entries", cq.dw(10, 2 | 0xffff << 16), QUEUE_SIZE),
        ("vector 64", cq.dw(11, 3 | 64 << 16), 0x108),
        ("in pieces", cq.dw(11, 2), INVALID_FIELD),
        ("off a page", cq.prp(other.cq_at + 16, 0), PRP_OFFSET),
        ("no RAM", cq.prp(1 << 45, 0), INVALID_FIELD),
        ("submission queue without its completion queue", sq, 0x100),
        ("for completion queue 0", sq.dw(11, 1), QUEUE_ID),
        ("for completion queue 77", sq.dw(11, 1 | 77 << 16), QUEUE_ID),
        ("submission queue 0", sq.dw(10, 15 << 16), QUEUE_ID),
        (
            "submission queue 1 again",
            Driver::create_sq(&good),
            QUEUE_ID,
        ),
        ("small", sq.dw(10, 2).dw(11, 1 | 1 << 16), QUEUE_SIZE),
        ("in pieces", sq.dw(11, 1 << 16), INVALID_FIELD),
        ("off a page", sq.prp(64, 0).dw(11, 1 | 1 << 16), PRP_OFFSET),
        (
            "no RAM",
            sq.prp(1 << 45, 0).dw(11, 1 | 1 << 16),
            INVALID_FIELD,
        ),
        ("completion queue in use", delete(4, 1), 0x10c),
        ("delete completion queue 0", delete(4, 0), QUEUE_ID),
        ("delete completion queue 9", delete(4, 9), QUEUE_ID),
        ("delete completion queue 999", delete(4, 999), QUEUE_ID),
        ("delete submission queue 0", delete(0, 0), QUEUE_ID),
        ("delete submission queue 999", delete(0, 999), QUEUE_ID),
        ("delete", delete(0, 1), OK),
        ("delete twice", delete(0, 1), QUEUE_ID),
        ("delete the other", delete(4, 1), OK),
        ("delete the other twice", delete(4, 1), QUEUE_ID),
        ("again", Driver::create_cq(&good, 0), OK),
    ] {
        assert_eq!(driver.admin(cmd).status, status, "{name}");
    }
    // Entries of other sizes than the standard's.
    driver.enable();
    driver.set_reg(CC, 0x55_0001);
    assert_eq!(driver.admin(cq).status, INVALID_FIELD);
}

#[test]
fn queues_of_odd_sizes_and_shared_completion_queues() {
    let setup = Setup::new(threaded());
    let mut driver = setup.driver();
    let mut one = driver.rings(1, 7, 11);
    driver.must(Driver::create_cq(&one, 0));
    driver.must(Driver::create_sq(&one));
    // A second submission queue for the same completion queue, with another number.
    let mut two = driver.rings(5, 3, 2);
    two.cq = 1;
    driver.must(Driver::create_sq(&two));
    let page = driver.page();
    let mut seen = [0; 6];
    for round in 0..100 {
        for _ in 0..2 {
            driver.add(&mut one, Cmd::rw(READ, round, 1).prp(page, 0));
            driver.add(&mut two, Cmd::rw(READ, round, 1).prp(page, 0));
        }
        driver.ring(&mut one);
        driver.ring(&mut two);
        for _ in 0..4 {
            let cqe = driver.wait(&mut one);
            assert_eq!(cqe.status, OK);
            seen[usize::from(cqe.sq)] += 1;
        }
    }
    assert_eq!(seen, [0, 200, 0, 0, 0, 200]);
    // Deleted: the other one still works.
    driver.must(Cmd::new(0).dw(10, 1));
    assert_eq!(driver.admin(Cmd::new(4).dw(10, 1)).status, 0x10c);
    driver.add(&mut two, Cmd::rw(READ, 0, 1).prp(page, 0));
    driver.ring(&mut two);
    assert_eq!(driver.wait(&mut one).sq, 5);
}

#[test]
fn log_pages_from_any_offset() {
    let setup = Setup::new(Shape::default());
    let mut driver = setup.driver();
    let log = |page: u32, dwords: u32| Cmd::new(GET_LOG).dw(10, page | (dwords - 1) << 16);
    let smart = driver.page_of(log(2, 128)).unwrap();
    assert_eq!((smart[0], smart[3], smart[4]), (0, 100, 10));
    let firmware = driver.page_of(log(3, 128)).unwrap();
    assert_eq!(firmware[0], 1);
    assert!(firmware[8..16].starts_with(env!("CARGO_PKG_VERSION").as_bytes()));
    let changed = driver.page_of(log(4, 1024)).unwrap();
    assert!(changed.iter().all(|b| *b == 0));
    let effects = driver.page_of(log(5, 1024)).unwrap();
    assert_eq!(effects[4 * 6], 1, "identify");
    assert_eq!(effects[1024 + 4], 3, "write changes data");
    assert_eq!(effects[1024 + 4 * 0x7f], 0);
    // The middle of it.
    let part = driver.page_of(log(5, 4).qw(12, 1024)).unwrap();
    assert_eq!(part[..16], effects[1024..1040]);
    // Longer than the log: zeroes behind.
    let page = driver.page();
    driver.memory.write(page, &[0xff; 4096]).unwrap();
    assert_eq!(driver.admin(log(3, 1024).prp(page, 0)).status, OK);
    assert!(driver.bytes(page + 512, 3584).iter().all(|b| *b == 0));
    for (name, cmd, status) in [
        ("page 0", log(0, 4), 0x109),
        ("page 0x70", log(0x70, 4), 0x109),
        ("behind the end", log(2, 4).qw(12, 513), INVALID_FIELD),
        ("far behind", log(2, 4).qw(12, u64::MAX - 3), INVALID_FIELD),
        ("odd", log(2, 4).qw(12, 2), INVALID_FIELD),
        ("16 GiB", log(2, 0x1_0000).dw(11, 0xffff), INVALID_FIELD),
        ("no namespace", log(2, 4).nsid(3), INVALID_NAMESPACE),
    ] {
        assert_eq!(driver.page_of(cmd), Err(status), "{name}");
    }
}

#[test]
fn commands_that_are_not_offered() {
    let setup = Setup::new(Shape::default());
    let mut driver = setup.driver();
    // Firmware, namespaces, keep alive, directives, security, format, sanitize, vendor's own.
    for op in [
        0x03, 0x0d, 0x10, 0x11, 0x15, 0x18, 0x19, 0x1a, 0x80, 0x81, 0x82, 0x84, 0xc0, 0xff,
    ] {
        let cqe = driver.admin(Cmd::new(op));
        assert_eq!((cqe.status, cqe.dnr), (INVALID_OPCODE, true), "{op:#x}");
    }
    let mut fused = Cmd::new(6);
    fused.0[0] |= 1 << 8;
    assert_eq!(driver.admin(fused).status, INVALID_FIELD);
    assert_eq!(
        driver.admin(Cmd::new(6).sgl(4096, 4096, 0)).status,
        INVALID_FIELD
    );
}

#[test]
fn events_come_once_for_each_look_at_the_log() {
    let setup = Setup::new(Shape::default());
    let mut driver = setup.driver();
    let mut admin = driver.admin.clone();
    for _ in 0..4 {
        driver.add(&mut admin, Cmd::new(AER));
    }
    let fifth = driver.add(&mut admin, Cmd::new(AER));
    driver.ring(&mut admin);
    let cqe = driver.wait(&mut admin);
    assert_eq!((cqe.cid, cqe.status), (fifth, 0x105));
    // A doorbell without a queue; more of them are not told before the log was read.
    for _ in 0..3 {
        driver.set_reg(driver.doorbell(9, false), 1);
    }
    let cqe = driver.wait(&mut admin);
    assert_eq!(
        (cqe.status, cqe.result),
        (OK, 1 << 16),
        "an invalid register"
    );
    let value = driver.admin.sq_size;
    driver.set_reg(driver.doorbell(0, false), value.into());
    std::thread::sleep(std::time::Duration::from_millis(2));
    assert_eq!(driver.take(&mut admin), None);
    driver.admin = admin;
    // Read without taking note of it, then with.
    let log = Cmd::new(GET_LOG).dw(10, 1 | 15 << 16);
    driver.page_of(log.dw(10, log.0[10] | 1 << 15)).unwrap();
    driver.set_reg(driver.doorbell(0, false), value.into());
    driver.page_of(log).unwrap();
    driver.set_reg(driver.doorbell(0, false), value.into());
    let mut admin = driver.admin.clone();
    let cqe = driver.wait(&mut admin);
    assert_eq!(
        (cqe.status, cqe.result),
        (OK, 1 << 16 | 1 << 8),
        "an invalid value"
    );
    driver.admin = admin;
    // The temperature is above a threshold.
    assert_eq!(driver.must(feature(SET, 0x0b, 2)), 0);
    let cid = driver.admin.next;
    driver.set_reg(driver.doorbell(0, true), driver.admin.head.into());
    let mut admin = driver.admin.clone();
    driver.add(&mut admin, feature(SET, 4, 200));
    driver.ring(&mut admin);
    assert_eq!(driver.wait(&mut admin).cid, cid);
    let cqe = driver.wait(&mut admin);
    assert_eq!((cqe.status, cqe.result), (OK, 1 | 1 << 8 | 2 << 16));
    driver.admin = admin;
    let smart = driver.page_of(Cmd::new(GET_LOG).dw(10, 2 | 127 << 16));
    assert_eq!(smart.unwrap()[0], 2);
}

#[test]
fn abort_takes_back_event_requests_only() {
    let setup = Setup::new(threaded());
    let mut driver = setup.driver();
    let mut admin = driver.admin.clone();
    let event = driver.add(&mut admin, Cmd::new(AER));
    let abort = driver.add(&mut admin, Cmd::new(ABORT).dw(10, u32::from(event) << 16));
    driver.ring(&mut admin);
    let cqe = driver.wait(&mut admin);
    assert_eq!((cqe.cid, cqe.status), (event, ABORTED));
    let cqe = driver.wait(&mut admin);
    assert_eq!((cqe.cid, cqe.status, cqe.result), (abort, OK, 0));
    driver.admin = admin;
    assert_eq!(
        driver.must(Cmd::new(ABORT).dw(10, u32::from(event) << 16)),
        1
    );
    let mut pair = driver.pair(1, 16, 0);
    setup.control.hold(true);
    let page = driver.page();
    let cid = driver.add(&mut pair, Cmd::rw(READ, 0, 1).prp(page, 0));
    driver.ring(&mut pair);
    assert_eq!(
        driver.must(Cmd::new(ABORT).dw(10, 1 | u32::from(cid) << 16)),
        1
    );
    setup.control.hold(false);
    assert_eq!(driver.wait(&mut pair).status, OK, "it goes on");
}

//! The queue against a driver that keeps the rules, and against drivers that break each of them.

use super::*;
use crate::testing::FakeHost;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x8000;
const SIZE: u16 = 16;

struct Driver {
    host: FakeHost,
    queue: Queue,
    published: u16,
}

fn config() -> QueueConfig {
    QueueConfig {
        size: SIZE,
        descriptors: DESC,
        available: AVAIL,
        used: USED,
        max_chain: SIZE,
        event_index: false,
        indirect: true,
    }
}

impl Driver {
    fn new(config: QueueConfig) -> Self {
        let host = FakeHost::new(1 << 20);
        let queue = Queue::new(host.memory(), config).unwrap();
        Self {
            host,
            queue,
            published: 0,
        }
    }

    fn entry(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let high = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        let bytes = (u128::from(address) | u128::from(high) << 64).to_le_bytes();
        let at = table + 16 * u64::from(index);
        self.host.memory().write(at, &bytes).unwrap();
    }

    fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.entry(DESC, index, address, len, flags, next);
    }

    fn put_u16(&self, address: u64, value: u16) {
        self.host
            .memory()
            .write(address, &value.to_le_bytes())
            .unwrap();
    }

    fn get_u16(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.host.memory().read(address, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn publish(&mut self, head: u16) {
        self.put_u16(AVAIL + 4 + 2 * u64::from(self.published % SIZE), head);
        self.published = self.published.wrapping_add(1);
        self.put_u16(AVAIL + 2, self.published);
    }

    fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let mut chain = Chain::default();
        Ok(self.queue.pop(&mut chain)?.then_some(chain))
    }
}

fn lens(segments: &[GuestSlice]) -> Vec<usize> {
    segments.iter().map(GuestSlice::len).collect()
}

#[test]
fn a_chain_is_split_into_readable_and_writable_buffers() {
    let mut d = Driver::new(config());
    assert!(d.pop().unwrap().is_none(), "the queue starts empty");
    d.descriptor(3, DATA, 16, F_NEXT, 7);
    d.descriptor(7, DATA + 16, 512, F_NEXT | F_WRITE, 1);
    d.descriptor(1, DATA + 1024, 1, F_WRITE, 0);
    d.publish(3);
    let chain = d.pop().unwrap().expect("a chain");
    assert_eq!(chain.head(), 3);
    assert_eq!(lens(chain.readable()), [16]);
    assert_eq!(lens(chain.writable()), [512, 1]);
    d.queue.push(3, 513);
    assert_eq!(d.get_u16(USED + 2), 0, "not shown before publish");
    assert!(d.queue.publish());
    assert_eq!(d.get_u16(USED + 2), 1);
    assert_eq!(d.get_u16(USED + 4), 3);
    assert_eq!(d.get_u16(USED + 8), 513);
    assert!(!d.queue.publish(), "nothing new");
}

#[test]
fn front_and_last_bytes_are_taken_across_buffers() {
    let mut d = Driver::new(config());
    let text: Vec<u8> = (0..32).collect();
    d.host.memory().write(DATA, &text).unwrap();
    d.descriptor(0, DATA, 5, F_NEXT, 1);
    d.descriptor(1, DATA + 5, 20, F_NEXT, 2);
    d.descriptor(2, DATA + 0x100, 1, F_WRITE | F_NEXT, 3);
    d.descriptor(3, DATA + 0x200, 3, F_WRITE, 0);
    d.publish(0);
    let mut chain = d.pop().unwrap().unwrap();
    let mut header = [0; 16];
    assert!(chain.take_front(&mut header));
    assert_eq!(header[..], text[..16]);
    assert_eq!(lens(chain.readable()), [9]);
    chain.take_last().unwrap().write(0, &[0xaa]);
    assert_eq!(lens(chain.writable()), [1, 2]);
    assert_eq!(d.get_u16(DATA + 0x202) & 0xff, 0xaa);
    for _ in 0..3 {
        assert!(chain.take_last().is_some());
    }
    assert!(chain.take_last().is_none() && chain.writable().is_empty());
    assert_eq!(
        lens(chain.readable()),
        [9],
        "the readable part is untouched"
    );
    assert!(!chain.take_front(&mut header), "9 bytes are not 16");
}

#[test]
fn indirect_tables_may_follow_direct_descriptors_and_be_misaligned() {
    let mut d = Driver::new(config());
    let table = 0x9001;
    d.entry(table, 0, DATA, 8, F_NEXT, 2);
    d.entry(table, 2, DATA + 8, 8, F_WRITE, 0);
    d.descriptor(0, DATA + 32, 4, F_NEXT, 1);
    d.descriptor(1, table, 48, F_INDIRECT, 0);
    d.publish(0);
    let chain = d.pop().unwrap().unwrap();
    assert_eq!(lens(chain.readable()), [4, 8]);
    assert_eq!(lens(chain.writable()), [8]);
}

/// Pops after `prepare` and expects the error.
fn broken(config: QueueConfig, prepare: impl FnOnce(&mut Driver), expected: QueueError) {
    let mut d = Driver::new(config);
    prepare(&mut d);
    assert_eq!(d.pop().unwrap_err(), expected);
}

#[test]
fn every_broken_descriptor_is_an_error() {
    let memory = |address, len| QueueError::Memory(MemoryError { address, len });
    let c = config();
    broken(c, |d| d.publish(SIZE), QueueError::Index(SIZE));
    let case = |d: &mut Driver, address, len, flags, next| {
        d.descriptor(0, address, len, flags, next);
        d.publish(0);
    };
    broken(c, |d| case(d, DATA, 1, F_NEXT, 999), QueueError::Index(999));
    broken(
        c,
        |d| case(d, DATA, 1, F_NEXT, 0),
        QueueError::TooLong(SIZE),
    );
    broken(c, |d| case(d, DATA, 0, 0, 0), QueueError::Empty(0));
    broken(c, |d| case(d, 1 << 40, 9, 0, 0), memory(1 << 40, 9));
    broken(
        c,
        |d| case(d, u64::MAX - 3, 9, F_WRITE, 0),
        memory(u64::MAX - 3, 9),
    );
    let end = (1 << 20) - 4;
    broken(c, |d| case(d, end, 8, 0, 0), memory(end, 8));
    let order = |d: &mut Driver| {
        d.descriptor(1, DATA, 1, 0, 0);
        case(d, DATA, 1, F_WRITE | F_NEXT, 1);
    };
    broken(c, order, QueueError::Order(1));
    let jump = |d: &mut Driver| d.put_u16(AVAIL + 2, SIZE + 1);
    broken(c, jump, QueueError::AvailableJump(SIZE + 1));
    let back = |d: &mut Driver| d.put_u16(AVAIL + 2, u16::MAX);
    broken(c, back, QueueError::AvailableJump(u16::MAX));
}

#[test]
fn every_broken_indirect_table_is_an_error() {
    let c = config();
    let case = |d: &mut Driver, address, len, flags| {
        d.descriptor(0, address, len, flags, 1);
        d.descriptor(1, DATA, 1, 0, 0);
        d.publish(0);
    };
    let plain = QueueConfig {
        indirect: false,
        ..c
    };
    broken(
        plain,
        |d| case(d, DATA, 16, F_INDIRECT),
        QueueError::Indirect(0),
    );
    broken(
        c,
        |d| case(d, DATA, 16, F_INDIRECT | F_NEXT),
        QueueError::Indirect(0),
    );
    for len in [0, 8, 17, 16 * (u32::from(SIZE) + 1), u32::MAX, 1 << 20] {
        broken(
            c,
            |d| case(d, DATA, len, F_INDIRECT),
            QueueError::IndirectLength(len),
        );
    }
    let outside = QueueError::Memory(MemoryError {
        address: 1 << 40,
        len: 32,
    });
    broken(c, |d| case(d, 1 << 40, 32, F_INDIRECT), outside);
    let nested = |d: &mut Driver| {
        d.entry(DATA, 0, DATA, 16, F_INDIRECT, 0);
        case(d, DATA, 16, F_INDIRECT);
    };
    broken(c, nested, QueueError::Indirect(0));
    let escapes = |d: &mut Driver| {
        d.entry(DATA, 0, DATA, 1, F_NEXT, 1);
        case(d, DATA, 16, F_INDIRECT);
    };
    broken(c, escapes, QueueError::Index(1));
    let looped = |d: &mut Driver| {
        d.entry(DATA, 0, DATA, 1, F_NEXT, 0);
        case(d, DATA, 16, F_INDIRECT);
    };
    broken(c, looped, QueueError::TooLong(SIZE));
}

#[test]
fn more_than_4_gib_in_a_chain_is_an_error() {
    // A few pages are touched; the rest of the file behind this RAM stays a hole.
    let host = FakeHost::new(3 << 30);
    let queue = Queue::new(host.memory(), config()).unwrap();
    let mut d = Driver {
        host,
        queue,
        published: 0,
    };
    d.descriptor(0, 0, 0x8000_0000, F_NEXT, 1);
    d.descriptor(1, 0, 0x8000_0000, 0, 0);
    d.publish(0);
    assert_eq!(d.pop().unwrap_err(), QueueError::TooLarge(1 << 32));
}

#[test]
fn bad_rings_are_refused() {
    let memory = FakeHost::new(1 << 20).memory();
    let new = |c: QueueConfig| Queue::new(memory, c).map(drop);
    for size in [0, 3, 32769, 65535] {
        assert_eq!(
            new(QueueConfig { size, ..config() }),
            Err(QueueError::Size(size))
        );
    }
    let at = |descriptors, available, used| {
        new(QueueConfig {
            descriptors,
            available,
            used,
            ..config()
        })
    };
    assert_eq!(at(8, AVAIL, USED), Err(QueueError::Misaligned(8)));
    assert_eq!(at(DESC, 0x2001, USED), Err(QueueError::Misaligned(0x2001)));
    assert_eq!(at(DESC, AVAIL, 0x3002), Err(QueueError::Misaligned(0x3002)));
    assert_eq!(at(DESC, DESC + 16, USED), Err(QueueError::Overlap));
    assert_eq!(at(DESC, AVAIL, AVAIL), Err(QueueError::Overlap));
    assert!(matches!(
        at(1 << 40, AVAIL, USED),
        Err(QueueError::Memory(_))
    ));
    assert!(matches!(
        at(DESC, (1 << 20) - 8, USED),
        Err(QueueError::Memory(_))
    ));
    assert!(matches!(
        at(DESC, AVAIL, u64::MAX - 3),
        Err(QueueError::Memory(_))
    ));
}

#[test]
fn event_indexes_work_in_both_directions_and_around_the_wrap() {
    let mut d = Driver::new(QueueConfig {
        event_index: true,
        ..config()
    });
    d.descriptor(0, DATA, 1, 0, 0);
    let (used_event, avail_event) = (
        AVAIL + 4 + 2 * u64::from(SIZE),
        USED + 4 + 8 * u64::from(SIZE),
    );
    for round in 0..70_000u32 {
        let before = round as u16;
        // An interrupt is wanted for each third chain only.
        let wanted = round.is_multiple_of(3);
        d.put_u16(
            used_event,
            if wanted {
                before
            } else {
                before.wrapping_sub(1)
            },
        );
        d.publish(0);
        assert!(d.pop().unwrap().is_some());
        d.queue.push(0, 0);
        assert_eq!(d.queue.publish(), wanted, "round {round}");
        assert!(!d.queue.enable_notify().unwrap());
        assert_eq!(d.get_u16(avail_event), before.wrapping_add(1));
    }
}

#[test]
fn flags_suppress_notifications_and_interrupts() {
    let mut d = Driver::new(config());
    d.descriptor(0, DATA, 1, 0, 0);
    d.queue.disable_notify();
    assert_eq!(d.get_u16(USED), NO_NOTIFY);
    d.publish(0);
    assert!(d.queue.enable_notify().unwrap(), "came while disabled");
    assert_eq!(d.get_u16(USED), 0);
    assert!(d.pop().unwrap().is_some());
    d.put_u16(AVAIL, NO_INTERRUPT);
    d.queue.push(0, 0);
    assert!(!d.queue.publish());
}

#[test]
fn what_the_backend_wrote_is_marked_when_it_is_given_back() {
    let mut d = Driver::new(config());
    d.descriptor(0, 0x5000, 0x2001, F_WRITE, 0);
    d.publish(0);
    assert!(d.pop().unwrap().is_some());
    // Tracking begins while the request is in flight.
    d.host.track_dirty(true);
    assert_eq!(d.host.take_dirty(), Vec::<u64>::new());
    d.queue.push(0, 0x2001);
    assert!(d.queue.publish());
    assert_eq!(d.host.take_dirty(), [0x3000, 0x5000, 0x6000, 0x7000]);
}

use std::time::Instant;

use super::calendar::DateTime;
use super::*;
use crate::bus::Registers as _;
use crate::pci::IrqLines;
use crate::pci::fake_vm::FakeVm;

const SECOND: i64 = 1_000_000_000;
/// 2024-02-28 23:59:58.
const START: i64 = 1_709_164_798 * SECOND;

fn clock() -> (Arc<FakeVm>, Rtc<FakeVm>) {
    let vm = Arc::new(FakeVm::default());
    let pin = IrqLines::new(Arc::clone(&vm)).pin(RTC_IRQ.into()).unwrap();
    let rtc = Rtc::new(pin, memory_sizes(vm.memory()));
    (vm, rtc)
}

fn read(rtc: &Rtc<FakeVm>, index: u8) -> u8 {
    rtc.write(0, 0, 1, u64::from(index));
    rtc.read(0, 1, 1) as u8
}

fn write(rtc: &Rtc<FakeVm>, index: u8, value: u8) {
    rtc.write(0, 0, 1, u64::from(index));
    rtc.write(0, 1, 1, u64::from(value));
}

fn wait(vm: &FakeVm, high: bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while vm.line(RTC_IRQ.into()) != high {
        assert!(Instant::now() < end, "waited in vain for an interrupt");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Registers {
    fn set(&mut self, now: i64, index: u8, value: u8) {
        self.select(index);
        self.write(now, value);
    }

    fn get(&mut self, now: i64, index: u8) -> u8 {
        self.select(index);
        self.read(now)
    }

    fn set_alarm(&mut self, hour: u8, minute: u8, second: u8) {
        for (index, value) in [(5, hour), (3, minute), (1, second)] {
            self.set(START, index, value);
        }
    }

    /// Seconds from [`START`] to the next interrupt.
    fn seconds_left(&self) -> Option<i64> {
        self.deadline(START).map(|at| (at - START) / SECOND)
    }
}

#[test]
fn the_clock_shows_host_time_in_bcd() {
    let (_, rtc) = clock();
    let before = host_clock() / SECOND;
    let bcd = |value: u8| i64::from(value >> 4) * 10 + i64::from(value & 15);
    let shown = DateTime {
        year: bcd(read(&rtc, CENTURY)) * 100 + bcd(read(&rtc, 9)),
        month: bcd(read(&rtc, 8)),
        day: bcd(read(&rtc, 7)),
        hour: bcd(read(&rtc, 4)),
        minute: bcd(read(&rtc, 2)),
        second: bcd(read(&rtc, 0)),
    };
    // Registers are read one by one: a carry between two of them is possible, a day's difference is not.
    assert!((shown.to_seconds() - before).abs() < 7200, "{shown:?}");
    assert_eq!(read(&rtc, 0xd), 0x80);
    assert_eq!(read(&rtc, 0xa) & 0x7f, 0x26);
}

#[test]
fn what_the_guest_sets_goes_on_from_there() {
    let (_, rtc) = clock();
    write(&rtc, 0xb, 0x80 | 2);
    for (index, value) in [
        (CENTURY, 0x20),
        (9, 0x35),
        (8, 0x12),
        (7, 0x31),
        (4, 0x10),
        (2, 0x20),
        (0, 0x30),
    ] {
        write(&rtc, index, value);
    }
    assert_eq!(read(&rtc, 0), 0x30);
    write(&rtc, 0xb, 2);
    assert_eq!(
        (read(&rtc, 9), read(&rtc, 8), read(&rtc, 7), read(&rtc, 4)),
        (0x35, 0x12, 0x31, 0x10)
    );
    // Twelve hours, binary: 10 a.m. stays 10, and 22 is 10 p.m.
    write(&rtc, 0xb, 4);
    assert_eq!(read(&rtc, 4), 10);
    write(&rtc, 4, 0x8a);
    write(&rtc, 0xb, 2);
    assert_eq!(read(&rtc, 4), 0x22);
    // A reset leaves it running.
    rtc.reset();
    assert_eq!((read(&rtc, 9), read(&rtc, 4)), (0x35, 0x22));
}

#[test]
fn periodic_interrupts_come_at_their_rate_and_wait_for_their_reader() {
    let mut it = Registers::new(START);
    it.set(START, 0xb, 0x42);
    for (rate, hertz) in [(3, 8192), (6, 1024), (15, 2), (1, 256), (2, 128)] {
        it.set(START, 0xa, 0x20 | rate);
        assert_eq!(
            it.deadline(START),
            Some(START + (SECOND + hertz - 1) / hertz)
        );
    }
    it.set(START, 0xa, 0x20);
    assert_eq!(it.deadline(START), None);
    it.set(START, 0xa, 0x2f);
    it.advance(START + SECOND / 2 - 1);
    assert!(!it.interrupting());
    it.advance(START + SECOND / 2);
    assert!(it.interrupting());
    // Unread, it is the last: a guest that does not look costs nothing.
    assert_eq!(it.deadline(START + SECOND / 2), None);
    assert_eq!(it.get(START + SECOND / 2, 0xc), 0xc0);
    assert_eq!(it.get(START + SECOND / 2, 0xc), 0);
    assert!(!it.interrupting());
    assert_eq!(it.deadline(START + SECOND / 2), Some(START + SECOND));
}

#[test]
fn flags_tell_what_happened_without_any_interrupt() {
    let mut it = Registers::new(START);
    assert_eq!(it.get(START + SECOND / 100, 0xc), 0x40);
    // Seconds have passed, and alarm registers that were never set mean midnight, which was among them.
    assert_eq!(it.get(START + 3 * SECOND, 0xc), 0x70);
    assert_eq!(it.get(START + 3 * SECOND, 0xc), 0);
    // The host's clock was set back.
    assert_eq!(it.get(START, 0xc), 0);
    assert!(!it.interrupting());
    // Enabled afterwards, a pending flag interrupts at once.
    it.advance(START + 2 * SECOND);
    it.set(START + 2 * SECOND, 0xb, 0x12);
    assert!(it.interrupting());
    it.set(START + 2 * SECOND, 0xb, 0x02);
    assert!(!it.interrupting());
    it.set(START + 2 * SECOND, 0xb, 0x12);
    assert!(it.interrupting());
    it.reset();
    assert!(!it.interrupting() && !it.enabled());
}

#[test]
fn an_update_interrupt_comes_with_each_second_but_not_while_the_time_is_set() {
    let mut it = Registers::new(START + 1);
    it.set(START + 1, 0xb, 0x12);
    assert_eq!(it.deadline(START + 1), Some(START + SECOND));
    assert_eq!(it.get(START + SECOND - 1000, 0xa) & 0x80, 0x80);
    it.advance(START + SECOND);
    assert_eq!(it.get(START + SECOND, 0xa) & 0x80, 0);
    assert_eq!(it.get(START + SECOND, 0xc), 0xd0);
    it.set(START + SECOND, 0xb, 0x92);
    assert_eq!(it.get(START + SECOND, 0xb), 0x82);
    assert_eq!(it.deadline(START + SECOND), None);
    it.set(START + SECOND, 0xb, 0xb2);
    it.advance(START + 100 * SECOND);
    assert!(!it.interrupting());
}

#[test]
fn an_alarm_matches_its_registers_or_anything() {
    let mut it = Registers::new(START);
    it.set(START, 0xb, 0x22);
    for (alarm, seconds) in [
        ((0x23, 0x59, 0x59), Some(1)),
        ((0x00, 0x00, 0x00), Some(2)),
        // The present second is over.
        ((0x23, 0x59, 0x58), Some(86_400)),
        ((0xff, 0xff, 0xff), Some(1)),
        ((0xff, 0xff, 0x05), Some(7)),
        ((0xff, 0x30, 0xff), Some(2 + 30 * 60)),
        ((0xc0, 0x00, 0x10), Some(12)),
        ((0x12, 0xff, 0x00), Some(2 + 12 * 3600)),
        ((0x24, 0x00, 0x00), None),
        ((0x00, 0x60, 0x00), None),
        ((0x00, 0x00, 0xa0), None),
    ] {
        it.set_alarm(alarm.0, alarm.1, alarm.2);
        assert_eq!(it.seconds_left(), seconds, "{alarm:x?}");
    }
    it.set_alarm(0, 0, 0);
    it.advance(START + SECOND);
    assert!(!it.interrupting());
    it.advance(START + 2 * SECOND);
    assert_eq!(it.get(START + 2 * SECOND, 0xc) & 0xa0, 0xa0);
    assert_eq!(
        it.deadline(START + 2 * SECOND),
        Some(START + 86_402 * SECOND)
    );
}

#[test]
fn an_alarm_follows_the_format_and_the_time_that_the_guest_has_set() {
    let mut it = Registers::new(START);
    // Binary, twelve hours: 11 p.m.
    it.set(START, 0xb, 0x24);
    it.set_alarm(0x8b, 59, 59);
    assert_eq!(it.seconds_left(), Some(1));
    it.set_alarm(12, 0, 1);
    assert_eq!(it.seconds_left(), Some(3));
    // The guest's clock goes to 10:00:00 on that day.
    it.set(START, 0xb, 0xa6);
    for (index, value) in [(4, 10), (2, 0), (0, 0)] {
        it.set(START, index, value);
    }
    it.set(START, 0xb, 0x26);
    it.set_alarm(10, 0, 5);
    assert_eq!(it.seconds_left(), Some(5));
}

#[test]
fn interrupts_reach_their_line_and_the_thread_ends_after_them() {
    let (vm, rtc) = clock();
    assert!(!rtc.shared.lock().ticking);
    write(&rtc, 0xb, 0x42);
    for _ in 0..5 {
        wait(&vm, true);
        assert_eq!(read(&rtc, 0xc) & 0xc0, 0xc0);
        // Low at once; the next period may already have raised it again.
    }
    // hwclock waits for the next second.
    write(&rtc, 0xb, 0x12);
    read(&rtc, 0xc);
    wait(&vm, true);
    assert_eq!(read(&rtc, 0xc) & 0x90, 0x90);
    write(&rtc, 0xb, 0x02);
    wait(&vm, false);
    let end = Instant::now() + Duration::from_secs(20);
    while rtc.shared.lock().ticking {
        assert!(Instant::now() < end, "the thread does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
    // And is there again when needed, until the clock goes.
    write(&rtc, 0xb, 0x42);
    wait(&vm, true);
    rtc.reset();
    assert!(!vm.line(RTC_IRQ.into()));
    write(&rtc, 0xb, 0x42);
    wait(&vm, true);
    drop(rtc);
    assert!(!vm.line(RTC_IRQ.into()));
}

#[test]
fn memory_sizes_are_there_and_come_back() {
    for (mib, expected) in [
        (1, [0x80, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (64, [0x80, 0x02, 0, 0xfc, 0, 0xfc, 0, 0x03, 0, 0, 0]),
        (
            5 << 10,
            [0x80, 0x02, 0xff, 0xff, 0xff, 0xff, 0, 0xbf, 0, 0x80, 0],
        ),
    ] {
        let vm = Arc::new(FakeVm::default());
        let pin = IrqLines::new(vm).pin(RTC_IRQ.into()).unwrap();
        let rtc = Rtc::new(pin, memory_sizes(&GuestMemory::new(mib << 20).unwrap()));
        let sizes = || {
            [
                0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35, 0x5b, 0x5c, 0x5d,
            ]
            .map(|index| read(&rtc, index))
        };
        assert_eq!(sizes(), expected, "{mib} MiB");
        write(&rtc, 0x34, 0x55);
        write(&rtc, 0x40, 0xa5);
        rtc.reset();
        assert_eq!(sizes(), expected);
        // The rest is battery-backed.
        assert_eq!(read(&rtc, 0x40), 0xa5);
    }
}

#[test]
fn any_garbage_is_survived() {
    let (_, rtc) = clock();
    for index in 0..=255 {
        for value in [0, 0x7f, 0x80, 0xff] {
            write(&rtc, index, value);
            read(&rtc, index);
        }
    }
    assert_eq!(rtc.read(0, 0, 2), 0xffff);
    let mut it = Registers::new(START);
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut now = START;
    for _ in 0..100_000 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        now += (seed >> 40) as i64 * 1000;
        it.select((seed % 16) as u8 | if seed & 0x100 != 0 { CENTURY } else { 0 });
        match seed & 0x600 {
            0 => drop(it.read(now)),
            _ => it.write(now, (seed >> 16) as u8),
        }
        if let Some(at) = it.deadline(now) {
            assert!(at > now, "a deadline that is over: {at} at {now}");
        }
    }
}

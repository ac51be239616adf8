//! The CMOS clock (MC146818): what the time is, and 114 bytes of memory that last as long as the VM.
//!
//! It runs on the host's clock plus whatever the guest has set it to. Interrupts are not made.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::Registers;

/// Index port; data is the next.
pub const RTC_PORT: u16 = 0x70;
/// CMOS address of the century, as PCs have it and ACPI's FADT says.
pub const CENTURY: u8 = 0x32;

const SECONDS: usize = 0;
const MINUTES: usize = 2;
const HOURS: usize = 4;
const WEEKDAY: usize = 6;
const DAY: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const REGISTER_A: usize = 0xa;
const REGISTER_B: usize = 0xb;
const REGISTER_C: usize = 0xc;
const REGISTER_D: usize = 0xd;

/// Register A: update in progress.
const UPDATING: u8 = 0x80;
/// Register B: time is being set and doesn't advance.
const SET: u8 = 0x80;
/// Register B: binary instead of BCD.
const BINARY: u8 = 4;
/// Register B: 24 hours instead of 12.
const HOURS_24: u8 = 2;
/// Register D: the battery is good.
const VALID: u8 = 0x80;
/// An update is announced this long before the second ends (MC146818 datasheet, figure 14).
const UPDATE_NANOS: u32 = 244_000;

struct State {
    index: usize,
    memory: [u8; 128],
    /// Seconds by which the guest's clock is ahead of the host's.
    ahead: i64,
}

/// Ports 0x70 and 0x71.
pub struct Rtc {
    state: Mutex<State>,
}

impl Default for Rtc {
    fn default() -> Self {
        let mut memory = [0; 128];
        // 32768 Hz time base, 1024 Hz periodic rate: what PC firmware leaves.
        memory[REGISTER_A] = 0x26;
        memory[REGISTER_B] = HOURS_24;
        memory[REGISTER_D] = VALID;
        Self {
            state: Mutex::new(State {
                index: 0,
                memory,
                ahead: 0,
            }),
        }
    }
}

/// Seconds since 1970 and nanoseconds into the present one, on the host.
fn host_clock() -> (i64, u32) {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    (
        i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        now.subsec_nanos(),
    )
}

/// A date of the proleptic Gregorian calendar and a time of day, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DateTime {
    year: i64,
    month: i64,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

impl DateTime {
    /// Days are counted from 1 March of year 0, so that a leap day is the last of its year.
    fn from_seconds(seconds: i64) -> Self {
        let (days, rest) = (
            seconds.div_euclid(86_400) + 719_468,
            seconds.rem_euclid(86_400),
        );
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        Self {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }

    fn to_seconds(self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let month_from_march = (self.month + 9) % 12;
        let day_of_year = (153 * month_from_march + 2) / 5 + self.day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * 86_400 + self.hour * 3600 + self.minute * 60 + self.second
    }

    /// 1 is Sunday.
    fn weekday(self) -> i64 {
        (self.to_seconds().div_euclid(86_400) + 4).rem_euclid(7) + 1
    }
}

impl State {
    fn encode(&self, value: i64) -> u8 {
        let value = value.rem_euclid(100) as u8;
        if self.memory[REGISTER_B] & BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> i64 {
        if self.memory[REGISTER_B] & BINARY != 0 {
            i64::from(value)
        } else {
            i64::from(value >> 4) * 10 + i64::from(value & 15)
        }
    }

    /// Puts the present time into the time registers, unless the guest is setting them.
    fn update(&mut self) {
        if self.memory[REGISTER_B] & SET != 0 {
            return;
        }
        let now = DateTime::from_seconds(host_clock().0.saturating_add(self.ahead));
        self.memory[SECONDS] = self.encode(now.second);
        self.memory[MINUTES] = self.encode(now.minute);
        self.memory[HOURS] = if self.memory[REGISTER_B] & HOURS_24 != 0 {
            self.encode(now.hour)
        } else {
            let afternoon = if now.hour >= 12 { 0x80 } else { 0 };
            self.encode((now.hour + 11) % 12 + 1) | afternoon
        };
        self.memory[WEEKDAY] = self.encode(now.weekday());
        self.memory[DAY] = self.encode(now.day);
        self.memory[MONTH] = self.encode(now.month);
        self.memory[YEAR] = self.encode(now.year);
        self.memory[usize::from(CENTURY)] = self.encode(now.year / 100);
    }

    /// Takes what the guest wrote into the time registers as the time from now on.
    fn adopt(&mut self) {
        let hour = self.memory[HOURS];
        let hour = if self.memory[REGISTER_B] & HOURS_24 != 0 {
            self.decode(hour)
        } else {
            self.decode(hour & 0x7f) % 12 + if hour & 0x80 != 0 { 12 } else { 0 }
        };
        let time = DateTime {
            year: self.decode(self.memory[usize::from(CENTURY)]) * 100
                + self.decode(self.memory[YEAR]),
            month: self.decode(self.memory[MONTH]).clamp(1, 12),
            day: self.decode(self.memory[DAY]).clamp(1, 31),
            hour,
            minute: self.decode(self.memory[MINUTES]),
            second: self.decode(self.memory[SECONDS]),
        };
        self.ahead = time.to_seconds() - host_clock().0;
    }

    fn read(&mut self) -> u8 {
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR => self.update(),
            index if index == usize::from(CENTURY) => self.update(),
            REGISTER_A => {
                let updating = self.memory[REGISTER_B] & SET == 0
                    && host_clock().1 >= 1_000_000_000 - UPDATE_NANOS;
                return self.memory[REGISTER_A] | if updating { UPDATING } else { 0 };
            }
            // No interrupt is ever pending.
            REGISTER_C => return 0,
            _ => {}
        }
        self.memory[self.index]
    }

    fn write(&mut self, value: u8) {
        match self.index {
            REGISTER_A => self.memory[REGISTER_A] = value & !UPDATING,
            REGISTER_B => {
                self.update();
                let was_setting = self.memory[REGISTER_B] & SET != 0;
                self.memory[REGISTER_B] = value;
                if was_setting && value & SET == 0 {
                    self.adopt();
                }
            }
            REGISTER_C | REGISTER_D => {}
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR => self.write_time(value),
            index if index == usize::from(CENTURY) => self.write_time(value),
            index => self.memory[index] = value,
        }
    }

    fn write_time(&mut self, value: u8) {
        self.update();
        self.memory[self.index] = value;
        if self.memory[REGISTER_B] & SET == 0 {
            self.adopt();
        }
    }
}

impl Rtc {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the reset line does: clock and memory run on, interrupts are disabled (MC146818 datasheet, RESET).
    pub fn reset(&self) {
        let mut state = self.lock();
        state.index = 0;
        state.memory[REGISTER_B] &= !0x78;
    }
}

impl Registers for Rtc {
    fn read(&self, _: u32, offset: u64, width: u8) -> u64 {
        // The index port is write-only.
        if (offset, width) == (1, 1) {
            u64::from(self.lock().read())
        } else {
            crate::bus::ones(width)
        }
    }

    fn write(&self, _: u32, offset: u64, width: u8, value: u64) {
        let mut state = self.lock();
        if offset == 0 {
            // Bit 7 is the NMI gate.
            state.index = (value & 0x7f) as usize;
        }
        match (offset, width) {
            (0, 2) => state.write((value >> 8) as u8),
            (1, 1) => state.write(value as u8),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(0, 0, 1, u64::from(index));
        rtc.read(0, 1, 1) as u8
    }

    fn write(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, 0, 1, u64::from(index));
        rtc.write(0, 1, 1, u64::from(value));
    }

    #[test]
    fn dates_convert_both_ways() {
        for (seconds, year, month, day, weekday) in [
            (0, 1970, 1, 1, 5),
            (951_782_400, 2000, 2, 29, 3),
            (1_709_251_199, 2024, 2, 29, 5),
            (4_107_542_400, 2100, 3, 1, 2),
            (-86_400, 1969, 12, 31, 4),
        ] {
            let date = DateTime::from_seconds(seconds);
            assert_eq!(
                (date.year, date.month, date.day, date.weekday()),
                (year, month, day, weekday),
                "{seconds}"
            );
            assert_eq!(date.to_seconds(), seconds);
        }
    }

    #[test]
    fn the_clock_shows_host_time_in_bcd() {
        let rtc = Rtc::default();
        let (before, _) = host_clock();
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
        assert_eq!(read(&rtc, 0xc), 0);
        assert_eq!(read(&rtc, 0xa) & 0x7f, 0x26);
    }

    #[test]
    fn what_the_guest_sets_goes_on_from_there() {
        let rtc = Rtc::default();
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
    }

    #[test]
    fn memory_holds_and_any_garbage_is_survived() {
        let rtc = Rtc::default();
        write(&rtc, 0x40, 0xa5);
        assert_eq!(read(&rtc, 0x40), 0xa5);
        for index in 0..=255 {
            for value in [0, 0x7f, 0x80, 0xff] {
                write(&rtc, index, value);
                read(&rtc, index);
            }
        }
        assert_eq!(rtc.read(0, 0, 2), 0xffff);
    }
}

//! The clock's registers: what they show at a moment of the host's clock, and when they next want an interrupt.
//!
//! Nothing here waits or reads a clock: the callers say what time it is. Moments are nanoseconds since 1970, UTC.

use super::CENTURY;
use super::calendar::DateTime;

const SECONDS: usize = 0;
const SECONDS_ALARM: usize = 1;
const MINUTES: usize = 2;
const MINUTES_ALARM: usize = 3;
const HOURS: usize = 4;
const HOURS_ALARM: usize = 5;
const WEEKDAY: usize = 6;
const DAY: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const REGISTER_A: usize = 0xa;
const REGISTER_B: usize = 0xb;
const REGISTER_C: usize = 0xc;
const REGISTER_D: usize = 0xd;

/// Register A: update in progress; periodic rate.
const UPDATING: u8 = 0x80;
const RATE: u8 = 0x0f;
/// Register B: time is being set and doesn't advance.
const SET: u8 = 0x80;
/// Registers B and C: periodic, alarm and update-ended interrupt, enabled and pending; and in C, any of these.
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE_ENDED: u8 = 0x10;
const SOURCES: u8 = PERIODIC | ALARM | UPDATE_ENDED;
const PENDING: u8 = 0x80;
/// Register B: square wave, binary instead of BCD, 24 hours instead of 12.
const SQUARE_WAVE: u8 = 8;
const BINARY: u8 = 4;
const HOURS_24: u8 = 2;
/// Register D: the battery is good.
const VALID: u8 = 0x80;

/// An alarm register from here on matches everything.
const ANY: u8 = 0xc0;

const SECOND: i64 = 1_000_000_000;
const DAY_SECONDS: i64 = 86_400;
/// An update is announced this long before the second ends (MC146818 datasheet, figure 14).
const UPDATE: i64 = 244_000;
/// Of the time base, which always runs: guests don't stop it but to set the time, for which there is SET.
const TIME_BASE_HZ: i128 = 32_768;

pub(super) struct Registers {
    index: usize,
    memory: [u8; 128],
    /// Seconds by which the guest's clock is ahead of the host's.
    ahead: i64,
    /// Flags are up to date for this moment.
    seen: i64,
}

impl Registers {
    /// With a battery that never failed. `now`: the present moment.
    pub fn new(now: i64) -> Self {
        let mut memory = [0; 128];
        // 32768 Hz time base, 1024 Hz periodic rate: what PC firmware leaves.
        memory[REGISTER_A] = 0x26;
        memory[REGISTER_B] = HOURS_24;
        memory[REGISTER_D] = VALID;
        Self {
            index: 0,
            memory,
            ahead: 0,
            seen: now,
        }
    }

    /// The reset line: time and memory stay, interrupts and the square wave go off (MC146818 datasheet, RESET).
    pub fn reset(&mut self) {
        self.index = 0;
        self.memory[REGISTER_B] &= !(SOURCES | SQUARE_WAVE);
        self.memory[REGISTER_C] = 0;
    }

    /// Writes a byte of the battery-backed memory from outside.
    pub fn put(&mut self, address: u8, value: u8) {
        if let Some(cell) = self.memory.get_mut(usize::from(address)) {
            *cell = value;
        }
    }

    /// Selects the register that is accessed next. Bit 7 is the NMI gate, which is not wired.
    pub fn select(&mut self, index: u8) {
        self.index = usize::from(index & 0x7f);
    }

    /// Whether the interrupt line is high.
    pub fn interrupting(&self) -> bool {
        self.memory[REGISTER_C] & PENDING != 0
    }

    /// Whether any interrupt is enabled.
    pub fn enabled(&self) -> bool {
        self.memory[REGISTER_B] & SOURCES != 0
    }

    /// Sets the flags of what has happened until `now`.
    pub fn advance(&mut self, now: i64) {
        let since = std::mem::replace(&mut self.seen, now);
        // A host's clock that is set back makes nothing happen twice.
        if since < now {
            let mut happened = 0;
            if let Some(period) = self.period()
                && ticks(since, period) != ticks(now, period)
            {
                happened |= PERIODIC;
            }
            let (from, to) = (self.guest_seconds(since), self.guest_seconds(now));
            if self.memory[REGISTER_B] & SET == 0 && from != to {
                happened |= UPDATE_ENDED;
                if self.next_alarm(from).is_some_and(|alarm| alarm <= to) {
                    happened |= ALARM;
                }
            }
            self.memory[REGISTER_C] |= happened;
        }
        self.settle();
    }

    /// A source that is pending and enabled holds the line, until it is acknowledged or disabled (MC146818 datasheet, IRQF).
    fn settle(&mut self) {
        self.memory[REGISTER_C] &= !PENDING;
        if self.memory[REGISTER_C] & self.memory[REGISTER_B] & SOURCES != 0 {
            self.memory[REGISTER_C] |= PENDING;
        }
    }

    /// When the line will rise next; `None` if no interrupt is enabled, or one waits to be acknowledged.
    pub fn deadline(&self, now: i64) -> Option<i64> {
        if self.interrupting() {
            return None;
        }
        let enabled = self.memory[REGISTER_B];
        let runs = enabled & SET == 0;
        let seconds = self.guest_seconds(now);
        let moment = |guest: i64| (guest.saturating_sub(self.ahead)).saturating_mul(SECOND);
        let periodic = self
            .period()
            .filter(|_| enabled & PERIODIC != 0)
            .map(|period| next_tick(now, period));
        let alarm = (enabled & ALARM != 0 && runs)
            .then(|| self.next_alarm(seconds))
            .flatten()
            .map(moment);
        let update = (enabled & UPDATE_ENDED != 0 && runs).then(|| moment(seconds + 1));
        [periodic, alarm, update].into_iter().flatten().min()
    }

    /// Nanoseconds times [`TIME_BASE_HZ`] from one periodic interrupt to the next (MC146818 datasheet, table 5).
    fn period(&self) -> Option<i128> {
        let rate = match self.memory[REGISTER_A] & RATE {
            0 => return None,
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        Some(i128::from(SECOND) << (rate - 1))
    }

    fn guest_seconds(&self, now: i64) -> i64 {
        now.div_euclid(SECOND).saturating_add(self.ahead)
    }

    /// The first second of the guest's clock after `after` at which the alarm's three registers match; each may stand for any value.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let wanted = |register: usize, decode: &dyn Fn(u8) -> i64| {
            let value = self.memory[register];
            (value < ANY).then(|| decode(value))
        };
        let hour = wanted(HOURS_ALARM, &|value| self.decode_hour(value));
        let minute = wanted(MINUTES_ALARM, &|value| self.decode(value));
        let second = wanted(SECONDS_ALARM, &|value| self.decode(value));
        let fits = |wanted: Option<i64>, value| wanted.is_none_or(|wanted| wanted == value);
        let first = after.checked_add(1)?;
        let in_day = |from: i64| {
            (from / 3600..24).filter(|&h| fits(hour, h)).find_map(|h| {
                (0..60).filter(|&m| fits(minute, m)).find_map(|m| {
                    let start = h * 3600 + m * 60;
                    let second = second.unwrap_or((from - start).clamp(0, 59));
                    let time = start + second;
                    (second < 60 && time >= from).then_some(time)
                })
            })
        };
        let (day, time) = (first.div_euclid(DAY_SECONDS), first.rem_euclid(DAY_SECONDS));
        let today = in_day(time).map(|time| (day, time));
        let (day, time) = today.or_else(|| Some((day + 1, in_day(0)?)))?;
        day.checked_mul(DAY_SECONDS)?.checked_add(time)
    }

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

    fn decode_hour(&self, hour: u8) -> i64 {
        if self.memory[REGISTER_B] & HOURS_24 != 0 {
            self.decode(hour)
        } else {
            self.decode(hour & 0x7f) % 12 + if hour & 0x80 != 0 { 12 } else { 0 }
        }
    }

    /// Puts the present time into the time registers, unless the guest is setting them.
    fn update(&mut self, now: i64) {
        if self.memory[REGISTER_B] & SET != 0 {
            return;
        }
        let now = DateTime::from_seconds(self.guest_seconds(now));
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
    fn adopt(&mut self, now: i64) {
        let time = DateTime {
            year: self.decode(self.memory[usize::from(CENTURY)]) * 100
                + self.decode(self.memory[YEAR]),
            month: self.decode(self.memory[MONTH]).clamp(1, 12),
            day: self.decode(self.memory[DAY]).clamp(1, 31),
            hour: self.decode_hour(self.memory[HOURS]),
            minute: self.decode(self.memory[MINUTES]),
            second: self.decode(self.memory[SECONDS]),
        };
        self.ahead = time.to_seconds() - now.div_euclid(SECOND);
    }

    /// Reads the selected register.
    pub fn read(&mut self, now: i64) -> u8 {
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR => self.update(now),
            index if index == usize::from(CENTURY) => self.update(now),
            REGISTER_A => {
                let updating =
                    self.memory[REGISTER_B] & SET == 0 && now.rem_euclid(SECOND) >= SECOND - UPDATE;
                return self.memory[REGISTER_A] | if updating { UPDATING } else { 0 };
            }
            REGISTER_C => {
                self.advance(now);
                return std::mem::take(&mut self.memory[REGISTER_C]);
            }
            _ => {}
        }
        self.memory[self.index]
    }

    /// Writes the selected register. What happened before counts by the settings before.
    pub fn write(&mut self, now: i64, value: u8) {
        self.advance(now);
        match self.index {
            REGISTER_A => self.memory[REGISTER_A] = value & !UPDATING,
            REGISTER_B => {
                self.update(now);
                let was_setting = self.memory[REGISTER_B] & SET != 0;
                // To begin setting ends update interrupts (MC146818 datasheet, SET).
                let ends = if value & SET != 0 { UPDATE_ENDED } else { 0 };
                self.memory[REGISTER_B] = value & !ends;
                if was_setting && value & SET == 0 {
                    self.adopt(now);
                }
                self.settle();
            }
            REGISTER_C | REGISTER_D => {}
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR => self.write_time(now, value),
            index if index == usize::from(CENTURY) => self.write_time(now, value),
            index => self.memory[index] = value,
        }
    }

    fn write_time(&mut self, now: i64, value: u8) {
        self.update(now);
        self.memory[self.index] = value;
        if self.memory[REGISTER_B] & SET == 0 {
            self.adopt(now);
        }
    }
}

fn ticks(now: i64, period: i128) -> i128 {
    (i128::from(now) * TIME_BASE_HZ).div_euclid(period)
}

/// The first moment after `now` at which a period ends.
fn next_tick(now: i64, period: i128) -> i64 {
    let end = (ticks(now, period) + 1) * period;
    i64::try_from((end + TIME_BASE_HZ - 1).div_euclid(TIME_BASE_HZ)).unwrap_or(i64::MAX)
}

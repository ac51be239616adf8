//! Clocks that the driver has and KVM has not: the CMOS clock with its memory (ports 0x70 and 0x71), the ACPI PM timer, and the HPET,
//! of which there is only the silence of one that is turned off.

use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_run;
use vmm_host::hypervisor::bhyve::abi::data::{VdiPmTimer, VdiRtc};
use vmm_host::hypervisor::bhyve::abi::*;

use crate::access::Access;
use crate::lock;
use crate::machine::Machine;

const HPET: std::ops::Range<u64> = 0xfed0_0000..0xfed0_0400;
const PM_TIMER_HZ: u128 = 3_579_545;

/// Registers of the MC146818, beside those of the time: 0 to 9 and the century.
const REGISTER_A: usize = 0xa;
const REGISTER_B: usize = 0xb;
pub const REGISTER_C: usize = 0xc;
const REGISTER_D: usize = 0xd;
const CENTURY: usize = 0x32;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// Registers B and C: periodic, alarm, update ended. Of C alone: any that is enabled.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATED: u8 = 1 << 4;
const INTERRUPTS: u8 = PERIODIC | ALARM | UPDATED;
const INTERRUPT: u8 = 1 << 7;
/// Of register D: the battery is good.
const VALID: u8 = 1 << 7;

pub struct Clocks(Mutex<State>);

struct State {
    pm_port: Option<u16>,
    started: Instant,
    index: usize,
    memory: [u8; 128],
    /// The time since 1970 at an instant.
    wall: (Instant, Duration),
}

impl Default for Clocks {
    fn default() -> Self {
        let mut memory = [0; 128];
        (memory[REGISTER_A], memory[REGISTER_B], memory[REGISTER_D]) = (0x26, HOURS_24, VALID);
        Self(Mutex::new(State {
            pm_port: None,
            started: Instant::now(),
            index: 0,
            memory,
            wall: (Instant::now(), Duration::ZERO),
        }))
    }
}

impl Clocks {
    /// Answers what the driver answers without an exit. `read` is told of each register of the clock that was read.
    pub fn serve(&self, access: &Access, run: &mut kvm_run, read: impl Fn(usize)) -> bool {
        if !self.knows(access) {
            return false;
        }
        let mut part = Some(*access);
        while let Some(access) = part {
            let mut state = lock(&self.0);
            if access.is_read() {
                let value = state.read(&access);
                access.set(run, value);
                if access.is_port() && access.address() == 0x71 {
                    // Before the lock goes: what comes due next raises the line again.
                    read(state.index);
                    if state.index == REGISTER_C {
                        state.memory[REGISTER_C] = 0;
                    }
                }
            } else {
                let value = access.value(run);
                state.write(&access, value);
            }
            part = access.next();
        }
        true
    }

    fn knows(&self, access: &Access) -> bool {
        let address = access.address();
        match access.is_port() {
            true => {
                let pm_port = lock(&self.0).pm_port;
                matches!(address, 0x70 | 0x71) || pm_port.map(u64::from) == Some(address)
            }
            false => HPET.contains(&address),
        }
    }

    pub fn read_pm_timer(&self) -> VdiPmTimer {
        VdiPmTimer {
            ioport: lock(&self.0).pm_port.unwrap_or(0),
            ..Default::default()
        }
    }

    pub fn read_rtc(&self) -> VdiRtc {
        let state = lock(&self.0);
        let (at, wall) = state.wall;
        VdiRtc {
            base_clock: (wall + at.elapsed()).as_nanos() as i64,
            content: state.memory,
            addr: state.index as u8,
            ..Default::default()
        }
    }

    pub fn write_rtc(&self, rtc: &VdiRtc) {
        let mut state = lock(&self.0);
        let wall = Duration::from_nanos(rtc.base_clock.max(0).unsigned_abs());
        state.wall = (Instant::now(), wall);
        (state.memory, state.index) = (rtc.content, usize::from(rtc.addr & 0x7f));
    }

    /// After `VM_REINIT`, which the CMOS clock outlives.
    pub fn reinit(&self) {
        let mut state = lock(&self.0);
        state.pm_port = None;
        state.started = Instant::now();
    }
}

impl State {
    fn read(&self, access: &Access) -> u64 {
        match access.address() {
            0x71 if access.is_port() => self.cmos(self.index).into(),
            _ if access.is_port() && access.address() != 0x70 => {
                let ticks = self.started.elapsed().as_nanos() * PM_TIMER_HZ / 1_000_000_000;
                u64::from(ticks as u32)
            }
            _ => 0,
        }
    }

    fn write(&mut self, access: &Access, value: u64) {
        match (access.is_port(), access.address()) {
            (true, 0x70) => self.index = value as usize & 0x7f,
            // Of the time, only the host's can be had.
            (true, 0x71) if is_now(self.index) || matches!(self.index, REGISTER_C | REGISTER_D) => {
            }
            (true, 0x71) => self.memory[self.index] = value as u8,
            _ => {}
        }
    }

    fn cmos(&self, index: usize) -> u8 {
        if !is_now(index) {
            return self.memory[index];
        }
        let (at, wall) = self.wall;
        let time = Civil::of((wall + at.elapsed()).as_secs());
        let value = match index {
            0 => time.second,
            2 => time.minute,
            4 => time.hour,
            6 => time.weekday,
            7 => time.day,
            8 => time.month,
            9 => (time.year % 100) as u8,
            CENTURY => (time.year / 100) as u8,
            _ => return 0,
        };
        match self.memory[REGISTER_B] & BINARY {
            0 => ((value / 10) << 4) | (value % 10),
            _ => value,
        }
    }
}

/// Registers of the time that it is; the others of the clock's are those of the alarm.
fn is_now(index: usize) -> bool {
    matches!(index, 0 | 2 | 4 | 6..=9 | CENTURY)
}

/// What was last seen of the clock.
#[derive(Default)]
pub struct Alarms {
    periods: u128,
    seconds: u64,
}

impl Clocks {
    /// Notes what has come due since the last look: whether anything can, and whether line 8 is to rise.
    pub fn look(&self, last: &mut Alarms) -> (bool, bool) {
        let mut state = lock(&self.0);
        let enabled = state.memory[REGISTER_B] & INTERRUPTS;
        let (at, wall) = state.wall;
        let now = wall + at.elapsed();
        let rate = match u32::from(state.memory[REGISTER_A] & 15) {
            rate @ (1 | 2) => rate + 7,
            rate => rate,
        };
        // Of 32768 Hz (MC146818 data sheet, table 5); rate 0 is none.
        let periods = (now.as_nanos() * 32768 / 1_000_000_000) >> rate.saturating_sub(1);
        let mut flags = 0;
        if rate > 0 && periods != last.periods {
            flags |= PERIODIC;
        }
        if now.as_secs() != last.seconds {
            flags |= UPDATED;
            let due = |(alarm, now)| {
                let set = state.memory[alarm];
                // Such values fit always.
                set >= 0xc0 || set == state.cmos(now)
            };
            if [(1, 0), (3, 2), (5, 4)].into_iter().all(due) {
                flags |= ALARM;
            }
        }
        (last.periods, last.seconds) = (periods, now.as_secs());
        let before = state.memory[REGISTER_C];
        let mut after = before | flags;
        if after & enabled != 0 {
            after |= INTERRUPT;
        }
        state.memory[REGISTER_C] = after;
        (enabled != 0, after & !before & INTERRUPT != 0)
    }
}

fn is_time(index: usize) -> bool {
    index < REGISTER_A || index == CENTURY
}

struct Civil {
    year: u64,
    month: u8,
    day: u8,
    /// From Sunday, 1.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Civil {
    /// Of seconds since 1970, by the proleptic Gregorian calendar: years are counted from March of year 0, so that leap days come last.
    fn of(seconds: u64) -> Self {
        let (days, rest) = (seconds / 86400, seconds % 86400);
        let shifted = days + 719_468;
        let (era, of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * of_year + 2) / 153;
        let month = (from_march + 2) % 12 + 1;
        Self {
            year: year_of_era + era * 400 + u64::from(month <= 2),
            month: month as u8,
            day: (of_year - (153 * from_march + 2) / 5 + 1) as u8,
            weekday: ((days + 4) % 7 + 1) as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }
}

impl Machine {
    pub fn place_pm_timer(&self, port: usize) -> io::Result<()> {
        let _frozen = self.freeze();
        let port = u16::try_from(port)
            .map_err(|_| self.misuse(libc::EINVAL, &format!("PM timer at port {port:#x}")))?;
        lock(&self.clocks.0).pm_port = Some(port);
        Ok(())
    }

    fn cmos_byte(&self, offset: i32) -> io::Result<usize> {
        let index = usize::try_from(offset).ok().filter(|index| *index < 128);
        index.ok_or_else(|| self.misuse(libc::EINVAL, &format!("CMOS address {offset:#x}")))
    }

    pub fn write_cmos(&self, request: &VmRtcData) -> io::Result<()> {
        let index = self.cmos_byte(request.offset)?;
        if is_time(index) || (REGISTER_A..=REGISTER_D).contains(&index) {
            let what = format!("CMOS address {index:#x} is the clock's");
            return Err(self.misuse(libc::EINVAL, &what));
        }
        lock(&self.clocks.0).memory[index] = request.value;
        Ok(())
    }

    pub fn read_cmos(&self, request: &mut VmRtcData) -> io::Result<()> {
        let index = self.cmos_byte(request.offset)?;
        request.value = lock(&self.clocks.0).cmos(index);
        Ok(())
    }

    pub fn set_clock(&self, time: Timespec) -> io::Result<()> {
        let (Ok(sec), Ok(nsec)) = (u64::try_from(time.sec), u32::try_from(time.nsec)) else {
            return Err(self.misuse(libc::EINVAL, "a time before 1970"));
        };
        if nsec >= 1_000_000_000 {
            return Err(self.misuse(libc::EINVAL, &format!("{nsec} ns")));
        }
        lock(&self.clocks.0).wall = (Instant::now(), Duration::new(sec, nsec));
        Ok(())
    }

    pub fn clock(&self) -> Timespec {
        let (at, wall) = lock(&self.clocks.0).wall;
        let now = wall + at.elapsed();
        Timespec {
            sec: now.as_secs() as i64,
            nsec: now.subsec_nanos().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_follow_the_calendar() {
        for (seconds, date) in [
            (0, (1970, 1, 1, 5)),
            (951_782_400, (2000, 2, 29, 3)),
            (1_709_251_199, (2024, 2, 29, 5)),
            (4_107_542_400, (2100, 3, 1, 2)),
        ] {
            let civil = Civil::of(seconds);
            assert_eq!((civil.year, civil.month, civil.day, civil.weekday), date);
        }
        let late = Civil::of(1_709_251_199);
        assert_eq!((late.hour, late.minute, late.second), (23, 59, 59));
    }
}

//! When a thread that serves a queue lets requests gather.
//!
//! A doorbell wakes the thread that serves its queue. On a processor that virtual CPU and thread share, the thread then takes the
//! place of the CPU that has just rung, serves one request, and gives it back: a batch never forms, every request costs a
//! notification, an interrupt and two changes of thread, and a guest with many requests to make looks like one with a single one.
//! A thread that gathers lets the CPU go on instead, until it waits too or has had its share of the processor. Where a processor
//! is free, both run at once either way.
//!
//! A guest that makes one request and waits for it only loses by that, so it is tried now and then, and kept while it pays.

use std::time::{Duration, Instant};

use crate::Host;

/// Turns before the first trial, and after one that has gathered something.
const SOON: u32 = 16;
/// Most turns between trials of a queue whose requests come alone.
const LONE: u32 = 128;
/// Most turns between trials on a machine that is too busy.
const BUSY: u32 = 4096;
/// Turns in a row with one request that end it, once there was company.
const PATIENCE: u32 = 2;
/// A batch that took longer to gather ends it. On a busy machine whoever has the processor may not be the guest that makes the
/// requests, and keep it for some milliseconds; one time in many this does little harm. Requests after a rest look the same.
const LATE: Duration = Duration::from_millis(1);

/// Decides for one thread. It calls [`Pace::sleeps`] before and [`Pace::woken`] after each sleep.
pub struct Pace {
    host: Host,
    rhythm: Rhythm,
    /// What the thread is now.
    gathers: bool,
    /// The host can't do it.
    refused: bool,
    /// When the thread went to sleep, if it gathers.
    since: Option<Instant>,
    /// The last sleep was a long one.
    late: bool,
}

impl Pace {
    /// For a thread that is about to start.
    #[must_use]
    pub fn new(host: Host) -> Self {
        Self {
            host,
            rhythm: Rhythm::default(),
            gathers: false,
            refused: false,
            since: None,
            late: false,
        }
    }

    /// The thread is about to sleep; it has taken `requests` since it last did.
    pub fn sleeps(&mut self, requests: usize) {
        self.rhythm.turn(requests, self.late);
        if self.rhythm.gathers != self.gathers && !self.refused {
            self.gathers = self.rhythm.gathers;
            if !self.host.gather(self.gathers) {
                (self.refused, self.gathers) = (true, false);
            }
        }
        self.since = self.gathers.then(Instant::now);
    }

    /// The thread has slept.
    pub fn woken(&mut self) {
        self.late = self.since.is_some_and(|since| since.elapsed() > LATE);
    }
}

/// The decision, by how many requests came together.
struct Rhythm {
    gathers: bool,
    /// Turns in a row with one request, while it gathers.
    lone: u32,
    /// Turns until the next trial, and how many there were from the last one's end.
    left: u32,
    period: u32,
}

impl Default for Rhythm {
    fn default() -> Self {
        Self {
            gathers: false,
            lone: 0,
            left: SOON,
            period: SOON,
        }
    }
}

impl Rhythm {
    fn turn(&mut self, requests: usize, late: bool) {
        match requests {
            // A completion, or news from another thread.
            0 => {}
            _ if !self.gathers => {
                self.left -= 1;
                (self.gathers, self.lone) = (self.left == 0, PATIENCE - 1);
            }
            1 => {
                self.lone += 1;
                if self.lone == PATIENCE {
                    self.end(LONE);
                }
            }
            _ if late => self.end(BUSY),
            _ => (self.lone, self.period) = (0, SOON),
        }
    }

    /// The next trial comes twice as late as this one, in `most` turns unless it was later already.
    fn end(&mut self, most: u32) {
        self.period = (self.period * 2).min(most.max(self.period));
        (self.gathers, self.left) = (false, self.period);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Turns of `requests` until it gathers.
    fn until_trial(rhythm: &mut Rhythm, requests: usize) -> u32 {
        let mut turns = 0;
        while !rhythm.gathers {
            rhythm.turn(requests, false);
            turns += 1;
        }
        turns
    }

    #[test]
    fn lone_requests_are_rarely_kept_waiting() {
        let mut rhythm = Rhythm::default();
        let mut periods = Vec::new();
        for _ in 0..5 {
            periods.push(until_trial(&mut rhythm, 1));
            rhythm.turn(0, false);
            assert!(rhythm.gathers, "nothing says nothing");
            rhythm.turn(1, true);
            assert!(!rhythm.gathers);
        }
        assert_eq!(periods, [16, 32, 64, 128, 128]);
    }

    #[test]
    fn company_keeps_it_going_and_makes_the_next_trial_soon() {
        let mut rhythm = Rhythm::default();
        for _ in 0..5 {
            until_trial(&mut rhythm, 1);
            rhythm.turn(1, false);
        }
        until_trial(&mut rhythm, 1);
        for _ in 0..100 {
            rhythm.turn(32, false);
            rhythm.turn(1, false);
            rhythm.turn(2, false);
            assert!(rhythm.gathers);
        }
        rhythm.turn(1, false);
        rhythm.turn(1, false);
        assert_eq!(until_trial(&mut rhythm, 1), 2 * SOON);
    }

    #[test]
    fn a_busy_machine_ends_it_for_longer_and_longer() {
        let mut rhythm = Rhythm::default();
        let mut periods = Vec::new();
        for _ in 0..10 {
            // What came together meanwhile does not count for it.
            periods.push(until_trial(&mut rhythm, 32));
            rhythm.turn(32, true);
            rhythm.turn(32, true);
        }
        // The second of the two was a turn already.
        let counted: Vec<u32> = periods.iter().skip(1).map(|turns| turns + 1).collect();
        assert_eq!(periods[0], SOON);
        assert_eq!(counted, [32, 64, 128, 256, 512, 1024, 2048, 4096, 4096]);
        until_trial(&mut rhythm, 1);
        rhythm.turn(1, false);
        assert_eq!(until_trial(&mut rhythm, 1), BUSY, "not sooner for that");
    }
}

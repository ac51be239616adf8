//! Jobs in level 1: several side by side, each in a lane of its own that takes the next one that waits.

use super::debian::Disks;
use super::level1::{End, Level1};
use super::{Job, Lab, Mode};
use crate::report::Report;
use anyhow::{Result, anyhow};
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// After this the jobs that wait still have failed: whoever waits for the result should read which they are.
const WHOLE: Duration = Duration::from_secs(50 * 60);
/// A level 1 takes 2 GiB.
const MOST_LANES: usize = 4;
/// How often level 1 may die in one and the same job before it counts as that job's fault.
const DEATHS: u32 = 4;
/// How often a job is run that comes to no end.
const TRIES: u32 = 3;

/// A job that waits for its turn.
struct Turn<'a> {
    job: &'a Job,
    /// How often level 1 has died in it.
    deaths: u32,
    /// How often it has failed. The emulation delivers interrupts that it must not now and then, and the guest waits for a lock
    /// that it holds itself, or panics. So it gets a second chance, and a third if it came to no end, of which the report tells.
    failed: u32,
}

impl Turn<'_> {
    /// Whether it is run again if it fails now, with or without an end.
    fn may_again(&self, ended: bool) -> bool {
        self.failed + 1 < if ended { 2 } else { TRIES }
    }
}

struct Lanes<'a> {
    waiting: Mutex<VecDeque<Turn<'a>>>,
    report: Mutex<&'a mut Report>,
    start: Instant,
}

impl<'a> Lanes<'a> {
    fn next(&self) -> Option<Turn<'a>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pop_front()
    }

    fn again(&self, turn: Turn<'a>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push_back(turn);
    }

    fn judge(&self, turn: &Turn, console: &str, code: Option<i32>, took: Duration) -> bool {
        // What is said of one job stands together.
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        let again = turn.may_again(code.is_some());
        let good = turn.job.judge(console, code, again, &mut report);
        println!(
            "  {}: {:.0} s, try {}",
            turn.job.name,
            took.as_secs_f64(),
            turn.failed + 1
        );
        good
    }

    /// Runs what waits until nothing does.
    fn run(&self, lab: &Lab, disks: Option<&Disks>, mode: Mode) -> Result<()> {
        let mut machine: Option<Level1> = None;
        while let Some(mut turn) = self.next() {
            let job = turn.job;
            let left = WHOLE.saturating_sub(self.start.elapsed());
            if left.is_zero() {
                let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
                report.fail(
                    &format!("lab: {}", job.name),
                    "not run: the lab's time is up",
                );
                continue;
            }
            // Disks are as they were made in a new level 1 alone.
            if job.disks
                && let Some(old) = machine.take()
            {
                old.end()?;
            }
            let start = Instant::now();
            let mut level1 = match machine.take() {
                Some(level1) => level1,
                None => Level1::start(lab, disks, mode)?,
            };
            let (console, code) = match level1.run(job, left)? {
                End::Ended(console, code) => (console, Some(code)),
                End::Late(console) => (console, None),
                End::Died(last) => {
                    turn.deaths += 1;
                    println!("level 1 has died in {}; last words:\n{last}", job.name);
                    level1.end()?;
                    if turn.deaths < DEATHS {
                        self.again(turn);
                    } else {
                        turn.failed = TRIES;
                        self.judge(&turn, &last, None, start.elapsed());
                    }
                    continue;
                }
            };
            let good = self.judge(&turn, &console, code, start.elapsed());
            if good && !job.disks {
                machine = Some(level1);
                continue;
            }
            level1.end()?;
            if !good && turn.may_again(code.is_some()) {
                turn.failed += 1;
                self.again(turn);
            }
        }
        machine.map_or(Ok(()), Level1::end)
    }
}

/// Runs jobs, those that may take longest first, and judges each.
pub fn run(
    lab: &Lab,
    jobs: &[&Job],
    disks: Option<&Disks>,
    mode: Mode,
    report: &mut Report,
) -> Result<()> {
    lab.level1_root()?;
    let mut waiting: Vec<Turn> = jobs
        .iter()
        .map(|job| Turn {
            job,
            deaths: 0,
            failed: 0,
        })
        .collect();
    waiting.sort_by_key(|turn| std::cmp::Reverse(turn.job.limit));
    let processors = thread::available_parallelism().map_or(1, usize::from);
    // A console that is shown is one job's.
    let count = if mode.show {
        1
    } else {
        processors.min(MOST_LANES)
    };
    println!("{} jobs in {count} lanes of level 1", jobs.len());
    let lanes = Lanes {
        waiting: Mutex::new(waiting.into()),
        report: Mutex::new(report),
        start: Instant::now(),
    };
    thread::scope(|scope| {
        let lane = || lanes.run(lab, disks, mode);
        let started: Vec<_> = (0..count).map(|_| scope.spawn(lane)).collect();
        let ended = started.into_iter().map(|lane| {
            lane.join()
                .unwrap_or_else(|_| Err(anyhow!("a lane of the lab has panicked")))
        });
        ended.collect()
    })
}

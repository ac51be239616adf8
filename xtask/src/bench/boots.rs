//! Boots level 1 until every test of one host has a figure, or has been tried often enough.
//!
//! A test may fail through no fault of the host that is measured: QEMU 7.2's emulated SVM now and then delivers an interrupt to
//! the nested guest while its interrupt flag is clear (the frame on the guest's stack says so). In the handler of the same
//! interrupt, the guest then waits for a lock that it holds itself; its PAUSE instructions take QEMU so long and count so little
//! that level 1's clock all but stops too. On the way back to user mode, it is a double fault and the guest panics. So the
//! time limit is this machine's, and a test without an end is tried again in a new boot.

use crate::process::{self, Outcome};
use anyhow::{Result, bail};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

/// How long level 1 may write nothing before its first line: on an idle machine it takes half a minute.
const BOOT: Duration = Duration::from_secs(180);
/// How long it may write nothing afterwards. The guest's boot is the longest silence: 20 s on an idle machine.
const SILENCE: Duration = Duration::from_secs(75);
/// What it takes to power off.
const PARTING: Duration = Duration::from_secs(30);
/// How often a test is begun before it counts as stuck.
const ATTEMPTS: u32 = 3;
/// Boots of level 1 in a row that may come to nothing.
const BOOTS: u32 = 2;
const WAIT: Duration = Duration::from_secs(1);
const END: &str = "LAB-END";

/// One run of fio in the guest.
pub struct Test {
    /// What it is called in the report.
    pub name: &'static str,
    /// The rest, as the guest's script takes it: `rw:bs:ioengine:iodepth:number_ios`.
    pub fio: &'static str,
}

impl Test {
    /// Its name as one word, as a console shows it.
    pub fn label(&self) -> String {
        self.name.replace(", ", "-").replace(' ', "-")
    }

    /// How many requests it makes.
    pub fn requests(&self) -> f64 {
        self.fio
            .rsplit(':')
            .next()
            .and_then(|count| count.parse().ok())
            .unwrap_or(1.0)
    }
}

/// Why a test has no figure, if there is no other reason.
pub const STUCK: &str = "stuck";

/// What a test has given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    /// Requests per second of level 1's clock.
    pub per_second: f64,
    /// Exits of the guest during the test, from fio's start to its end.
    pub exits: f64,
}

/// The figures of one host, by the names of the tests; an error says why there is none.
pub type Figures = BTreeMap<&'static str, Result<Figure, String>>;

/// What a console tells of one test.
#[derive(Debug, PartialEq)]
enum Ending {
    Done(Figure),
    Failed,
    /// Begun, and nothing more.
    Open,
}

/// What became of the test `name`; `None`: it was not begun.
fn ending(console: &str, name: &str) -> Option<Ending> {
    let mut found = None;
    for line in console.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["BENCH-START", test] if *test == name => found = Some(Ending::Open),
            ["BENCH-ERROR", test, ..] if *test == name => found = Some(Ending::Failed),
            ["BENCH", test, per_second, exits] if *test == name => {
                if let (Ok(per_second), Ok(exits)) = (per_second.parse(), exits.parse()) {
                    found = Some(Ending::Done(Figure { per_second, exits }));
                }
            }
            _ => {}
        }
    }
    found
}

/// Runs level 1 until it says that it has ended, it ends, it is silent for too long or the deadline has come.
fn boot(command: &mut Command, deadline: Instant) -> Result<Outcome> {
    let start = Instant::now();
    let mut running = process::start(command, false)?;
    let (mut seen, mut since) = (0, start);
    loop {
        if running.wait_for(END, WAIT) || running.ended() {
            return running.finish(start.elapsed() + PARTING);
        }
        let length = running.output().len();
        if length != seen {
            (seen, since) = (length, Instant::now());
        }
        let patience = if seen == 0 { BOOT } else { SILENCE };
        if since.elapsed() > patience || Instant::now() > deadline {
            return running.finish(Duration::ZERO);
        }
    }
}

/// Measures one host. `command` makes the command that boots level 1 for these tests, after those of `always`, whose figures are
/// the last boot's.
///
/// # Errors
/// Level 1 can't be started, or does not come to any test.
pub fn measure(
    host: &str,
    always: &'static [Test],
    tests: &'static [Test],
    limit: Duration,
    command: impl Fn(&[&Test]) -> Result<Command>,
) -> Result<Figures> {
    let deadline = Instant::now() + limit;
    let mut figures = Figures::new();
    let mut begun: BTreeMap<&str, u32> = BTreeMap::new();
    let mut idle = 0;
    while Instant::now() < deadline {
        let open = |test: &&Test| !matches!(figures.get(test.name), Some(Ok(_)));
        let tries = |test: &&Test| begun.get(test.name).copied().unwrap_or(0) < ATTEMPTS;
        let wanted: Vec<&Test> = tests.iter().filter(open).filter(tries).collect();
        if wanted.is_empty() {
            break;
        }
        let all: Vec<&'static Test> = always.iter().chain(tests).collect();
        let line: Vec<&Test> = always.iter().chain(wanted).collect();
        let outcome = boot(&mut command(&line)?, deadline)?;
        println!("{host}: level 1 ran {:.0} s", outcome.elapsed.as_secs_f64());
        let mut progress = false;
        for test in all {
            let why = match ending(&outcome.output, &test.label()) {
                None => continue,
                Some(Ending::Done(figure)) => {
                    progress = true;
                    println!("{host}: {}: {:.0} per second", test.name, figure.per_second);
                    figures.insert(test.name, Ok(figure));
                    continue;
                }
                Some(Ending::Failed) => format!("fio fails:\n{}", outcome.tail(20)),
                Some(Ending::Open) if outcome.status.is_some() => {
                    format!("the VM ended during it:\n{}", outcome.tail(20))
                }
                Some(Ending::Open) => STUCK.to_owned(),
            };
            *begun.entry(test.name).or_default() += 1;
            println!("{host}: {}: {why}", test.name);
            figures.insert(test.name, Err(why));
        }
        idle = if progress { 0 } else { idle + 1 };
        if idle == BOOTS {
            bail!(
                "{host}: no test ends ({}):\n{}",
                outcome.ending(),
                outcome.tail(30)
            );
        }
    }
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_tells_how_each_test_ended() {
        let console = "BENCH-HOST qemu\r\nBENCH-START a\r\nBENCH a 4651 212\r\n\
            BENCH-START b\r\nBENCH-ERROR b fio\r\nBENCH-START c\r\nBENCH-START";
        let figure = Figure {
            per_second: 4651.0,
            exits: 212.0,
        };
        assert_eq!(ending(console, "a"), Some(Ending::Done(figure)));
        assert_eq!(ending(console, "b"), Some(Ending::Failed));
        assert_eq!(ending(console, "c"), Some(Ending::Open));
        assert_eq!(ending(console, "d"), None);
    }

    /// The host is a shell here: what is judged is how its boots are counted.
    #[test]
    fn a_test_without_an_end_is_begun_again_and_given_up() {
        static ALWAYS: [Test; 1] = [Test {
            name: "first",
            fio: "read:4k:psync:1:5",
        }];
        static TESTS: [Test; 2] = [
            Test {
                name: "never",
                fio: "read:4k:psync:1:5",
            },
            Test {
                name: "well",
                fio: "read:4k:psync:1:5",
            },
        ];
        let shell = |tests: &[&Test]| {
            let mut script = String::new();
            for test in tests {
                script += &format!("echo BENCH-START {0};", test.name);
                match test.name {
                    "never" if tests.len() == 3 => {}
                    "never" => break,
                    name => script += &format!("echo BENCH {name} 10 20;"),
                }
            }
            let mut command = Command::new("sh");
            command.arg("-c").arg(script + "echo LAB-END");
            Ok(command)
        };
        let limit = Duration::from_secs(60);
        let figures = measure("shell", &ALWAYS, &TESTS, limit, shell).unwrap();
        assert_eq!(figures["well"].as_ref().unwrap().per_second, 10.0);
        assert!(figures["never"].as_ref().unwrap_err().contains("ended"));
        assert!(figures["first"].is_ok());
    }
}

//! Jobs: what they expect, and judging a console against it.

use crate::process;
use crate::report::Report;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One job of `tests/lab`.
pub struct Job {
    /// Its name, the file's without its ending.
    pub name: String,
    /// The VM file or script.
    pub file: PathBuf,
    /// A script for level 1, not a VM file.
    pub script: bool,
    /// For a person, not for `lab test`.
    pub interactive: bool,
    /// Runs on the emulation of illumos' vmm driver.
    pub emulated: bool,
    /// Needs the disks that firmware boots.
    pub disks: bool,
    /// How long it may take.
    pub limit: Duration,
    exit: i32,
    sees: Vec<String>,
    times: Vec<(usize, String)>,
}

impl Job {
    /// Reads a job by name.
    pub fn load(directory: &Path, name: &str) -> Result<Self> {
        for ending in ["toml", "sh"] {
            let file = directory.join(format!("{name}.{ending}"));
            if file.is_file() {
                return Self::read(file);
            }
        }
        bail!(
            "{} has no job {name}.toml or {name}.sh",
            directory.display()
        )
    }

    /// Every job of a directory, in order of name.
    pub fn all(directory: &Path) -> Result<Vec<Self>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(directory)
            .with_context(|| format!("cannot list {}", directory.display()))?
        {
            let file = entry?.path();
            if file
                .extension()
                .is_some_and(|ending| ending == "toml" || ending == "sh")
            {
                files.push(file);
            }
        }
        files.sort();
        files.into_iter().map(Self::read).collect()
    }

    fn read(file: PathBuf) -> Result<Self> {
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let mut job = Job {
            name: file
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            script: file.extension().is_some_and(|ending| ending == "sh"),
            interactive: false,
            disks: false,
            emulated: false,
            limit: Duration::from_secs(120),
            exit: 0,
            sees: Vec::new(),
            times: Vec::new(),
            file,
        };
        for line in text.lines().filter_map(|line| line.strip_prefix("# lab: ")) {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            let number = |text: &str| {
                text.parse::<u64>().with_context(|| {
                    format!("{}: `{line}`: {text:?} is no number", job.file.display())
                })
            };
            match word {
                "exit" => job.exit = i32::try_from(number(rest)?)?,
                "limit" => job.limit = Duration::from_secs(number(rest)?),
                "sees" => job.sees.push(rest.to_owned()),
                "shell" => job.interactive = true,
                "disks" => job.disks = true,
                "emulated" => job.emulated = true,
                // For level 1, which prepares itself for it.
                "firmware" => {}
                "times" => {
                    let (count, text) = rest.split_once(' ').unwrap_or((rest, ""));
                    job.times
                        .push((usize::try_from(number(count)?)?, text.to_owned()));
                }
                _ => bail!("{}: `# lab: {word}` is not known", job.file.display()),
            }
        }
        Ok(job)
    }

    /// Judges the console of a run that ended with the given exit code: the checks that passed, and what is wrong.
    pub fn verdict<'a>(&self, console: &'a str, code: Option<i32>) -> (Vec<&'a str>, Vec<String>) {
        let (mut right, mut wrong) = (Vec::new(), Vec::new());
        for line in console.lines().map(str::trim_end) {
            if let Some(at) = line.find("CHECK ok ") {
                right.push(&line[at + 9..]);
            } else if let Some(at) = line.find("CHECK FAIL ") {
                wrong.push(format!("check failed: {}", &line[at + 11..]));
            }
        }
        match code {
            Some(code) if code == self.exit => {}
            Some(code) => wrong.push(format!("exit code {code}, expected {}", self.exit)),
            None => wrong.push("it did not come to its end".to_owned()),
        }
        for text in self.sees.iter().filter(|text| !console.contains(*text)) {
            wrong.push(format!("the console does not show {text:?}"));
        }
        for (count, text) in &self.times {
            let seen = console.matches(text.as_str()).count();
            if seen != *count {
                wrong.push(format!(
                    "the console shows {text:?} {seen} times, expected {count}"
                ));
            }
        }
        (right, wrong)
    }

    /// How long it may write nothing.
    pub fn silence(&self) -> Duration {
        self.limit / 2
    }

    /// Records a run. If it failed and `again` says that it may be run once more, only says why.
    pub fn judge(
        &self,
        console: &str,
        code: Option<i32>,
        again: bool,
        report: &mut Report,
    ) -> bool {
        let (right, wrong) = self.verdict(console, code);
        let name = format!("lab: {}", self.name);
        if wrong.is_empty() {
            for check in &right {
                println!("  {}: {check}", self.name);
            }
            report.add_passed(u32::try_from(right.len()).unwrap_or(u32::MAX));
            report.pass(&name);
            return true;
        }
        let why = format!(
            "{}; the last lines of its console:\n{}",
            wrong.join("; "),
            process::tail(console, 60)
        );
        if again {
            report.again(&name, &why);
        } else {
            report.fail(&name, &why);
        }
        false
    }

    /// Cuts this job's part out of level 1's console: the text and the exit code.
    pub fn part<'a>(&self, console: &'a str) -> (&'a str, Option<i32>) {
        let begin = format!("LAB-BEGIN {}", self.name);
        let end = format!("LAB-EXIT {} ", self.name);
        let starts = |line: &str, mark: &str| line.trim_end().ends_with(mark);
        let mut from = None;
        let mut at = 0;
        for line in console.split_inclusive('\n') {
            if from.is_none() && starts(line, &begin) {
                from = Some(at + line.len());
            }
            if let (Some(from), Some(place)) = (from, line.find(&end)) {
                let code = line[place + end.len()..].split_whitespace().next();
                return (
                    &console[from..at + place],
                    code.and_then(|code| code.parse().ok()),
                );
            }
            at += line.len();
        }
        (from.map_or("", |from| &console[from..]), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(text: &str) -> (tempfile::TempDir, Result<Job>) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a.toml"), text).unwrap();
        let job = Job::load(directory.path(), "a");
        (directory, job)
    }

    #[test]
    fn expectations_are_read_and_judged() {
        let (_directory, job) = job(
            "# lab: exit 3\n# lab: sees hello world\n# lab: times 2 up\n# lab: limit 9\n[main]\n",
        );
        let job = job.unwrap();
        assert_eq!(job.limit, Duration::from_secs(9));
        let good = |console: &str, code| {
            let mut report = Report::default();
            job.judge(console, code, false, &mut report) && report.close()
        };
        assert!(good("up up\nhello world\n", Some(3)));
        assert!(!good("up up\nhello world\n", Some(0)));
        assert!(!good("up up\nhello world\n", None));
        assert!(!good("up\nhello world\n", Some(3)));
        assert!(!good("up up\nhello\n", Some(3)));
        assert!(!good("up up\nhello world\nCHECK FAIL disk\n", Some(3)));
    }

    #[test]
    fn unknown_expectations_are_refused() {
        let (_directory, job) = job("# lab: seees hello\n");
        assert!(
            job.err()
                .unwrap()
                .to_string()
                .contains("`# lab: seees` is not known")
        );
    }

    #[test]
    fn parts_of_the_console_are_found() {
        let (_directory, job) = job("");
        let job = job.unwrap();
        let console = "x\r\nLAB-BEGIN a\r\none\r\ntwoLAB-EXIT a 4\r\nLAB-BEGIN b\r\n";
        assert_eq!(job.part(console), ("one\r\ntwo", Some(4)));
        assert_eq!(job.part("LAB-BEGIN a\nhangs"), ("hangs", None));
        assert_eq!(job.part("LAB-BEGIN b\nhangs"), ("", None));
    }
}

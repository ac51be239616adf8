//! The tally of what passed, failed and was skipped.

use crate::process::Outcome;
use anyhow::Result;

/// Counts results and says each.
#[derive(Default)]
pub struct Report {
    passed: u32,
    failed: Vec<String>,
    skipped: Vec<String>,
    again: Vec<String>,
}

impl Report {
    /// Announces a group of tests.
    pub fn section(&self, title: &str) {
        println!("\n== {title}");
    }

    /// Records a pass.
    pub fn pass(&mut self, name: &str) {
        println!("pass: {name}");
        self.passed += 1;
    }

    /// Records several passes that were said already.
    pub fn add_passed(&mut self, count: u32) {
        self.passed += count;
    }

    /// Records a failure with its reason.
    pub fn fail(&mut self, name: &str, why: &str) {
        println!("FAIL: {name}: {why}");
        self.failed.push(name.to_owned());
    }

    /// Records a failure that does not count yet: the test gets a second chance.
    pub fn again(&mut self, name: &str, why: &str) {
        println!("AGAIN: {name}: {why}");
        self.again.push(name.to_owned());
    }

    /// Records a skip with its reason.
    pub fn skip(&mut self, name: &str, why: &str) {
        println!("SKIPPED: {name}: {why}");
        self.skipped.push(format!("{name}: {why}"));
    }

    /// Records a result.
    pub fn record(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => self.pass(name),
            Err(error) => self.fail(name, &format!("{error:#}")),
        }
    }

    /// Records a command that must end with code 0.
    pub fn command(&mut self, name: &str, outcome: Result<Outcome>) -> bool {
        match outcome {
            Ok(outcome) if outcome.code() == Some(0) => {
                self.pass(name);
                true
            }
            Ok(outcome) => {
                self.fail(
                    name,
                    &format!(
                        "{}; its last output:\n{}",
                        outcome.ending(),
                        outcome.tail(60)
                    ),
                );
                false
            }
            Err(error) => {
                self.fail(name, &format!("{error:#}"));
                false
            }
        }
    }

    /// Says the totals; true if nothing failed.
    pub fn close(self) -> bool {
        println!();
        for name in &self.again {
            println!("AGAIN: {name} failed and was run again");
        }
        for name in &self.failed {
            println!("FAILED: {name}");
        }
        for text in &self.skipped {
            println!("SKIPPED: {text}");
        }
        println!(
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed.len(),
            self.skipped.len()
        );
        self.failed.is_empty()
    }
}

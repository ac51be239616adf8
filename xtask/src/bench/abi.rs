//! What crossing the plugin ABI costs: a program beside the plugin it loads, both of release build.

use crate::workspace::{self, Profile};
use anyhow::{Result, ensure};
use std::process::Command;

/// Prints nanoseconds for a register access, by plugin and in process, and for a request of a batch.
pub fn run() -> Result<()> {
    let built = workspace::cargo(&["build", "--release", "--quiet", "-p", "vmm-bench"]).status()?;
    ensure!(built.success(), "the bench does not build");
    let program = workspace::output(Profile::Release).join("vmm-bench");
    let status = Command::new(program).status()?;
    ensure!(status.success(), "the bench has failed: {status}");
    Ok(())
}

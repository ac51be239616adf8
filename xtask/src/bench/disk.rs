//! What a request to a disk in a file costs without a guest, by depth, on the workspace's filesystem and on tmpfs.

use crate::workspace::{self, Profile};
use anyhow::{Result, ensure};
use std::path::Path;
use std::process::Command;

/// Prints nanoseconds per request.
pub fn run() -> Result<()> {
    let arguments = [
        "build",
        "--release",
        "--quiet",
        "-p",
        "vmm-plugin-file",
        "--example",
        "engines",
    ];
    let built = workspace::cargo(&arguments).status()?;
    ensure!(built.success(), "the bench does not build");
    let program = workspace::output(Profile::Release).join("examples/engines");
    for folder in [workspace::target().as_path(), Path::new("/dev/shm")] {
        println!("in {}:", folder.display());
        let status = Command::new(&program).arg(folder).status()?;
        ensure!(status.success(), "the bench has failed: {status}");
    }
    Ok(())
}

//! What a request to a disk in a file costs without a guest, by depth, on the workspace's filesystem and on tmpfs, and what an
//! overlay adds to a read.

use crate::workspace::{self, Profile};
use anyhow::{Result, ensure};
use std::path::Path;
use std::process::Command;

/// The programs that measure: package and example.
const PROGRAMS: [(&str, &str); 2] = [
    ("vmm-plugin-file", "engines"),
    ("vmm-plugin-overlay", "warm_reads"),
];

/// Prints nanoseconds per request.
pub fn run() -> Result<()> {
    for (package, example) in PROGRAMS {
        let arguments = [
            "build",
            "--release",
            "--quiet",
            "-p",
            package,
            "--example",
            example,
        ];
        let built = workspace::cargo(&arguments).status()?;
        ensure!(built.success(), "the bench {example} does not build");
        let program = workspace::output(Profile::Release)
            .join("examples")
            .join(example);
        for folder in [workspace::target().as_path(), Path::new("/dev/shm")] {
            println!("{example} in {}:", folder.display());
            let status = Command::new(&program).arg(folder).status()?;
            ensure!(status.success(), "the bench {example} has failed: {status}");
        }
    }
    Ok(())
}

//! What a request costs without a guest, by depth: to a disk in a file, on the workspace's filesystem and on tmpfs; what an overlay
//! adds to a read; and through a virtio disk and an NVMe controller to a disk in memory.

use crate::workspace::{self, Profile};
use anyhow::{Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// An example of a plugin, built.
fn example(package: &str, name: &str) -> Result<PathBuf> {
    let arguments = [
        "build",
        "--release",
        "--quiet",
        "-p",
        package,
        "--example",
        name,
    ];
    let built = workspace::cargo(&arguments).status()?;
    ensure!(built.success(), "the bench {name} does not build");
    Ok(workspace::output(Profile::Release)
        .join("examples")
        .join(name))
}

/// Prints nanoseconds per request of files, and requests per second of the devices.
pub fn run() -> Result<()> {
    for (package, name) in [
        ("vmm-plugin-file", "engines"),
        ("vmm-plugin-overlay", "warm_reads"),
    ] {
        let program = example(package, name)?;
        for folder in [workspace::target().as_path(), Path::new("/dev/shm")] {
            println!("{name} in {}:", folder.display());
            let status = Command::new(&program).arg(folder).status()?;
            ensure!(status.success(), "the bench {name} has failed: {status}");
        }
    }
    for (package, name) in [
        ("vmm-plugin-virtio-block", "virtio_depths"),
        ("vmm-plugin-nvme", "depths"),
    ] {
        println!("{name}, {package} on a disk in memory:");
        let status = Command::new(example(package, name)?).status()?;
        ensure!(status.success(), "the bench {name} has failed: {status}");
    }
    Ok(())
}

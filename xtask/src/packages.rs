//! Debian packages: installed where a tool must run on this machine, unpacked into `target`
//! where only their files are wanted.

use crate::process;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(900);

/// Where a program is on the search path.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Not on an ordinary user's path, but where Debian has mke2fs.
    let more = [PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")];
    std::env::split_paths(&path)
        .chain(more)
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}

/// The path of a program, after installing the package that has it if it is missing.
pub fn program(name: &str, package: &str) -> Result<PathBuf> {
    if let Some(path) = find_program(name) {
        return Ok(path);
    }
    install(package)?;
    find_program(name).with_context(|| format!("Debian package {package} has no program {name}"))
}

/// Installs a package on this machine.
pub fn install(package: &str) -> Result<()> {
    println!("installing Debian package {package}");
    let root = rustix::process::geteuid().is_root();
    let install = |arguments: &[&str]| -> Result<process::Outcome> {
        let mut command = if root {
            Command::new("apt-get")
        } else {
            let mut sudo = Command::new("sudo");
            sudo.args(["-n", "apt-get"]);
            sudo
        };
        process::bounded(
            command
                .args(arguments)
                .env("DEBIAN_FRONTEND", "noninteractive"),
            PATIENCE,
            false,
        )
    };
    let arguments = ["install", "-y", "--no-install-recommends", package];
    let mut outcome = install(&arguments)?;
    if outcome.code() != Some(0) {
        // A fresh machine has no package lists yet.
        install(&["update"])?;
        outcome = install(&arguments)?;
    }
    if outcome.code() != Some(0) {
        bail!(
            "`apt-get install {package}` did not work ({}); install it, or run this as root or with passwordless sudo:\n{}",
            outcome.ending(),
            outcome.tail(10)
        );
    }
    Ok(())
}

fn run_apt(arguments: &[&str], directory: &Path) -> Result<process::Outcome> {
    process::bounded(
        Command::new("apt-get")
            .args(arguments)
            .current_dir(directory),
        PATIENCE,
        false,
    )
    .context("this needs a Debian system with apt-get")
}

/// The package that a meta package such as linux-image-cloud-amd64 stands for.
pub fn dependency(package: &str, prefix: &str) -> Result<String> {
    for attempt in 0..2 {
        let outcome = process::bounded(
            Command::new("apt-cache").args(["depends", package]),
            PATIENCE,
            false,
        )
        .context("this needs a Debian system with apt-cache")?;
        let found = outcome
            .output
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with(prefix));
        if let Some(name) = found {
            return Ok(name.to_owned());
        }
        if attempt == 0 {
            update()?;
        }
    }
    bail!("apt-cache knows no package {prefix}* that {package} depends on; run `apt-get update`")
}

fn update() -> Result<()> {
    let root = rustix::process::geteuid().is_root();
    let mut command = Command::new(if root { "apt-get" } else { "sudo" });
    if !root {
        command.args(["-n", "apt-get"]);
    }
    let outcome = process::bounded(command.arg("update"), PATIENCE, false)?;
    if outcome.code() != Some(0) {
        bail!("apt-get update: {}\n{}", outcome.ending(), outcome.tail(10));
    }
    Ok(())
}

/// Unpacks packages into a directory of their own, without installing them. What is there from
/// an earlier run is kept.
pub fn unpack(packages: &[&str], into: &Path) -> Result<()> {
    let done = into.join(".unpacked");
    let wanted = packages.join(" ");
    if std::fs::read_to_string(&done).is_ok_and(|text| text == wanted) {
        return Ok(());
    }
    println!("downloading Debian packages {wanted}");
    let download = into.with_extension("download");
    for directory in [into, &download] {
        if directory.exists() {
            std::fs::remove_dir_all(directory)
                .with_context(|| format!("cannot clear {}", directory.display()))?;
        }
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
    }
    let mut arguments = vec!["download"];
    arguments.extend(packages);
    let mut outcome = run_apt(&arguments, &download)?;
    if outcome.code() != Some(0) {
        update()?;
        outcome = run_apt(&arguments, &download)?;
    }
    if outcome.code() != Some(0) {
        bail!(
            "apt-get download {wanted}: {}\n{}",
            outcome.ending(),
            outcome.tail(10)
        );
    }
    for entry in std::fs::read_dir(&download)? {
        let file = entry?.path();
        let outcome = process::bounded(
            Command::new("dpkg-deb").arg("-x").arg(&file).arg(into),
            PATIENCE,
            false,
        )?;
        if outcome.code() != Some(0) {
            bail!(
                "dpkg-deb -x {}: {}\n{}",
                file.display(),
                outcome.ending(),
                outcome.tail(10)
            );
        }
    }
    std::fs::remove_dir_all(&download)?;
    std::fs::write(&done, wanted).with_context(|| format!("cannot write {}", done.display()))
}

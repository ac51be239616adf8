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

/// Gets the package lists anew.
pub fn update() -> Result<()> {
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
    once(&packages.join(" "), into, |download| {
        let mut arguments = vec!["download"];
        arguments.extend(packages);
        let mut outcome = run_apt(&arguments, download)?;
        if outcome.code() != Some(0) {
            update()?;
            outcome = run_apt(&arguments, download)?;
        }
        Ok(outcome)
    })
}

/// Unpacks a package of another Debian release, with all that it needs to run, into a directory of
/// its own. Neither this machine's packages nor its lists change.
pub fn unpack_of_release(release: &str, package: &str, into: &Path) -> Result<()> {
    once(&format!("{package} of {release}"), into, |download| {
        let archive = archive()?;
        for directory in ["state/lists/partial", "archives/partial"] {
            std::fs::create_dir_all(download.join(directory))?;
        }
        // Nothing counts as installed, so that everything comes.
        std::fs::write(download.join("status"), "")?;
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        std::fs::write(
            download.join("sources"),
            format!("deb [signed-by={keys}] {archive} {release} main\n"),
        )?;
        let place = |key: &str, name: &str| format!("{key}={}", download.join(name).display());
        let options = [
            place("Dir::State", "state"),
            place("Dir::State::status", "status"),
            place("Dir::Cache", "."),
            place("Dir::Cache::archives", "archives"),
            place("Dir::Etc::sourcelist", "sources"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "Debug::NoLocking=1".to_owned(),
            format!("APT::Sandbox::User={}", user()),
        ];
        let mut base: Vec<&str> = Vec::new();
        for option in &options {
            base.extend(["-o", option.as_str()]);
        }
        let outcome = run_apt(&[base.as_slice(), &["update"]].concat(), download)?;
        if outcome.code() != Some(0) {
            return Ok(outcome);
        }
        base.extend(["install", "--yes", "--download-only"]);
        base.extend(["--no-install-recommends", package]);
        run_apt(&base, download)
    })
}

/// Who downloads: apt gives root's downloads to a user of its own, who may not write here.
fn user() -> &'static str {
    match rustix::process::geteuid().is_root() {
        true => "root",
        false => "",
    }
}

/// Where this machine gets Debian's packages from.
fn archive() -> Result<String> {
    let outcome = process::bounded(
        Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(LABEL) $(COMPONENT)",
            "Created-By: Packages",
        ]),
        PATIENCE,
        false,
    )
    .context("this needs a Debian system with apt-get")?;
    let found = outcome
        .output
        .lines()
        .find_map(|line| line.strip_suffix(" Debian main"));
    found
        .map(str::to_owned)
        .context("apt-get knows no archive of Debian; run `apt-get update`")
}

/// Has `fetch` download packages below a directory, and unpacks them, unless that is done.
fn once(
    wanted: &str,
    into: &Path,
    fetch: impl FnOnce(&Path) -> Result<process::Outcome>,
) -> Result<()> {
    let done = into.join(".unpacked");
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
    let outcome = fetch(&download)?;
    if outcome.code() != Some(0) {
        bail!(
            "apt-get did not download {wanted}: {}\n{}",
            outcome.ending(),
            outcome.tail(10)
        );
    }
    let mut count = 0;
    for directory in [&download, &download.join("archives")] {
        for entry in std::fs::read_dir(directory).into_iter().flatten() {
            let file = entry?.path();
            if file.extension().is_some_and(|name| name == "deb") {
                extract(&file, into)?;
                count += 1;
            }
        }
    }
    if count == 0 {
        bail!("apt-get downloaded nothing for {wanted}");
    }
    std::fs::remove_dir_all(&download)?;
    std::fs::write(&done, wanted).with_context(|| format!("cannot write {}", done.display()))
}

fn extract(package: &Path, into: &Path) -> Result<()> {
    let outcome = process::bounded(
        Command::new("dpkg-deb").arg("-x").arg(package).arg(into),
        PATIENCE,
        false,
    )?;
    if outcome.code() != Some(0) {
        bail!(
            "dpkg-deb -x {}: {}\n{}",
            package.display(),
            outcome.ending(),
            outcome.tail(10)
        );
    }
    Ok(())
}

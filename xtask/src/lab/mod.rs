//! The lab: unmodified Debian kernels under vmm-host, on any machine.
//!
//! Where /dev/kvm runs kernels the VMs run on it directly. Elsewhere they run in *level 1*, a
//! Debian kernel under QEMU's TCG with emulated SVM, whose /dev/kvm is real. `tests/lab/README.md`
//! describes the jobs. Everything is made from Debian packages below `target/lab`.

mod cd;
pub mod cpio;
mod debian;
mod direct;
mod esp;
mod fio;
mod fwts;
mod images;
mod job;
mod keyboard;
mod lanes;
pub mod level1;
mod reference;

use crate::report::Report;
use crate::workspace::Profile;
use crate::{kvm, workspace};
use anyhow::{Result, bail};
use clap::Subcommand;
pub use images::{Lab, needed_libraries};
pub use job::Job;
use std::path::PathBuf;

/// Arguments of `cargo xtask lab`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Use the release build
    #[arg(long, global = true)]
    release: bool,
    /// Use level 1 although this machine's KVM runs kernels
    #[arg(long, global = true)]
    level1: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Run every job (the default)
    Test,
    /// Boot a Debian guest and give its shell
    Shell,
    /// Run the named jobs of tests/lab and show their console
    Run {
        /// Names without .toml or .sh
        #[arg(required = true)]
        names: Vec<String>,
        /// Let level 1's clock count executed instructions, so that timings repeat (one processor)
        #[arg(long)]
        icount: bool,
    },
    /// Boot the same kernel and disk under QEMU's own devices, for comparison
    Reference,
}

/// Where the jobs are.
fn directory() -> PathBuf {
    workspace::root().join("tests/lab")
}

/// What level 1 is for this run.
#[derive(Clone, Copy)]
pub struct Mode {
    /// Show the console while it runs.
    pub show: bool,
    /// Count instructions instead of time.
    pub icount: bool,
    /// Use level 1 even where it is not needed.
    pub level1: bool,
}

/// Runs the command; true if everything passed.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let profile = if arguments.release {
        Profile::Release
    } else {
        Profile::Debug
    };
    let mut mode = Mode {
        show: false,
        icount: false,
        level1: arguments.level1,
    };
    if let Some(Command::Reference) = arguments.command {
        reference::run(&Lab::prepare_guest()?, true)?;
        return Ok(true);
    }
    workspace::build(profile)?;
    let mut report = Report::default();
    match &arguments.command {
        None | Some(Command::Test) => test(profile, &mut report)?,
        Some(Command::Shell) => return shell(profile, arguments.level1),
        Some(Command::Run { names, icount }) => {
            mode.show = true;
            mode.icount = *icount;
            let mut jobs = Vec::new();
            for name in names {
                jobs.push(Job::load(&directory(), name)?);
            }
            run_jobs(&Lab::prepare(profile)?, &jobs, mode, &mut report)?;
        }
        Some(Command::Reference) => {}
    }
    Ok(report.close())
}

/// Runs every job that is a test.
pub fn test(profile: Profile, report: &mut Report) -> Result<()> {
    let jobs: Vec<Job> = Job::all(&directory())?
        .into_iter()
        .filter(|job| !job.interactive)
        .collect();
    if jobs.is_empty() {
        bail!("{} has no jobs", directory().display());
    }
    let lab = Lab::prepare(profile)?;
    report.record(
        "lab: the guest's own checks pass under QEMU's devices",
        reference::run(&lab, false),
    );
    let mode = Mode {
        show: false,
        icount: false,
        level1: false,
    };
    run_jobs(&lab, &jobs, mode, report)
}

fn run_jobs(lab: &Lab, jobs: &[Job], mode: Mode, report: &mut Report) -> Result<()> {
    let mut jobs: Vec<&Job> = jobs.iter().collect();
    if let Err(why) = debian::possible() {
        for job in jobs.extract_if(.., |job| job.disks) {
            report.skip(&format!("lab: {}", job.name), &why);
        }
    }
    let disks = match jobs.iter().any(|job| job.disks) {
        true => Some(debian::prepare(&lab.directory)?),
        false => None,
    };
    let direct = if mode.level1 || mode.icount {
        Err("level 1 was asked for".to_owned())
    } else {
        kvm::runs_kernels()
    };
    let (direct, inside): (Vec<&Job>, Vec<&Job>) = match direct {
        // Scripts are written for level 1's file tree.
        Ok(()) => jobs.into_iter().partition(|job| !job.script),
        Err(why) => {
            println!("level 1 runs the jobs: {why}");
            (Vec::new(), jobs)
        }
    };
    for job in direct {
        direct::run(lab, job, disks.as_ref(), mode.show, report)?;
    }
    if inside.is_empty() {
        return Ok(());
    }
    lanes::run(lab, &inside, disks.as_ref(), mode, report)
}

/// Runs one job with its console shown.
pub fn show(profile: Profile, name: &str) -> Result<bool> {
    let mut report = Report::default();
    let job = Job::load(&directory(), name)?;
    let mode = Mode {
        show: true,
        icount: false,
        level1: false,
    };
    run_jobs(&Lab::prepare(profile)?, &[job], mode, &mut report)?;
    Ok(report.close())
}

/// Boots the guest with the terminal attached. Returns whether the guest powered off.
pub fn shell(profile: Profile, level1: bool) -> Result<bool> {
    let lab = Lab::prepare(profile)?;
    let job = Job::load(&directory(), "shell")?;
    if !level1 && kvm::runs_kernels().is_ok() {
        direct::interactive(&lab, &job)
    } else {
        level1::interactive(&lab, &job)
    }
}

//! VMs on this machine's own /dev/kvm.

use super::debian::Disks;
use super::{Job, Lab};
use crate::report::Report;
use crate::{process, workspace};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// A directory with the VM file and what it names; the command that runs it there.
fn stage(lab: &Lab, job: &Job, disks: Option<&Disks>) -> Result<(PathBuf, Command)> {
    let directory = lab.directory.join("direct");
    std::fs::create_dir_all(&directory)?;
    lab.stage_guest(&directory)?;
    if let Some(disks) = disks.filter(|_| job.disks) {
        for (from, to) in disks.named() {
            std::fs::copy(from, directory.join(to))?;
        }
    }
    let file = directory.join(job.file.file_name().context("a job without a name")?);
    std::fs::copy(&job.file, &file)?;
    let mut command = Command::new(match job.emulated {
        true => workspace::emulated_host(lab.profile),
        false => workspace::host(lab.profile),
    });
    command.arg(&file).current_dir(&directory);
    Ok((file, command))
}

/// Runs one VM file and judges it.
pub fn run(
    lab: &Lab,
    job: &Job,
    disks: Option<&Disks>,
    show: bool,
    report: &mut Report,
) -> Result<()> {
    let (_, mut command) = stage(lab, job, disks)?;
    let outcome = process::bounded(&mut command, job.limit, show)?;
    job.judge(&outcome.output, outcome.code(), false, report);
    Ok(())
}

/// Runs one VM file with the terminal attached.
pub fn interactive(lab: &Lab, job: &Job) -> Result<bool> {
    let (_, mut command) = stage(lab, job, None)?;
    Ok(command.status().context("cannot run vmm-host")?.success())
}

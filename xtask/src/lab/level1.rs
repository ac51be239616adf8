//! Level 1: a Debian kernel under QEMU's TCG, with SVM emulated and so a real /dev/kvm inside.

use super::debian::Disks;
use super::{Job, Lab, Mode};
use crate::packages;
use crate::process::{self, Outcome, Running};
use crate::report::Report;
use anyhow::{Context, Result, bail};
use std::process::Command;
use std::time::{Duration, Instant};

/// What level 1 itself may take beside its jobs.
const OVERHEAD: Duration = Duration::from_secs(180);
/// Without XSAVE: the emulated SVM does not hand a guest's XSETBV to KVM, so that KVM shows the
/// guest a size of the state (CPUID leaf 13) that does not match, and its kernel complains. What needs XSAVE goes with it.
const CPU: &str = "max,xsave=off,avx=off,avx2=off";
const KERNEL_LINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1";

/// QEMU as level 1's machine, without anything to boot. `icount`: its clock counts executed instructions, so that timings
/// repeat on a busy machine.
pub fn machine(icount: bool, cpu: &str, mib: u32) -> Result<Command> {
    let mut command = Command::new(packages::program("qemu-system-x86_64", "qemu-system-x86")?);
    if icount {
        command.args(["-accel", "tcg,thread=single", "-smp", "1"]);
        command.args(["-icount", "shift=0,sleep=off"]);
    } else {
        command.args(["-accel", "tcg,thread=multi", "-smp", "2"]);
    }
    command.args(["-machine", "pc", "-cpu", cpu, "-m", &mib.to_string()]);
    command.args(["-no-reboot", "-nic", "none"]);
    Ok(command)
}

/// Waits for the end of level 1, of its time, or of its kernel: it kills a job whose time is up and says so, and one that says nothing
/// for longer than that has itself come to a stop.
fn kill_when_silent(running: &mut Running, jobs: &[&Job], limit: Duration) -> Result<()> {
    let (start, mut heard, mut written) = (Instant::now(), Instant::now(), 0);
    while !running.ended() && start.elapsed() <= limit {
        std::thread::sleep(Duration::from_millis(100));
        if running.written() != written {
            (heard, written) = (Instant::now(), running.written());
        }
        if heard.elapsed() < OVERHEAD {
            continue;
        }
        let output = running.output();
        let begun = output.rsplit_once("LAB-BEGIN ");
        let name = begun.and_then(|(_, rest)| rest.lines().next());
        let job = jobs.iter().find(|job| name == Some(job.name.as_str()));
        if heard.elapsed() > job.map_or(OVERHEAD, |job| job.limit + OVERHEAD) {
            println!(
                "level 1 says nothing any more in {}",
                name.unwrap_or("its start")
            );
            return running.kill();
        }
        // Each look copies all that was said.
        std::thread::sleep(Duration::from_secs(5));
    }
    Ok(())
}

fn qemu(lab: &Lab, jobs: &[&Job], disks: Option<&Disks>, icount: bool) -> Result<Command> {
    let mut command = machine(icount, CPU, 2048)?;
    let names: Vec<&str> = jobs.iter().map(|job| job.name.as_str()).collect();
    command
        .arg("-kernel")
        .arg(&lab.vmlinuz)
        .arg("-initrd")
        .arg(&lab.level1)
        .arg("-append")
        .arg(format!("{KERNEL_LINE} lab.job={}", names.join(",")));
    // In this order they are /dev/vda, /dev/vdb and /dev/vdc there. Nothing that is written lasts.
    for (number, (file, _)) in disks.iter().flat_map(|disks| disks.named()).enumerate() {
        command
            .arg("-drive")
            .arg(format!(
                "if=none,id=d{number},format=raw,snapshot=on,file={}",
                file.display()
            ))
            .arg("-device")
            .arg(format!(
                "virtio-blk-pci,drive=d{number},addr={}",
                8 + number
            ));
    }
    Ok(command)
}

/// How often level 1 may die in one and the same job before it counts as that job's fault.
const DEATHS: u32 = 4;
/// Exit code of a VM that had to be killed: 128 and the signal's number.
const KILLED: i32 = 137;

/// Runs jobs in one level 1, one after the other, and judges each. If level 1 dies, the jobs that have not ended are begun anew.
/// It says when it ends by itself, and nothing that runs in it can end it otherwise: a kernel that panics or resets without a
/// word, or a QEMU that aborts, is the emulation's fault. QEMU 7.2's SVM corrupts the stack of its kernel now and then.
pub fn run(
    lab: &Lab,
    jobs: &[&Job],
    disks: Option<&Disks>,
    mode: Mode,
    report: &mut Report,
) -> Result<()> {
    lab.level1_root()?;
    let mut waiting = jobs.to_vec();
    let mut deaths = 0;
    let mut stalled = false;
    while !waiting.is_empty() {
        let outcome = boot(lab, &waiting, disks, mode)?;
        // The emulation stalls now and then: what had to be killed gets a second chance.
        let code = |job: &&Job| job.part(&outcome.output).1;
        let begun_anew = |job: &&Job| code(job) == Some(KILLED) && !stalled;
        let ended = |job: &&Job| code(job).is_some() && !begun_anew(job);
        // One that had to be killed has not died.
        let died = outcome.status.is_some() && !outcome.output.contains("LAB-END");
        deaths = if waiting.iter().any(ended) {
            1
        } else {
            deaths + 1
        };
        let killed: Vec<&str> = waiting
            .iter()
            .copied()
            .filter(|job| begun_anew(job))
            .map(|job| job.name.as_str())
            .collect();
        let again = died && deaths < DEATHS || !killed.is_empty();
        for job in waiting.iter().filter(|job| !again || ended(job)) {
            let (console, code) = job.part(&outcome.output);
            job.judge(console, code, report);
        }
        if !again {
            break;
        }
        println!(
            "level 1 has died, or stalled in {killed:?}, which is the emulation's fault unless it happens again; last words:\n{}",
            outcome.tail(12)
        );
        waiting.retain(|job| !ended(job));
        stalled |= !killed.is_empty();
    }
    Ok(())
}

fn boot(lab: &Lab, jobs: &[&Job], disks: Option<&Disks>, mode: Mode) -> Result<Outcome> {
    let mut limit = OVERHEAD;
    for job in jobs {
        limit += job.limit;
    }
    let mut command = qemu(lab, jobs, disks, mode.icount)?;
    command.args(["-display", "none", "-serial", "stdio", "-monitor", "none"]);
    println!(
        "level 1 starts, at most {} s for {} jobs",
        limit.as_secs(),
        jobs.len()
    );
    let mut running = process::start(&mut command, mode.show)?;
    running.close_input();
    kill_when_silent(&mut running, jobs, limit)?;
    let outcome = running.finish(limit)?;
    println!(
        "level 1 ended after {:.0} s ({})",
        outcome.elapsed.as_secs_f64(),
        outcome.ending()
    );
    let said = |line: &&str| line.contains("LAB-ERROR");
    if let Some(error) = outcome.output.lines().find(said) {
        bail!("level 1: {}", error.trim_end());
    }
    Ok(outcome)
}

/// Runs one job with the terminal attached; QEMU's escape is Ctrl-A x.
pub fn interactive(lab: &Lab, job: &Job) -> Result<bool> {
    lab.level1_root()?;
    let mut command = qemu(lab, &[job], None, false)?;
    command.arg("-nographic");
    println!(
        "this machine's KVM runs no kernels: starting level 1 (about 15 s); Ctrl-A x ends everything"
    );
    Ok(command.status().context("cannot run QEMU")?.success())
}

/// Boots the guest's jobs under QEMU's own devices: shows the kernel's warnings there, and that
/// the checks themselves are right.
pub fn reference(lab: &Lab, show: bool) -> Result<()> {
    for job in ["check", "disks"] {
        let disk = lab.directory.join("reference.img");
        std::fs::copy(&lab.root, &disk).context("cannot copy the root disk")?;
        let scratch = lab.directory.join("reference-scratch.img");
        std::fs::File::create(&scratch)?.set_len(16 << 20)?;
        let mut command = Command::new(packages::program("qemu-system-x86_64", "qemu-system-x86")?);
        command
            .args([
                "-accel",
                "tcg",
                "-machine",
                "pc",
                "-m",
                "256",
                "-smp",
                "1",
                "-no-reboot",
            ])
            .args([
                "-nic", "none", "-display", "none", "-serial", "stdio", "-monitor", "none",
            ])
            .args(["-vga", "none", "-kernel"])
            .arg(&lab.vmlinuz)
            .arg("-initrd")
            .arg(&lab.initrd)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 root=/dev/vda rw panic=-1 lab.do={job} lab.cpus=1"
            ));
        for (slot, file, more) in [
            (4, &disk, ""),
            (5, &lab.vmlinuz, ",readonly=on"),
            (6, &scratch, ",discard=unmap"),
        ] {
            let file = file.display();
            command
                .arg("-drive")
                .arg(format!("if=none,id=d{slot},format=raw,file={file}{more}"));
            command
                .arg("-device")
                .arg(format!("virtio-blk-pci,drive=d{slot},addr={slot}"));
        }
        let outcome = process::bounded(&mut command, Duration::from_secs(120), show)?;
        if !outcome.output.contains("GUEST-DONE 0") {
            bail!(
                "{job}: {}; the end of its console:
{}",
                outcome.ending(),
                outcome.tail(40)
            );
        }
    }
    Ok(())
}

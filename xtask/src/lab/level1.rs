//! Level 1: a Debian kernel under QEMU's TCG, with SVM emulated and so a real /dev/kvm inside.

use super::debian::Disks;
use super::keyboard::Keyboard;
use super::{Job, Lab, Mode};
use crate::packages;
use crate::process::{self, Running};
use anyhow::{Context, Result, bail};
use std::process::Command;
use std::time::{Duration, Instant};

/// What level 1's own start may take.
const START: Duration = Duration::from_secs(180);
/// What a job may take beside its own limit: fresh disks, and a busy machine.
const GRACE: Duration = Duration::from_secs(60);
/// How often level 1's console is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// After so long without a word, and again and again, a key is pressed in case level 1's time stands still.
const NUDGE: Duration = Duration::from_secs(4);
/// Without XSAVE: the emulated SVM does not hand a guest's XSETBV to KVM, so that KVM shows the
/// guest a size of the state (CPUID leaf 13) that does not match, and its kernel complains. What needs XSAVE goes with it.
const CPU: &str = "max,xsave=off,avx=off,avx2=off";
const KERNEL_LINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1";

/// QEMU as level 1's machine, without anything to boot. It has one processor: several run side by side, one for each of this
/// machine's, which is faster than one that has them all, and QEMU 7.2's SVM fails less with one. `icount`: its clock counts
/// executed instructions, so that timings repeat on a busy machine.
pub fn machine(icount: bool, cpu: &str, mib: u32) -> Result<Command> {
    let mut command = Command::new(packages::program("qemu-system-x86_64", "qemu-system-x86")?);
    command.args(["-accel", "tcg,thread=single", "-smp", "1"]);
    if icount {
        command.args(["-icount", "shift=0,sleep=off"]);
    }
    command.args(["-machine", "pc", "-cpu", cpu, "-m", &mib.to_string()]);
    command.args(["-no-reboot", "-nic", "none"]);
    Ok(command)
}

/// Level 1 with the disks that firmware boots. Nothing that is written to them lasts.
fn qemu(lab: &Lab, disks: Option<&Disks>, icount: bool, more: &str) -> Result<Command> {
    let mut command = machine(icount, CPU, 2048)?;
    command
        .arg("-kernel")
        .arg(&lab.vmlinuz)
        .arg("-initrd")
        .arg(&lab.level1)
        .arg("-append")
        .arg(format!("{KERNEL_LINE}{more}"));
    // In this order they are /dev/vda, /dev/vdb and /dev/vdc there.
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

/// How a job came to its end in level 1.
pub enum End {
    /// By itself, with its console and exit code.
    Ended(String, i32),
    /// Its time was up, or it has said nothing for too long: its console so far. Level 1 has ended with it.
    Late(String),
    /// Level 1 died, which is the emulation's fault: it says when it ends by itself, and nothing that runs in it can end it
    /// otherwise. QEMU 7.2's SVM corrupts the stack of its kernel now and then. The last it said.
    Died(String),
}

/// Level 1 under way, which is told over its console what to run, one job after the other.
pub struct Level1 {
    running: Running,
    /// None where time is counted in instructions: it must not depend on ours.
    keyboard: Option<Keyboard>,
    /// How much of the console belongs to what came before.
    seen: usize,
}

impl Level1 {
    /// Starts it.
    pub fn start(lab: &Lab, disks: Option<&Disks>, mode: Mode) -> Result<Self> {
        let mut command = qemu(lab, disks, mode.icount, "")?;
        command.args(["-display", "none", "-serial", "stdio"]);
        let keyboard = if mode.icount {
            command.args(["-monitor", "none"]);
            None
        } else {
            Some(Keyboard::attach(&mut command)?)
        };
        let running = process::start(&mut command, mode.show)?;
        Ok(Level1 {
            running,
            keyboard,
            seen: 0,
        })
    }

    /// Waits for a text on the console; how it stands there then. False if level 1 ends before, the time does, or nothing new comes
    /// for `silence`.
    fn console_with(&mut self, text: &str, limit: Duration, silence: Duration) -> (bool, String) {
        let start = Instant::now();
        let (mut said, mut since) = (0, start);
        let mut nudged = start;
        loop {
            let over = self.running.ended() || start.elapsed() > limit || since.elapsed() > silence;
            if over {
                // What it wrote just before it ended may still be on its way.
                std::thread::sleep(LOOK);
            }
            let console = self.running.console(self.seen);
            if console.len() != said {
                (said, since) = (console.len(), Instant::now());
            }
            if since.max(nudged).elapsed() > NUDGE {
                nudged = Instant::now();
                // Where nobody listens, level 1 is on its way to or from life.
                let _ = self.keyboard.as_mut().map(Keyboard::press);
            }
            let there = console.contains(text);
            if there || over {
                return (there, console);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Runs a job to its end, or to `limit`.
    pub fn run(&mut self, job: &Job, limit: Duration) -> Result<End> {
        let (ready, console) = self.console_with("LAB-READY", START, START);
        let said = |line: &&str| line.contains("LAB-ERROR");
        if let Some(error) = console.lines().find(said) {
            bail!("level 1: {}", error.trim_end());
        }
        if !ready {
            return self.died(&console);
        }
        self.seen += console.len();
        self.running.send(format!("{}\n", job.name).as_bytes())?;
        let (ended, console) = self.console_with(
            &format!("LAB-EXIT {} ", job.name),
            limit.min(job.limit + GRACE),
            job.silence() + GRACE,
        );
        if !ended && self.running.ended() {
            return self.died(&console);
        }
        let (part, code) = job.part(&console);
        Ok(match code.filter(|_| ended) {
            Some(code) => End::Ended(part.to_owned(), code),
            None => {
                self.running.kill()?;
                End::Late(part.to_owned())
            }
        })
    }

    fn died(&mut self, console: &str) -> Result<End> {
        self.running.kill()?;
        Ok(End::Died(process::tail(console, 12)))
    }

    /// Ends it.
    pub fn end(mut self) -> Result<()> {
        self.running.kill()?;
        self.running.finish(START).map(drop)
    }
}

/// Runs one job with the terminal attached; QEMU's escape is Ctrl-A x.
pub fn interactive(lab: &Lab, job: &Job) -> Result<bool> {
    lab.level1_root()?;
    let mut command = qemu(lab, None, false, &format!(" lab.job={}", job.name))?;
    command.arg("-nographic");
    println!(
        "this machine's KVM runs no kernels: starting level 1 (about 15 s); Ctrl-A x ends everything"
    );
    Ok(command.status().context("cannot run QEMU")?.success())
}

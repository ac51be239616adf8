//! The self-test guest under vmm-host on this machine's /dev/kvm, and under QEMU, whose devices
//! nobody here wrote, so that the guest's own checks are checked.

use crate::process::{self, Outcome};
use crate::report::Report;
use crate::workspace::{self, Profile};
use crate::{kvm, packages};
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);
const DISK_SIZE: u64 = 16 << 20;

/// A VM file for the guest in a directory of its own.
struct Vm {
    directory: tempfile::TempDir,
    main: String,
    tables: String,
    cmdline: String,
    cpus: u32,
    memory: &'static str,
}

impl Vm {
    fn new(cmdline: &str) -> Result<Self> {
        Ok(Vm {
            directory: tempfile::tempdir().context("cannot make a temporary directory")?,
            main: String::new(),
            tables: String::new(),
            cmdline: cmdline.to_owned(),
            cpus: 1,
            memory: "64",
        })
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Another size than one processor and 64 MiB.
    fn size(mut self, cpus: u32, memory: &'static str) -> Self {
        (self.cpus, self.memory) = (cpus, memory);
        self
    }

    /// Adds a line to the main table.
    fn main(mut self, line: &str) -> Self {
        self.main.push_str(line);
        self.main.push('\n');
        self
    }

    /// Adds a disk at 0.SLOT.0 on a backend, given as the lines of its table.
    fn disk(mut self, slot: u32, backend: &str) -> Self {
        // Writing to a String can't fail.
        let _ = write!(
            self.tables,
            "[dev.disk{slot}]\ndriver = \"pci-virtio-block\"\npci-path = \"0.{slot}.0\"\nblock_dev = \"b{slot}\"\n\n[block_dev.b{slot}]\n{backend}\n\n"
        );
        self
    }

    /// Adds a disk on a new, empty file.
    fn file_disk(self, slot: u32, name: &str, more: &str) -> Result<Self> {
        fs::File::create(self.path().join(name))?.set_len(DISK_SIZE)?;
        let path = self.path().join(name);
        Ok(self.disk(
            slot,
            &format!("type = \"file\"\npath = \"{}\"\n{more}", path.display()),
        ))
    }

    fn command(&self) -> Result<Command> {
        let file = self.path().join("vm.toml");
        let text = format!(
            "[main]\nname = \"selftest\"\ncpus = {}\nmemory = {}\nkernel = \"builtin:selftest\"\ncmdline = \"{}\"\n{}\n[char_dev.ttya]\ntype = \"stdio\"\n\n{}",
            self.cpus, self.memory, self.cmdline, self.main, self.tables
        );
        fs::write(&file, text)?;
        let mut command = Command::new(workspace::host(Profile::Debug));
        command.arg(&file).current_dir(self.path());
        Ok(command)
    }

    fn start(&self) -> Result<process::Running> {
        process::start(&mut self.command()?, false)
    }

    fn run(&self) -> Result<Outcome> {
        process::bounded(&mut self.command()?, PATIENCE, false)
    }
}

fn expect(outcome: &Outcome, code: i32, texts: &[&str]) -> Result<()> {
    if outcome.code() != Some(code) {
        bail!(
            "{}, expected exit code {code}; its last output:\n{}",
            outcome.ending(),
            outcome.tail(40)
        );
    }
    for text in texts {
        if !outcome.output.contains(text) {
            bail!(
                "the output does not show {text:?}; its end:\n{}",
                outcome.tail(40)
            );
        }
    }
    Ok(())
}

fn signal(running: &process::Running, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(running.id()).context("the process has no id")?;
    kill_process(pid, signal).context("cannot send the signal")
}

/// Every check, with a disk, a read-only disk and a disk in memory.
fn checks(report: &mut Report) -> Result<()> {
    let vm = Vm::new("hello")?
        .main("exit_on_reboot = 1")
        .file_disk(4, "disk.img", "")?
        .file_disk(5, "keep.img", "read_only = true")?
        .disk(6, "type = \"mem-async\"\nsize = 16777216");
    let outcome = vm.run()?;
    let passed = outcome
        .output
        .lines()
        .filter(|line| line.starts_with("ok "))
        .count();
    for line in outcome
        .output
        .lines()
        .filter(|line| line.starts_with("skip "))
    {
        report.skip("self-test guest", line.trim_end());
    }
    report.add_passed(u32::try_from(passed)?);
    println!(
        "  {passed} checks passed in the guest, in {:.2} s",
        outcome.elapsed.as_secs_f64()
    );
    expect(&outcome, 0, &["PASS "])
}

/// Memory on both sides of the gap below 4 GiB, and two processors.
fn large() -> Result<()> {
    let vm = Vm::new("hello")?
        .size(2, "\"5G\"")
        .main("exit_on_reboot = 1")
        .file_disk(4, "disk.img", "")?;
    let texts = [
        "5119 MiB of memory",
        "up to 0x180000000 can be written",
        "MADT lists 2 processors",
        "PASS ",
    ];
    expect(&vm.run()?, 0, &texts)
}

fn ends(cmdline: &str, main: &str, code: i32, texts: &[&str]) -> Result<()> {
    expect(&Vm::new(cmdline)?.main(main).run()?, code, texts)
}

fn echo() -> Result<()> {
    let mut running = Vm::new("mode=echo")?.start_kept()?;
    ensure!(
        running.1.wait_for("ready", PATIENCE),
        "the guest does not start:\n{}",
        running.1.output()
    );
    running.1.send(b"hello there\rquit\r")?;
    expect(
        &running.1.finish(PATIENCE)?,
        0,
        &["echo hello there", "bye"],
    )
}

/// A paste larger than any buffer on its way arrives complete.
fn paste() -> Result<()> {
    const BYTES: usize = 128 * 1024;
    let mut running = Vm::new("mode=sum-input")?.start_kept()?;
    ensure!(
        running.1.wait_for("ready", PATIENCE),
        "the guest does not start:\n{}",
        running.1.output()
    );
    // Printable, so that neither an escape key nor the guest's end mark is among them.
    let mut bytes: Vec<u8> = (0..BYTES)
        .map(|i| b' ' + u8::try_from(i * 31 % 90).unwrap_or(0))
        .collect();
    let sum = bytes
        .iter()
        .fold(0u32, |sum, byte| sum.rotate_left(1) ^ u32::from(*byte));
    bytes.push(4);
    running.1.send(&bytes)?;
    let expected = format!("received {BYTES} bytes, sum {sum:#010x}");
    expect(&running.1.finish(PATIENCE)?, 0, &[&expected])
}

fn flood() -> Result<()> {
    let outcome = Vm::new("mode=flood bytes=200000")?.run()?;
    expect(&outcome, 0, &["end after "])?;
    let mut next = 0u64;
    for number in outcome
        .output
        .lines()
        .filter_map(|line| line.strip_prefix("line "))
    {
        let number: u64 = number
            .split(' ')
            .next()
            .unwrap_or_default()
            .parse()
            .context("a line is damaged")?;
        ensure!(number == next, "line {next} is missing, line {number} came");
        next += 1;
    }
    ensure!(
        outcome.output.contains(&format!("end after {next} lines")),
        "lines are missing at the end"
    );
    Ok(())
}

fn power_button() -> Result<()> {
    let mut running = Vm::new("mode=wait-power-button")?.start_kept()?;
    ensure!(
        running.1.wait_for("waiting", PATIENCE),
        "the guest does not start:\n{}",
        running.1.output()
    );
    signal(&running.1, Signal::TERM)?;
    expect(&running.1.finish(PATIENCE)?, 0, &["ok   power"])
}

/// A guest that ignores the power button is stopped by the second signal.
fn second_signal() -> Result<()> {
    let mut running = Vm::new("mode=hang")?.start_kept()?;
    ensure!(
        running.1.wait_for("hanging", PATIENCE),
        "the guest does not start:\n{}",
        running.1.output()
    );
    signal(&running.1, Signal::INT)?;
    std::thread::sleep(Duration::from_millis(300));
    signal(&running.1, Signal::INT)?;
    let outcome = running.1.finish(PATIENCE)?;
    ensure!(
        outcome.code().is_some(),
        "{}:\n{}",
        outcome.ending(),
        outcome.tail(20)
    );
    Ok(())
}

/// What a flush has acknowledged is on the disk after the host was killed.
fn durable() -> Result<()> {
    let vm = Vm::new("mode=journal")?.file_disk(4, "disk.img", "")?;
    let mut running = vm.start()?;
    ensure!(
        running.wait_for("durable 20", PATIENCE),
        "the guest does not write:\n{}",
        running.output()
    );
    signal(&running, Signal::KILL)?;
    let outcome = running.finish(PATIENCE)?;
    let durable: Vec<u64> = outcome
        .output
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .filter_map(|line| line.trim_end().strip_prefix("durable ")?.parse().ok())
        .collect();
    let image = fs::read(vm.path().join("disk.img"))?;
    for number in &durable {
        let at = usize::try_from(*number)? * 512;
        ensure!(
            image.get(at..at + 8) == Some(number.to_le_bytes().as_slice()),
            "sector {number} was acknowledged and is not on the disk"
        );
    }
    ensure!(
        durable.len() >= 20,
        "only {} sectors were written",
        durable.len()
    );
    Ok(())
}

/// A disk image whose file system is full: the guest sees I/O errors, the host lives.
fn full_disk(report: &mut Report) {
    const NAME: &str = "guest: a full file system is an I/O error in the guest";
    let run = || -> Result<Option<Outcome>> {
        let vm = Vm::new("mode=fill")?;
        let mount = vm.path().join("small");
        fs::create_dir(&mount)?;
        let image = mount.join("disk.img");
        let vm = vm.disk(
            4,
            &format!("type = \"file\"\npath = \"{}\"", image.display()),
        );
        let inner = vm.command()?;
        let file = inner.get_args().next().unwrap_or_default();
        // A mount of our own that ends with the process; root or a user namespace may make it.
        let mut command = Command::new("unshare");
        command.args(if rustix::process::geteuid().is_root() {
            ["-m"].as_slice()
        } else {
            &["-r", "-m"]
        });
        command.args(["sh", "-c"]);
        command.arg("mount -t tmpfs -o size=4m small \"$1\" || exit 77; truncate -s 16M \"$1/disk.img\"; exec \"$2\" \"$3\"");
        command
            .arg("sh")
            .arg(&mount)
            .arg(inner.get_program())
            .arg(file)
            .current_dir(vm.path());
        let outcome = process::bounded(&mut command, PATIENCE, false)?;
        Ok(
            (outcome.code() != Some(77) && !outcome.output.contains("unshare failed"))
                .then_some(outcome),
        )
    };
    match run() {
        Ok(None) => report.skip(NAME, "this user may not mount a small file system"),
        Ok(Some(outcome)) => {
            let told = outcome
                .output
                .lines()
                .find(|line| line.starts_with("fill: "))
                .unwrap_or_default()
                .to_owned();
            let result = expect(&outcome, 0, &["fill: "]).and_then(|()| {
                ensure!(
                    !told.contains(" 0 errors") && !told.contains(" 0 written"),
                    "the guest says {told:?}"
                );
                Ok(())
            });
            report.record(NAME, result);
        }
        Err(error) => report.fail(NAME, &format!("{error:#}")),
    }
}

/// An exit that the hypervisor can't handle is told in words, with registers.
fn bad_jump() -> Result<()> {
    let outcome = Vm::new("mode=bad-jump")?.main("exit_on_reboot = 1").run()?;
    ensure!(
        outcome.code().is_some_and(|code| code != 0),
        "{}:\n{}",
        outcome.ending(),
        outcome.tail(30)
    );
    let told = outcome.output.to_lowercase();
    ensure!(
        told.contains("rip") || told.contains("exception"),
        "no register is shown:\n{}",
        outcome.tail(30)
    );
    Ok(())
}

impl Vm {
    /// Starts it and keeps its directory as long as it runs.
    fn start_kept(self) -> Result<(Self, process::Running)> {
        let running = self.start()?;
        Ok((self, running))
    }
}

/// The guest under QEMU's own devices, on a board.
fn oracle(board: &str, memory: &str) -> Result<Outcome> {
    let directory = tempfile::tempdir()?;
    let image = directory.path().join("selftest.elf");
    fs::write(&image, vmm_selftest::IMAGE)?;
    let mut command = Command::new(packages::program("qemu-system-x86_64", "qemu-system-x86")?);
    command
        .args([
            "-machine",
            board,
            "-accel",
            "tcg",
            "-m",
            memory,
            "-display",
            "none",
            "-no-reboot",
            "-nic",
            "none",
        ])
        .args([
            "-vga", "none", "-serial", "stdio", "-monitor", "none", "-append", "hello", "-kernel",
        ])
        .arg(&image);
    for (name, more, device) in [
        ("disk", "discard=unmap", "num-queues=2"),
        ("ro", "readonly=on", "serial=ro"),
    ] {
        let path = directory.path().join(name);
        fs::File::create(&path)?.set_len(DISK_SIZE)?;
        command.arg("-drive").arg(format!(
            "if=none,id={name},format=raw,{more},file={}",
            path.display()
        ));
        command.arg("-device").arg(format!(
            "virtio-blk-pci,disable-legacy=on,drive={name},{device}"
        ));
    }
    process::bounded(&mut command, PATIENCE, false)
}

/// A test by name.
type Case = (&'static str, fn() -> Result<()>);

/// Runs everything that this machine can.
pub fn test(report: &mut Report) {
    for (board, memory) in [("pc", "256"), ("q35", "5120")] {
        let name = format!("self-test guest under QEMU's own {board} board");
        match oracle(board, memory) {
            Ok(outcome) => report.record(&name, expect(&outcome, 0, &["PASS "])),
            Err(error) => report.skip(&name, &format!("{error:#}")),
        }
    }
    if let Err(why) = kvm::usable() {
        report.skip("self-test guest under vmm-host", &why);
        return;
    }
    let result = checks(report);
    report.record("guest: every check", result);
    let cases: [Case; 15] = [
        ("guest: 5 GiB of memory and two processors", large),
        ("guest: power off ends with exit_on_halt", || {
            ends("mode=poweroff", "exit_on_halt = 5", 5, &["vmm-selftest"])
        }),
        ("guest: reset by 0xcf9 ends with exit_on_reboot", || {
            ends("mode=reboot", "exit_on_reboot = 9", 9, &[])
        }),
        ("guest: reset by the keyboard controller", || {
            ends("mode=reboot-ps2", "exit_on_reboot = 9", 9, &[])
        }),
        ("guest: triple fault ends with exit_on_reboot", || {
            ends("mode=triple-fault", "exit_on_reboot = 9", 9, &[])
        }),
        ("guest: halting for good ends with exit_on_halt", || {
            ends("mode=halt", "exit_on_halt = 5", 5, &[])
        }),
        ("guest: reboots in place", || {
            ends("mode=reboot-once", "", 0, &["first boot", "second boot"])
        }),
        ("guest: a failed check ends with exit_on_reboot", || {
            ends("mode=nonsense", "exit_on_reboot = 3", 3, &["FAIL mode"])
        }),
        ("guest: an exit nobody can handle is explained", bad_jump),
        ("guest: console input and output", echo),
        ("guest: a paste of 128 KiB arrives complete", paste),
        ("guest: a flood of output arrives complete", flood),
        ("guest: SIGTERM is the power button", power_button),
        ("guest: a second signal stops at once", second_signal),
        ("guest: flushed writes survive kill -9 of the host", durable),
    ];
    for (name, case) in cases {
        report.record(name, case());
    }
    full_disk(report);
}

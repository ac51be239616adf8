//! A guest's disk under vmm-host and under QEMU's virtio-blk, on the same file, in level 1 of the lab.
//!
//! Level 1's clock counts executed instructions (`-icount`), so figures are work per request, on one processor, and repeat
//! to about a percent on a busy machine. The image lies in level 1's memory: neither side waits for a real disk.

use crate::lab::{Lab, cpio, needed_libraries};
use crate::workspace::Profile;
use crate::{packages, process, workspace};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(1500);
/// Where QEMU's firmware files are in Debian, and which a `pc` machine with a direct kernel wants.
const FIRMWARE: [&str; 3] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
];

/// Prints requests per second of both, and their ratio.
pub fn run() -> Result<()> {
    let lab = Lab::prepare(Profile::Release)?;
    lab.level1_root()?;
    let initrd = level1(&lab)?;
    let hosts = std::env::var("VMM_BENCH_HOSTS").unwrap_or_else(|_| "qemu,vmm-host".into());
    let scale = std::env::var("VMM_BENCH_SCALE").unwrap_or_else(|_| "1".into());
    let mut command = Command::new(packages::program("qemu-system-x86_64", "qemu-system-x86")?);
    command
        .args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"])
        .args(["-machine", "pc", "-cpu", "max,xsave=off", "-m", "3072", "-no-reboot", "-nic", "none"])
        .args(["-display", "none", "-serial", "stdio", "-monitor", "none"])
        .arg("-kernel")
        .arg(&lab.vmlinuz)
        .arg("-initrd")
        .arg(&initrd)
        .arg("-append")
        .arg(format!(
            "console=ttyS0 quiet loglevel=3 panic=-1 lab.job=disk-bench bench.hosts={hosts} bench.scale={scale}"
        ));
    println!("level 1 starts, at most {} s", LIMIT.as_secs());
    let outcome = process::bounded(&mut command, LIMIT, false)?;
    print(&outcome.output);
    let errors: Vec<&str> = outcome
        .output
        .lines()
        .filter(|l| l.contains("-ERROR"))
        .collect();
    ensure!(
        errors.is_empty() && outcome.output.contains("LAB-END"),
        "the bench has not run to its end ({}):\n{}\n{}",
        outcome.ending(),
        errors.join("\n"),
        outcome.tail(30)
    );
    Ok(())
}

/// The figures of each host by name of the measurement.
fn print(console: &str) {
    let mut figures: BTreeMap<&str, BTreeMap<&str, Vec<f64>>> = BTreeMap::new();
    let mut host = "";
    for line in console.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["BENCH-HOST", name, ..] => host = name,
            ["BENCH", name, figure] => {
                if let Ok(figure) = figure.parse() {
                    figures
                        .entry(name)
                        .or_default()
                        .entry(host)
                        .or_default()
                        .push(figure);
                }
            }
            _ => {}
        }
    }
    for (name, hosts) in figures.iter().filter(|(name, _)| **name != "warm-up") {
        let list: Vec<String> = hosts
            .iter()
            .map(|(host, runs)| format!("{host} {runs:.0?}"))
            .collect();
        let best = |host: &str| {
            hosts
                .get(host)
                .and_then(|runs| runs.iter().copied().reduce(f64::max))
        };
        let ratio = best("vmm-host")
            .zip(best("qemu"))
            .map_or(String::new(), |(a, b)| format!("; {:.2} times", a / b));
        println!("{name}: {} per second{ratio}", list.join(", "));
    }
}

/// A program with its libraries.
fn add_program(program: &Path, tree: &Path, into: &str) -> Result<()> {
    let mut files: Vec<(PathBuf, PathBuf)> = Vec::new();
    let name = program.file_name().context("a program without a name")?;
    files.push((program.to_owned(), tree.join(into).join(name)));
    for library in needed_libraries(program)? {
        let inside = tree.join(library.strip_prefix("/").unwrap_or(&library));
        files.push((library, inside));
    }
    for (from, to) in files {
        add(&from, &to)?;
    }
    Ok(())
}

fn add(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().unwrap_or(to))?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// An initial root of `base` and what `tree` adds: the kernel unpacks archives one after the other.
fn with(base: &Path, tree: &Path, archive: &Path) -> Result<()> {
    let more = archive.with_extension("more");
    cpio::write(tree, &more)?;
    let mut whole = fs::read(base).with_context(|| format!("cannot read {}", base.display()))?;
    whole.extend(fs::read(&more)?);
    fs::remove_file(more)?;
    fs::write(archive, whole).with_context(|| format!("cannot write {}", archive.display()))
}

/// Level 1's initial root with the bench in it.
fn level1(lab: &Lab) -> Result<PathBuf> {
    let source = workspace::root().join("tests/lab/bench");
    let directory = lab.directory.join("bench");
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    let guest = directory.join("guest");
    add(&source.join("guest-init"), &guest.join("init"))?;
    add_program(&packages::program("fio", "fio")?, &guest, "usr/bin")?;
    let tree = directory.join("level1");
    fs::create_dir_all(tree.join("lab/bench"))?;
    with(&lab.initrd, &guest, &tree.join("lab/bench/initrd"))?;
    add(&source.join("level1.sh"), &tree.join("lab/disk-bench.sh"))?;
    add(&source.join("disk.toml"), &tree.join("lab/bench/disk.toml"))?;
    add_program(
        &packages::program("qemu-system-x86_64", "qemu-system-x86")?,
        &tree,
        "lab/bin",
    )?;
    for file in FIRMWARE {
        let name = Path::new(file).file_name().unwrap_or_default();
        add(Path::new(file), &tree.join("lab/bench/firmware").join(name))?;
    }
    let archive = directory.join("initrd");
    with(&lab.level1, &tree, &archive)?;
    Ok(archive)
}

//! A guest's disk under vmm-host, virtio, NVMe and virtio through an overlay that has nothing, and under QEMU's virtio-blk, on the same
//! file, in level 1 of the lab.
//!
//! Level 1's clock counts executed instructions (`-icount`), so figures are work per request, on one processor, and repeat
//! to about a percent on a busy machine. The image lies in level 1's memory: neither side waits for a real disk.

use super::boots::{self, Figures, Test};
use crate::lab::{Lab, cpio, level1, needed_libraries};
use crate::workspace::Profile;
use crate::{packages, workspace};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// For one host.
const LIMIT: Duration = Duration::from_secs(420);
/// vmm-host's virtio and NVMe disks, its virtio disk through an overlay, and QEMU's virtio disk.
const HOSTS: [&str; 4] = ["vmm-host", "vmm-host-nvme", "vmm-host-overlay", PEER];
const PEER: &str = "qemu";
/// Which of them to measure, instead of all.
const CHOICE: &str = "VMM_BENCH_DISKS";
/// Where QEMU's firmware files are in Debian, and which a `pc` machine with a direct kernel wants.
const FIRMWARE: [&str; 3] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
];
/// First in every boot: what touches the guest's memory for the first time, and what fio costs without requests. That one
/// comes twice, because its own first run is dearer; the second counts.
const ALWAYS: [Test; 3] = [
    Test {
        name: "warm-up",
        fio: "read:128k:libaio:8:400",
    },
    Test {
        name: START_UP,
        fio: "randread:4k:libaio:1:1",
    },
    Test {
        name: START_UP,
        fio: "randread:4k:libaio:1:1",
    },
];
const START_UP: &str = "start-up";
/// Reads first: an overlay is to have nothing then.
const TESTS: [Test; 5] = [
    Test {
        name: "4k random read, depth 1",
        fio: "randread:4k:psync:1:2000",
    },
    Test {
        name: "4k random read, depth 32",
        fio: "randread:4k:libaio:32:4000",
    },
    Test {
        name: "128k read, depth 8",
        fio: "read:128k:libaio:8:1000",
    },
    Test {
        name: "4k random write, depth 1",
        fio: "randwrite:4k:psync:1:2000",
    },
    Test {
        name: "4k random write, depth 32",
        fio: "randwrite:4k:libaio:32:4000",
    },
];

/// Prints requests per second of all, their ratios to QEMU's, and exits for each request.
pub fn run() -> Result<()> {
    let chosen = std::env::var(CHOICE).unwrap_or_else(|_| HOSTS.join(","));
    let chosen: Vec<&str> = chosen.split(',').collect();
    for host in &chosen {
        ensure!(
            HOSTS.contains(host),
            "{CHOICE}: there is no {host:?}; there are {}",
            HOSTS.join(", ")
        );
    }
    let lab = Lab::prepare(Profile::Release)?;
    lab.level1_root()?;
    let initrd = level1_root(&lab)?;
    println!(
        "level 1 starts for each host, at most {} s",
        LIMIT.as_secs()
    );
    let mut all = Vec::new();
    for host in chosen {
        let figures = boots::measure(host, &ALWAYS, &TESTS, LIMIT, |tests| {
            boot(&lab, &initrd, host, tests)
        })?;
        all.push((host, figures));
    }
    print!("{}", table(&all));
    for (host, figures) in &all {
        for (name, figure) in figures {
            let broken = figure.as_ref().err().filter(|why| *why != boots::STUCK);
            ensure!(
                broken.is_none(),
                "{host}, {name}: {}",
                figure.as_ref().err().map_or("", String::as_str)
            );
        }
    }
    Ok(())
}

/// The command that boots level 1 for these tests.
fn boot(lab: &Lab, initrd: &Path, host: &str, tests: &[&Test]) -> Result<Command> {
    let tests: Vec<String> = tests
        .iter()
        .map(|test| format!("{}:{}", test.label(), test.fio))
        .collect();
    let mut command = level1::machine(true, "max,xsave=off", 3072)?;
    command
        .args(["-display", "none", "-serial", "stdio", "-monitor", "none"])
        .arg("-kernel")
        .arg(&lab.vmlinuz)
        .arg("-initrd")
        .arg(initrd)
        .arg("-append")
        .arg(format!(
            "console=ttyS0 quiet loglevel=1 panic=-1 lab.job=disk-bench bench.host={host} bench.tests={}",
            tests.join(",")
        ));
    Ok(command)
}

/// The report: a line for each test.
fn table(all: &[(&str, Figures)]) -> String {
    let mut text = format!("{:<26}", "requests per second");
    for (host, _) in all {
        text += &format!(" {host:>16}");
    }
    let peer = all.iter().position(|(host, _)| *host == PEER);
    if peer.is_some() {
        text += &format!("   {:<14}", "ratios");
    }
    text += "   exits per request, in the same order\n";
    for test in &TESTS {
        text += &format!("{:<26}", test.name);
        let (mut rates, mut exits) = (Vec::new(), Vec::new());
        for (_, figures) in all {
            let base = figures
                .get(START_UP)
                .and_then(|figure| figure.as_ref().ok());
            let (rate, each) = match (figures.get(test.name), base) {
                (Some(Ok(figure)), Some(base)) => {
                    rates.push(Some(figure.per_second));
                    // fio's own exits are not the disk's.
                    let each = (figure.exits - base.exits) / test.requests();
                    (format!("{:.0}", figure.per_second), format!("{each:.2}"))
                }
                (other, _) => {
                    rates.push(None);
                    let word = other.map_or("not run", |_| "stuck");
                    (word.to_owned(), "-".to_owned())
                }
            };
            text += &format!(" {rate:>16}");
            exits.push(each);
        }
        if let Some(peer) = peer {
            let ratio = |rate: &Option<f64>| match (rate, rates[peer]) {
                (Some(rate), Some(of)) => format!("{:.2}", rate / of),
                _ => "-".to_owned(),
            };
            let ratios: Vec<String> = rates.iter().map(ratio).collect();
            text += &format!("   {:<14}", ratios.join(", "));
        }
        text += &format!("   {}\n", exits.join(", "));
    }
    text
}

/// A program with its libraries.
pub fn add_program(program: &Path, tree: &Path, into: &str) -> Result<()> {
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

pub fn add(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().unwrap_or(to))?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// An initial root of `base` and what `tree` adds: the kernel unpacks archives one after the other.
pub fn with(base: &Path, tree: &Path, archive: &Path) -> Result<()> {
    let more = archive.with_extension("more");
    cpio::write(tree, &more)?;
    let mut whole = fs::read(base).with_context(|| format!("cannot read {}", base.display()))?;
    whole.extend(fs::read(&more)?);
    fs::remove_file(more)?;
    fs::write(archive, whole).with_context(|| format!("cannot write {}", archive.display()))
}

/// Level 1's initial root with the bench in it.
fn level1_root(lab: &Lab) -> Result<PathBuf> {
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

//! From exec to a guest's first process, by executed instructions, exits and memory: vmm-host beside QEMU, in level 1 of
//! the lab.
//!
//! Same kernel, initrd and command line for all, 1 CPU, 256 MiB. Level 1's clock counts executed instructions (`-icount`), of
//! the guest, the host and level 1's kernel together, so that figures repeat on a busy machine. What an exit costs on real
//! hardware is not in them: hence the exits beside them.

use crate::bench::lab::{add, add_program, with};
use crate::lab::{Lab, cpio, level1};
use crate::workspace::{self, Profile};
use crate::{packages, process};
use anyhow::{Context, Result, ensure};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// For a boot of level 1 with all hosts.
const LIMIT: Duration = Duration::from_secs(2400);
const DEFAULT_HOSTS: &str = "vmm-host-elf,vmm-host-disk,vmm-host-bz,microvm,pc";
/// Which hosts to boot, instead of all.
const HOSTS: &str = "VMM_BENCH_HOSTS";
/// Where QEMU's firmware files are in Debian, and which its machines want for a kernel that is booted directly.
const FIRMWARE: [&str; 6] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/seabios/bios-microvm.bin",
    "/usr/share/qemu/qboot.rom",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/pvh.bin",
];

/// Prints a line for each host, then which exits it had.
pub fn run() -> Result<()> {
    let lab = Lab::prepare(Profile::Release)?;
    lab.level1_root()?;
    let initrd = level1_root(&lab)?;
    let hosts = std::env::var(HOSTS).unwrap_or_else(|_| DEFAULT_HOSTS.to_owned());
    let mut command = level1::machine(true, "max,xsave=off", 2048)?;
    command
        .args(["-display", "none", "-serial", "stdio", "-monitor", "none"])
        .arg("-kernel")
        .arg(&lab.vmlinuz)
        .arg("-initrd")
        .arg(&initrd)
        .arg("-append")
        .arg(format!(
            "console=ttyS0 quiet loglevel=1 panic=-1 lab.job=boot-bench bench.hosts={hosts}"
        ));
    println!("level 1 starts, at most {} s", LIMIT.as_secs());
    let outcome = process::bounded(&mut command, LIMIT, false)?;
    let report = report(&outcome.output);
    ensure!(
        !report.is_empty(),
        "no guest came up ({}):\n{}",
        outcome.ending(),
        outcome.tail(40)
    );
    print!("{report}");
    for host in hosts.split(',') {
        ensure!(
            report.contains(&format!("\n{host} ")),
            "{host} did not boot:\n{}",
            outcome.tail(40)
        );
    }
    Ok(())
}

/// The value of `key=value` in a line.
fn value<'a>(line: &'a str, key: &str) -> &'a str {
    line.split_whitespace()
        .filter_map(|word| word.split_once('='))
        .find(|(name, _)| *name == key)
        .map_or("?", |(_, value)| value)
}

/// Nanoseconds of level 1, each an instruction, as thousands of millions.
fn giga(line: &str, key: &str) -> String {
    value(line, key)
        .parse::<f64>()
        .map_or("?".to_owned(), |count| format!("{:.4}", count / 1e9))
}

/// What a console of level 1 says, as a table; empty if no guest came up.
fn report(console: &str) -> String {
    let (mut table, mut counts) = (String::new(), String::new());
    let (mut host, mut uptime) = ("", "?");
    let mut event = String::new();
    for line in console.lines().map(str::trim_end) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["BOOT-START", name] => host = name,
            ["UPTIME", seconds, ..] => uptime = seconds,
            ["BOOT", ..] => {
                if table.is_empty() {
                    table += "\nG instructions from exec to the marker (of which by the guest's own clock); up to there: exits (of which port, MMIO, page faults); 8 s later: kB beyond guest RAM (file + anonymous), guest RAM\n";
                }
                // Writing to a String can't fail.
                let _ = writeln!(
                    table,
                    "{host} {} ({uptime}); {} ({}, {}, {}); {} + {}, {}",
                    giga(line, "marker"),
                    value(line, "exits"),
                    value(line, "io_exits"),
                    value(line, "mmio_exits"),
                    value(line, "pf_taken"),
                    value(line, "file"),
                    value(line, "anonymous"),
                    value(line, "ram"),
                );
            }
            ["COUNT", name, key, count] => {
                if event != *name {
                    event = (*name).to_owned();
                    let _ = write!(counts, "\n{host} {name}:");
                }
                let _ = write!(counts, " {key} {count}");
            }
            // A thousandth of level 1's second is a million instructions.
            ["STEP", _, millions, name @ ..] => {
                let _ = write!(counts, "\n{host}: {millions} M up to: {}", name.join(" "));
            }
            ["COUNT-END", _] => event.clear(),
            _ => {}
        }
    }
    if !counts.is_empty() {
        counts.push('\n');
    }
    table + &counts
}

/// The guest's initrd: its first process and nothing else.
fn guest(source: &Path, directory: &Path, initrd: &Path) -> Result<()> {
    let tree = directory.join("guest");
    std::fs::create_dir_all(&tree)?;
    let built = Command::new(packages::program("gcc", "gcc")?)
        .args(["-static", "-Os", "-Wall", "-o"])
        .arg(tree.join("init"))
        .arg(source.join("guest-init.c"))
        .status()
        .context("cannot run gcc")?;
    ensure!(built.success(), "the guest's first process does not build");
    cpio::write(&tree, initrd)
}

/// Level 1's initial root with the bench in it.
fn level1_root(lab: &Lab) -> Result<PathBuf> {
    let source = workspace::root().join("tests/lab/boot");
    let directory = lab.directory.join("boot");
    if directory.exists() {
        std::fs::remove_dir_all(&directory)?;
    }
    let tree = directory.join("level1");
    std::fs::create_dir_all(tree.join("lab/boot"))?;
    guest(&source, &directory, &tree.join("lab/boot/initrd"))?;
    add(&source.join("level1.sh"), &tree.join("lab/boot-bench.sh"))?;
    for file in ["vm.toml", "disk.toml"] {
        add(&source.join(file), &tree.join("lab/boot").join(file))?;
    }
    let sampler = [
        "build",
        "--release",
        "--quiet",
        "-p",
        "vmm-bench",
        "--bin",
        "boot-sampler",
    ];
    let built = workspace::cargo(&sampler).status()?;
    ensure!(built.success(), "the sampler does not build");
    for program in [
        workspace::output(Profile::Release).join("boot-sampler"),
        packages::program("qemu-system-x86_64", "qemu-system-x86")?,
    ] {
        add_program(&program, &tree, "lab/bin")?;
    }
    for file in FIRMWARE {
        let name = Path::new(file).file_name().unwrap_or_default();
        add(Path::new(file), &tree.join("lab/boot/firmware").join(name))?;
    }
    let archive = directory.join("initrd");
    with(&lab.level1, &tree, &archive)?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_becomes_a_line_for_each_boot_and_event() {
        let console = "BOOT-START a\r\nMARKER-UP\r\nUPTIME 1.30 0.00\r\n\
            BOOT marker=1519000000 exits=2478 io_exits=300 mmio_exits=0 pf_taken=41 ram=79872 file=4984 anonymous=476\r\n\
            COUNT-START a\r\n     0.624     0.024  devices created\r\nSTEP      0.624     0.024  devices created\r\n\
            COUNT kvm_pio 3f8 76\r\nCOUNT kvm_pio cf8 54\r\nCOUNT-END a\r\nBOOT-START b\r\nCOUNT kvm_pio 3f8 1\r\n";
        let report = report(console);
        assert!(
            report.contains("\na 1.5190 (1.30); 2478 (300, 0, 41); 4984 + 476, 79872\n"),
            "{report}"
        );
        assert!(
            report.ends_with(
                "\na: 0.024 M up to: devices created\na kvm_pio: 3f8 76 cf8 54\nb kvm_pio: 3f8 1\n"
            ),
            "{report}"
        );
    }
}

//! Runs a VM monitor until its guest writes `MARKER-UP`, and says what that took: time, exits and memory. Part of
//! `cargo xtask bench boot`, for a level 1 whose clock counts instructions.

use std::fs;
use std::io::{self, Read, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

const MARKER: &[u8] = b"MARKER-UP";
/// A mapping of at least this many kB is the guest's memory, which has 256 MiB.
const GUEST_RAM: u64 = 128 << 10;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let program = arguments.next().context("usage: boot-sampler COMMAND...")?;
    let mut command = Command::new(program);
    command.args(arguments).stdout(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().context("cannot run it")?;
    let mut output = child.stdout.take().context("no output stream")?;
    let (mut seen, mut buffer) = (Vec::new(), [0; 512]);
    let mut marker = None;
    loop {
        let count = output.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        seen.extend_from_slice(&buffer[..count]);
        if marker.is_none() && seen.windows(MARKER.len()).any(|part| part == MARKER) {
            marker = Some((start.elapsed(), exits(), memory(child.id())?));
        }
    }
    let status = child.wait()?;
    let end = start.elapsed();
    io::stdout().write_all(&seen)?;
    println!();
    let Some((marker, exits, memory)) = marker else {
        bail!("no marker ({status})");
    };
    println!(
        "BOOT marker={} exit={} {exits} {memory}",
        marker.as_nanos(),
        end.as_nanos()
    );
    Ok(())
}

/// What KVM has counted for the VMs that there are, which is one.
fn exits() -> String {
    let count = |name| {
        let file = format!("/sys/kernel/debug/kvm/{name}");
        fs::read_to_string(file).map_or("?".to_owned(), |text| text.trim().to_owned())
    };
    let name = |name| format!("{name}={}", count(name));
    [
        "exits",
        "io_exits",
        "mmio_exits",
        "pf_taken",
        "halt_exits",
        "irq_exits",
    ]
    .map(name)
    .join(" ")
}

/// kB that the process holds, apart from its guest's memory: of files, and anonymous.
fn memory(process: u32) -> Result<String> {
    let maps = fs::read_to_string(format!("/proc/{process}/smaps")).context("no smaps")?;
    let (mut ram, mut file, mut anonymous) = (0, 0, 0);
    let (mut size, mut resident) = (0, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        let value: u64 = value.parse().unwrap_or(0);
        match key {
            "Size:" => size = value,
            "Rss:" => resident = value,
            "Anonymous:" if size >= GUEST_RAM => ram += resident,
            "Anonymous:" => {
                file += resident - value;
                anonymous += value;
            }
            _ => {}
        }
    }
    Ok(format!("ram={ram} file={file} anonymous={anonymous}"))
}

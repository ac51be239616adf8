//! Runs a VM monitor until its guest writes `MARKER-UP`, and says what that took: time and exits, and how much memory it holds
//! when the guest writes `SETTLED`. Part of `cargo xtask bench boot`, for a level 1 whose clock counts instructions.

use std::fs;
use std::io::{self, Read, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

const MARKER: &[u8] = b"MARKER-UP";
const SETTLED: &[u8] = b"SETTLED";
/// Mappings of together at least this many kB are the guest's memory, which has 256 MiB.
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
    let (mut marker, mut settled) = (None, None);
    let has = |seen: &[u8], text: &[u8]| seen.windows(text.len()).any(|part| part == text);
    loop {
        let count = output.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        seen.extend_from_slice(&buffer[..count]);
        if marker.is_none() && has(&seen, MARKER) {
            marker = Some((start.elapsed(), exits()));
        }
        if settled.is_none() && has(&seen, SETTLED) {
            settled = Some(memory(child.id())?);
        }
    }
    let status = child.wait()?;
    io::stdout().write_all(&seen)?;
    println!();
    let (Some((marker, exits)), Some(memory)) = (marker, settled) else {
        bail!("no marker ({status})");
    };
    println!("BOOT marker={} {exits} {memory}", marker.as_nanos());
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
    // Mappings that follow each other and differ in their advice alone are one.
    let mut run = Run::default();
    let mut resident = 0;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        let number: u64 = value.parse().unwrap_or(0);
        match key {
            "Rss:" => resident = number,
            "Anonymous:" => {
                file += resident - number;
                run.anonymous += number;
            }
            _ => {
                let ends = key
                    .split_once('-')
                    .map(|ends| (address(ends.0), address(ends.1)));
                let Some((Some(start), Some(end))) = ends else {
                    continue;
                };
                let rights = value.to_owned();
                if (run.end, &run.rights) != (start, &rights) {
                    let done = std::mem::replace(
                        &mut run,
                        Run {
                            start,
                            ..Run::default()
                        },
                    );
                    done.count(&mut ram, &mut anonymous);
                }
                (run.end, run.rights) = (end, rights);
            }
        }
    }
    run.count(&mut ram, &mut anonymous);
    Ok(format!("ram={ram} file={file} anonymous={anonymous}"))
}

/// Neighbouring mappings.
#[derive(Default)]
struct Run {
    start: u64,
    end: u64,
    rights: String,
    anonymous: u64,
}

impl Run {
    fn count(self, ram: &mut u64, anonymous: &mut u64) {
        *match self.end - self.start >= GUEST_RAM << 10 {
            true => ram,
            false => anonymous,
        } += self.anonymous;
    }
}

fn address(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

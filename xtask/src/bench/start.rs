//! From exec to the first byte the guest writes to its serial port.

use crate::workspace::{self, Profile};
use anyhow::{Context, Result};
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const RUNS: usize = 30;

/// Prints minimum, median and maximum over the runs.
pub fn run() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.toml");
    std::fs::write(
        &file,
        "[main]\nname = \"start\"\ncpus = 1\nmemory = 128\nkernel = \"builtin:selftest\"\ncmdline = \"mode=poweroff\"\n\n[char_dev.ttya]\ntype = \"stdio\"\n",
    )?;
    let mut times = Vec::new();
    for _ in 0..RUNS {
        times.push(once(&file)?);
    }
    times.sort();
    let show = |time: Duration| format!("{:.2}", time.as_secs_f64() * 1e3);
    println!(
        "first byte after {} / {} / {} ms (min / median / max of {RUNS})",
        show(times[0]),
        show(times[RUNS / 2]),
        show(times[RUNS - 1])
    );
    Ok(())
}

fn once(file: &std::path::Path) -> Result<Duration> {
    let start = Instant::now();
    let mut child = Command::new(workspace::host(Profile::Release))
        .args(["--log-level", "error"])
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot run vmm-host")?;
    let mut stream = child.stdout.take().context("no output stream")?;
    let mut byte = [0];
    stream
        .read_exact(&mut byte)
        .context("vmm-host ended before the guest wrote a byte")?;
    let elapsed = start.elapsed();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest)?;
    child.wait()?;
    Ok(elapsed)
}

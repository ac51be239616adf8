//! From exec to the first byte the guest writes to its serial port, and to the end of the process, with more and fewer
//! plugins. The guest is the self-test guest, which powers off at once; `configs/hello.toml`, whose guest goes on to test its machine, is
//! measured to its first byte.

use crate::workspace::{self, Profile};
use anyhow::{Context, Result, ensure};
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const RUNS: usize = 40;

/// One VM file, and what was measured with it.
struct Variant {
    name: &'static str,
    file: PathBuf,
    /// Whether the guest powers off at once.
    ends: bool,
    first: Vec<Duration>,
    end: Vec<Duration>,
}

const SERIAL: &str = "[char_dev.ttya]\ntype = \"stdio\"\n";
const DISKS: &str = r#"
[dev.block0]
driver = "pci-virtio-block"
pci-path = "0.4.0"
block_dev = "memory"
[block_dev.memory]
type = "mem-async"
size = "16M"
[dev.block1]
driver = "pci-virtio-block"
pci-path = "0.5.0"
block_dev = "file"
[block_dev.file]
type = "file"
path = "disk.img"
"#;

/// Prints minimum, median and maximum of each variant; the variants take turns.
pub fn run() -> Result<()> {
    let directory = tempfile::tempdir()?;
    std::fs::File::create(directory.path().join("disk.img"))?.set_len(16 << 20)?;
    let mut variants = Vec::new();
    let hello = |file| Variant {
        name: "configs/hello.toml, 4 plugins",
        file,
        ends: false,
        first: Vec::new(),
        end: Vec::new(),
    };
    variants.push(hello(workspace::root().join("configs/hello.toml")));
    for (name, profile, tables) in [
        ("no plugin", "none", String::new()),
        ("2 plugins (uart, console)", "propolis", SERIAL.to_owned()),
        (
            "5 plugins (and virtio-block, memory, file)",
            "propolis",
            format!("{SERIAL}{DISKS}"),
        ),
    ] {
        let file = directory.path().join(format!("{}.toml", variants.len()));
        let main = format!(
            "[main]\nname = \"start\"\ncpus = 1\nmemory = 128\nprofile = \"{profile}\"\nkernel = \"builtin:selftest\"\ncmdline = \"mode=poweroff\"\n"
        );
        std::fs::write(&file, main + &tables)?;
        variants.push(Variant {
            name,
            file,
            ends: true,
            first: Vec::new(),
            end: Vec::new(),
        });
    }
    for _ in 0..RUNS {
        for variant in &mut variants {
            let (first, end) = once(variant)?;
            variant.first.extend(first);
            variant.end.extend(end);
        }
    }
    for variant in &mut variants {
        if !variant.first.is_empty() {
            println!(
                "{}: first byte after {}",
                variant.name,
                spread(&mut variant.first)
            );
        }
        if !variant.end.is_empty() {
            println!(
                "{}: power off and exit after {}",
                variant.name,
                spread(&mut variant.end)
            );
        }
    }
    Ok(())
}

fn spread(times: &mut [Duration]) -> String {
    times.sort();
    let show = |time: Duration| format!("{:.2}", time.as_secs_f64() * 1e3);
    format!(
        "{} / {} / {} ms (min / median / max of {})",
        show(times[0]),
        show(times[times.len() / 2]),
        show(times[times.len() - 1]),
        times.len()
    )
}

/// Runs the VM once: time to its first byte, if it writes any, and to its end, if it comes to one at once.
fn once(Variant { file, ends, .. }: &Variant) -> Result<(Option<Duration>, Option<Duration>)> {
    let start = Instant::now();
    let directory = file.parent().context("a VM file without a directory")?;
    let mut child = Command::new(workspace::host(Profile::Release))
        .current_dir(directory)
        .args(["--log-level", "error"])
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot run vmm-host")?;
    let mut stream = child.stdout.take().context("no output stream")?;
    let mut byte = [0];
    let first = stream.read(&mut byte)?;
    let elapsed = start.elapsed();
    if !ends {
        child.kill()?;
        child.wait()?;
        return Ok(((first > 0).then_some(elapsed), None));
    }
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest)?;
    let status = child.wait()?;
    ensure!(
        status.success(),
        "vmm-host {} ended with {status}",
        file.display()
    );
    Ok(((first > 0).then_some(elapsed), Some(start.elapsed())))
}

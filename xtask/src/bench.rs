//! `cargo xtask bench`: measurements, on a release build.

use crate::workspace::{self, Profile};
use anyhow::{Result, ensure};

/// Arguments of `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Which; all if none is named
    names: Vec<String>,
}

/// One measurement: its name, what it measures, and the function that prints its figures.
struct Bench {
    name: &'static str,
    about: &'static str,
    run: fn() -> Result<()>,
}

const BENCHES: &[Bench] = &[
    Bench {
        name: "abi",
        about: "a register access and a batch of requests through the plugin ABI",
        run: abi::run,
    },
    Bench {
        name: "disk",
        about: "a request to a disk in a file, without a guest",
        run: disk::run,
    },
    Bench {
        name: "start",
        about: "exec of vmm-host to the guest's first serial byte",
        run: start::run,
    },
    Bench {
        name: "lab",
        about: "a guest's disk under vmm-host (virtio, NVMe) and QEMU, by executed instructions",
        run: lab::run,
    },
    Bench {
        name: "boot",
        about: "exec to a Linux guest's first process under vmm-host and QEMU: instructions, exits, memory",
        run: boot::run,
    },
];

mod abi;
mod boot;
mod boots;
mod disk;
mod lab;
mod start;

/// Runs the named benches, or all.
pub fn run(arguments: &Arguments) -> Result<bool> {
    for name in &arguments.names {
        let known: Vec<&str> = BENCHES.iter().map(|bench| bench.name).collect();
        ensure!(
            known.contains(&name.as_str()),
            "there is no bench {name:?}; there are {}",
            known.join(", ")
        );
    }
    workspace::build(Profile::Release)?;
    for bench in BENCHES {
        if arguments.names.is_empty() || arguments.names.iter().any(|name| name == bench.name) {
            println!("\n== {}: {}", bench.name, bench.about);
            (bench.run)()?;
        }
    }
    Ok(true)
}

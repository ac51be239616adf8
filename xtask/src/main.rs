//! Project commands, run as `cargo xtask NAME`.
//!
//! `demo` shows the product, `test` passes every test, `lab` boots unmodified kernels with or
//! without hardware virtualisation, `bench` measures, `dist` packs, `illumos` type-checks for the
//! other operating system. What a command needs from Debian it installs or downloads itself.

mod bench;
mod demo;
mod dist;
mod docs;
mod illumos;
mod kvm;
mod lab;
mod packages;
mod process;
mod report;
mod selftest;
mod test;
mod workspace;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Project commands of vmm-host")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build in release mode and boot configs/hello.toml, then a Debian guest with a shell
    Demo,
    /// Pass every test: formatting, lints, units, the self-test guest, the lab, documents
    Test(test::Arguments),
    /// Boot unmodified Debian kernels under vmm-host
    Lab(lab::Arguments),
    /// Measure what docs/performance.md says
    Bench(bench::Arguments),
    /// Pack bin/vmm-host and its plugins into a tar file
    Dist,
    /// Type-check the workspace for x86_64-unknown-illumos
    Illumos,
}

fn main() -> ExitCode {
    let outcome: Result<bool> = match Arguments::parse().command {
        Command::Demo => demo::run(),
        Command::Test(arguments) => test::run(&arguments),
        Command::Lab(arguments) => lab::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Dist => dist::run(),
        Command::Illumos => illumos::run(),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

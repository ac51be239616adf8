//! `cargo xtask demo`: the product at work.

use crate::workspace::{self, Profile};
use crate::{kvm, lab};
use anyhow::{Context, Result};
use std::io::IsTerminal;
use std::process::Command;

/// Builds, boots configs/hello.toml, and then a Debian guest with a shell.
pub fn run() -> Result<bool> {
    println!("building vmm-host and its plugins");
    workspace::build(Profile::Release)?;
    match kvm::usable() {
        Ok(()) => {
            println!("\n$ vmm-host configs/hello.toml");
            let status = Command::new(workspace::host(Profile::Release))
                .arg("configs/hello.toml")
                .current_dir(workspace::root())
                .status()
                .context("cannot run vmm-host")?;
            println!("vmm-host ended: {status}");
            if !status.success() {
                return Ok(false);
            }
        }
        Err(why) => println!("\nconfigs/hello.toml is not booted: {why}"),
    }
    if std::io::stdin().is_terminal() {
        println!("\na Debian guest from a virtio disk, with a shell:");
        lab::shell(Profile::Release, false)
    } else {
        println!(
            "\na Debian guest from a virtio disk (no terminal here, so it checks itself and powers off):"
        );
        lab::show(Profile::Release, "boot-1cpu")
    }
}

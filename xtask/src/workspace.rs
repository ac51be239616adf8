//! Where things are in the tree, and how they are built.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// How the workspace is compiled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Quick to build; what tests use.
    Debug,
    /// What users run and benches measure.
    Release,
}

/// The workspace's top directory.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Where cargo puts what it builds.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(directory) => root().join(directory),
        None => root().join("target"),
    }
}

/// The directory with the host and its plugins for a profile.
pub fn output(profile: Profile) -> PathBuf {
    target().join(match profile {
        Profile::Debug => "debug",
        Profile::Release => "release",
    })
}

/// The host binary for a profile.
pub fn host(profile: Profile) -> PathBuf {
    output(profile).join("vmm-host")
}

/// A cargo command in the workspace.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    command
}

/// The host that has an emulation of illumos' vmm driver in the place of KVM.
pub fn emulated_host(profile: Profile) -> PathBuf {
    output(profile).join("vmm-host-emulated")
}

/// Builds the host, on either hypervisor, and every plugin.
pub fn build(profile: Profile) -> Result<()> {
    // Not the whole workspace: examples and test plugins stay out of the host's search path.
    let mut command = cargo(&[
        "build",
        "-p",
        "vmm-host",
        "-p",
        "vmm-driver",
        "-p",
        "vmm-plugin-*",
    ]);
    if profile == Profile::Release {
        command.arg("--release");
    }
    let status = command.status().context("cannot run cargo")?;
    if !status.success() {
        bail!("the workspace does not build (cargo build: {status})");
    }
    Ok(())
}

/// The plugins that were built beside the host, in order of name.
pub fn plugins(profile: Profile) -> Result<Vec<PathBuf>> {
    let directory = output(profile);
    let mut found = Vec::new();
    let entries = std::fs::read_dir(&directory)
        .with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("libvmm_plugin_") && name.ends_with(".so") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

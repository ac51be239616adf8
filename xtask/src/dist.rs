//! `cargo xtask dist`: what a user installs, as one tar file.

use crate::workspace::{self, Profile};
use crate::{packages, process};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

/// Builds and packs; true when the file is there.
pub fn run() -> Result<bool> {
    workspace::build(Profile::Release)?;
    let name = format!("vmm-host-{}-x86_64", env!("CARGO_PKG_VERSION"));
    let base = workspace::target().join("dist");
    let tree = base.join(&name);
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("cannot clear {}", tree.display()))?;
    }
    let plugins = tree.join("lib/vmm-host/plugins");
    fs::create_dir_all(tree.join("bin"))?;
    fs::create_dir_all(&plugins)?;
    let host = tree.join("bin/vmm-host");
    fs::copy(workspace::host(Profile::Release), &host).context("cannot copy vmm-host")?;
    fs::set_permissions(&host, fs::Permissions::from_mode(0o755))?;
    for plugin in workspace::plugins(Profile::Release)? {
        fs::copy(
            &plugin,
            plugins.join(plugin.file_name().unwrap_or_default()),
        )
        .with_context(|| format!("cannot copy {}", plugin.display()))?;
    }
    for file in ["README.md", "LICENSE", "LICENSE-APACHE", "LICENSE-MIT"] {
        fs::copy(workspace::root().join(file), tree.join(file))
            .with_context(|| format!("cannot copy {file}"))?;
    }
    let archive = base.join(format!("{name}.tar.gz"));
    let mut tar = Command::new(packages::program("tar", "tar")?);
    tar.args(["--owner=0", "--group=0", "--sort=name", "-czf"])
        .arg(&archive)
        .arg("-C")
        .arg(&base)
        .arg(&name);
    let outcome = process::bounded(&mut tar, Duration::from_secs(300), false)?;
    if outcome.code() != Some(0) {
        bail!("tar: {}\n{}", outcome.ending(), outcome.tail(10));
    }
    println!("{}", archive.display());
    Ok(true)
}

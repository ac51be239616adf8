//! `cargo xtask illumos`: type-checks the workspace for the other operating system.
//!
//! rustup has no standard library for it to check against with every compiler, and building one
//! needs compiler and library source of one version. Debian has both, as packages made for
//! building browsers: they are unpacked below `target/illumos-sysroot`, the library is compiled
//! once there, and checks are plain `cargo check` from then on. Nothing is linked or run.

use crate::{packages, process, workspace};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const TARGET: &str = "x86_64-unknown-illumos";
const PATIENCE: Duration = Duration::from_secs(3600);

/// Checks; true if it compiles.
pub fn run() -> Result<bool> {
    let rustc = sysroot()?;
    let mut command = workspace::cargo(&[
        "check",
        "--workspace",
        "--exclude",
        "xtask",
        "--tests",
        "--target",
        TARGET,
    ]);
    command
        .env("RUSTC", rustc)
        .env("CARGO_TARGET_DIR", workspace::target().join("illumos"));
    let outcome = process::bounded(&mut command, PATIENCE, true)?;
    println!("illumos: {}", outcome.ending());
    Ok(outcome.code() == Some(0))
}

/// The compiler with a standard library for the target, made on first use.
fn sysroot() -> Result<PathBuf> {
    let base = workspace::target().join("illumos-sysroot");
    let rustc = base.join("rustc");
    if rustc.exists() {
        return Ok(rustc);
    }
    println!("preparing a standard library for {TARGET} (about 5 minutes, once)");
    let root = base.join("root");
    let library = packages::dependency("libstd-rust-web-dev", "libstd-rust-web-1")?;
    let llvm = packages::dependency("rustc-web", "libllvm")
        .or_else(|_| packages::dependency(&library, "libllvm"))?;
    packages::unpack(
        &[
            "rustc-web",
            "rust-web-src",
            "libstd-rust-web-dev",
            &library,
            &llvm,
        ],
        &root,
    )?;
    let wrapper = base.join("rustc.new");
    let text = format!(
        "#!/bin/sh\nLD_LIBRARY_PATH={0}/usr/lib/x86_64-linux-gnu exec {0}/usr/bin/rustc \"$@\"\n",
        root.display()
    );
    fs::write(&wrapper, text)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let libraries = standard_library(&base, &wrapper)?;
    let into = root.join("usr/lib/rustlib").join(TARGET).join("lib");
    fs::create_dir_all(&into)?;
    for file in libraries {
        let name = file.file_name().unwrap_or_default();
        fs::copy(&file, into.join(name))
            .with_context(|| format!("cannot copy {}", file.display()))?;
    }
    // Its name says that everything before went well.
    fs::rename(&wrapper, &rustc)?;
    Ok(rustc)
}

/// Compiles the standard library as a dependency of an empty crate; the files that make it up.
fn standard_library(base: &Path, rustc: &Path) -> Result<Vec<PathBuf>> {
    let seed = base.join("seed");
    fs::create_dir_all(seed.join("src"))?;
    fs::write(
        seed.join("Cargo.toml"),
        "[package]\nname = \"seed\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[workspace]\n",
    )?;
    fs::write(seed.join("src/lib.rs"), "")?;
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args([
            "check",
            "-Zbuild-std=std,panic_abort,test",
            "--target",
            TARGET,
        ])
        .current_dir(&seed)
        .env("RUSTC", rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_DIR", seed.join("target"))
        .env("CARGO_PROFILE_DEV_DEBUG", "0");
    let outcome = process::bounded(&mut command, PATIENCE, false)?;
    if outcome.code() != Some(0) {
        bail!(
            "the standard library for {TARGET} does not compile ({}):\n{}",
            outcome.ending(),
            outcome.tail(30)
        );
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(seed.join("target").join(TARGET).join("debug/deps"))? {
        let file = entry?.path();
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with("lib")
            && !name.starts_with("libseed")
            && (name.ends_with(".rlib") || name.ends_with(".rmeta"))
        {
            files.push(file);
        }
    }
    Ok(files)
}

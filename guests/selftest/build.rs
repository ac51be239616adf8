//! Builds the freestanding guest in `guest/` into one ELF image.
//!
//! It is not a cargo target: it links at a fixed address with no start files and aborts on panic,
//! while the rest of the workspace unwinds. The target is named, so that checking the workspace
//! for another operating system still produces the same guest.

use std::path::PathBuf;
use std::process::Command;

/// GNU ld, which reads the guest's script. On illumos `ld` is the system's own linker, which does not.
const GNU_LD: &str = if cfg!(target_os = "illumos") {
    "gld"
} else {
    "ld"
};

fn main() -> Result<(), String> {
    println!("cargo::rerun-if-changed=guest");
    let rustc = std::env::var("RUSTC").map_err(|e| format!("RUSTC: {e}"))?;
    let out = PathBuf::from(std::env::var("OUT_DIR").map_err(|e| format!("OUT_DIR: {e}"))?);
    let source = PathBuf::from(
        std::env::var("CARGO_MANIFEST_DIR").map_err(|e| format!("CARGO_MANIFEST_DIR: {e}"))?,
    )
    .join("guest");
    let script = source.join("guest.ld");
    let script = script.to_str().ok_or("the path of guest.ld is not UTF-8")?;
    let status = Command::new(&rustc)
        .arg(source.join("main.rs"))
        .arg(format!("--remap-path-prefix={}=guest", source.display()))
        .arg("-o")
        .arg(out.join("selftest.elf"))
        .args([
            "--edition",
            "2024",
            "--crate-type",
            "bin",
            "--crate-name",
            "selftest",
        ])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .env(
            "SELFTEST_VERSION",
            std::env::var("CARGO_PKG_VERSION").unwrap_or_default(),
        )
        .args([
            "-C",
            "panic=abort",
            "-C",
            "relocation-model=static",
            "-C",
            "opt-level=s",
        ])
        .args([
            "-C",
            "debuginfo=0",
            "-C",
            "strip=symbols",
            "-C",
            "codegen-units=1",
        ])
        // The linker itself, since nothing of the host's C compiler belongs in the guest.
        .args(["-C", "linker-flavor=ld", "-C"])
        .arg(format!("linker={GNU_LD}"))
        .args(["-C", "link-arg=-static", "-C", "link-arg=-no-pie"])
        .args(["-C", "link-arg=-znorelro", "-C", "link-arg=--build-id=none"])
        .args(["-D", "warnings", "-C"])
        .arg(format!("link-arg=-T{script}"))
        .status()
        .map_err(|e| format!("cannot run {rustc}: {e}"))?;
    if !status.success() {
        return Err(format!(
            "building the self-test guest failed: {rustc}: {status}"
        ));
    }
    Ok(())
}

//! A disk with the firmware test suite, fwts. Debian has it from its release after 12 on: it comes from there with its own libraries, and
//! the guest runs it in a root of its own.

use super::images::{copy, copy_executable, fresh, succeed};
use crate::packages;
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian's release in the making, by the name that lasts.
const RELEASE: &str = "testing";
const PACKAGE: &str = "fwts";
/// Room on the disk.
const SIZE: &str = "48M";

/// Makes `fwts.img` in `lab`.
pub fn disk(lab: &Path) -> Result<PathBuf> {
    let (image, packages) = (lab.join("fwts.img"), lab.join("fwts-packages"));
    packages::unpack_of_release(RELEASE, PACKAGE, &packages)?;
    let tree = lab.join("fwts-tree");
    fresh(&tree)?;
    for name in ["proc", "sys", "dev", "tmp", "usr/lib", "usr/lib64"] {
        fs::create_dir_all(tree.join(name))?;
    }
    for (link, to) in [
        ("bin", "usr/bin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
    ] {
        symlink(to, tree.join(link))?;
    }
    for name in ["usr/bin/fwts", "usr/lib64/ld-linux-x86-64.so.2"] {
        copy_executable(&packages.join(name), &tree.join(name))?;
    }
    let private = "usr/lib/x86_64-linux-gnu/fwts";
    for folder in ["usr/lib/x86_64-linux-gnu", private, "usr/share/fwts"] {
        let from = packages.join(folder);
        let entries =
            fs::read_dir(&from).with_context(|| format!("cannot list {}", from.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_file() {
                let name = path.file_name().unwrap_or_default();
                copy(&path, &tree.join(folder).join(name))?;
            }
        }
    }
    if image.exists() {
        fs::remove_file(&image)?;
    }
    let mke2fs = packages::program("mke2fs", "e2fsprogs")?;
    succeed(
        Command::new(mke2fs)
            .args(["-q", "-t", "ext4", "-E", "root_owner=0:0", "-d"])
            .arg(&tree)
            .arg(&image)
            .arg(SIZE),
    )?;
    fs::remove_dir_all(&tree)?;
    Ok(image)
}

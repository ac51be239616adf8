//! A disk with fio, whose many libraries the root disk has no room for: the guest runs it in a root of its own.

use super::images::{copy_executable, fresh, needed_libraries, succeed};
use crate::packages;
use anyhow::Result;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Room on the disk.
const SIZE: &str = "128M";

/// Makes `fio.img` in `lab`.
pub fn disk(lab: &Path) -> Result<PathBuf> {
    let image = lab.join("fio.img");
    let tree = lab.join("fio-tree");
    fresh(&tree)?;
    for name in ["proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(tree.join(name))?;
    }
    let program = packages::program("fio", "fio")?;
    copy_executable(&program, &tree.join("bin/fio"))?;
    for library in needed_libraries(&program)? {
        let inside = tree.join(library.strip_prefix("/").unwrap_or(&library));
        copy_executable(&library, &inside)?;
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

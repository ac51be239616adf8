//! An image of a CD, for guests that have one as a disk.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::images::{copy, fresh, succeed};
use crate::packages;

/// Makes an ISO 9660 file system at `image`: a text, and `large` twice.
pub fn image(directory: &Path, large: &Path, image: &Path) -> Result<()> {
    let tree = directory.join("cd-tree");
    fresh(&tree)?;
    copy(large, &tree.join("large"))?;
    copy(large, &tree.join("boot/again"))?;
    fs::write(tree.join("boot/hello"), "a CD")?;
    if image.exists() {
        fs::remove_file(image)?;
    }
    succeed(
        Command::new(packages::program("xorriso", "xorriso")?)
            .args(["-as", "mkisofs", "-quiet", "-R", "-V", "LAB", "-o"])
            .arg(image)
            .arg(&tree),
    )
}

//! Writes a directory as a cpio archive in the form that the kernel unpacks as its initial root
//! ("newc", Linux Documentation/driver-api/early-userspace/buffer-format.rst).

use anyhow::{Context, Result};
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Writes everything below `directory`, owned by root, to `archive`.
pub fn write(directory: &Path, archive: &Path) -> Result<()> {
    let file = fs::File::create(archive)
        .with_context(|| format!("cannot create {}", archive.display()))?;
    let mut writer = Writer {
        out: std::io::BufWriter::new(file),
        number: 0,
    };
    writer
        .below(directory, Path::new(""))
        .with_context(|| format!("cannot pack {}", directory.display()))?;
    writer.entry(b"TRAILER!!!", 0, &[])?;
    writer
        .out
        .flush()
        .with_context(|| format!("cannot write {}", archive.display()))
}

struct Writer<W: Write> {
    out: W,
    number: u32,
}

impl<W: Write> Writer<W> {
    fn below(&mut self, directory: &Path, name: &Path) -> Result<()> {
        let mut entries = fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let name = name.join(entry.file_name());
            let kind = entry.file_type()?;
            let bytes = name.as_os_str().as_bytes();
            if kind.is_dir() {
                self.entry(bytes, 0o040_755, &[])?;
                self.below(&path, &name)?;
            } else if kind.is_symlink() {
                self.entry(
                    bytes,
                    0o120_777,
                    fs::read_link(&path)?.as_os_str().as_bytes(),
                )?;
            } else {
                let executable = entry.metadata()?.permissions().mode() & 0o111 != 0;
                self.entry(
                    bytes,
                    if executable { 0o100_755 } else { 0o100_644 },
                    &fs::read(&path)?,
                )?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, name: &[u8], mode: u32, data: &[u8]) -> Result<()> {
        self.number += 1;
        let size = u32::try_from(data.len())
            .context("a file of 4 GiB or more does not fit into a cpio archive")?;
        let length = u32::try_from(name.len())? + 1;
        write!(self.out, "070701")?;
        for field in [self.number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, length, 0] {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name)?;
        // Header (110 bytes) and name, then the data, each padded to four bytes.
        let padding = |length: usize| [0u8; 4].split_at((4 - length % 4) % 4).0.to_vec();
        self.out.write_all(&[0])?;
        self.out.write_all(&padding(110 + name.len() + 1))?;
        self.out.write_all(data)?;
        self.out.write_all(&padding(data.len()))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The archive is read back by an independent implementation, where there is one.
    #[test]
    fn cpio_lists_what_was_packed() {
        let Some(cpio) = crate::packages::find_program("cpio") else {
            println!("SKIPPED: cpio_lists_what_was_packed: no cpio on this machine");
            return;
        };
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(tree.join("a/b/file"), "12345").unwrap();
        fs::write(tree.join("odd"), "1").unwrap();
        std::os::unix::fs::symlink("a/b/file", tree.join("link")).unwrap();
        let archive = directory.path().join("archive");
        write(&tree, &archive).unwrap();
        let out = std::process::Command::new(cpio)
            .args(["-i", "--to-stdout", "a/b/file"])
            .stdin(fs::File::open(&archive).unwrap())
            .output()
            .unwrap();
        assert_eq!(out.stdout, b"12345");
        let cpio = crate::packages::find_program("cpio").unwrap();
        let out = std::process::Command::new(cpio)
            .arg("-t")
            .stdin(fs::File::open(&archive).unwrap())
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8(out.stdout).unwrap(),
            "a\na/b\na/b/file\nlink\nodd\n"
        );
    }
}

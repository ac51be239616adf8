//! A kernel or initrd before it is loaded: a file that is read straight into guest memory, or bytes built into the host.

use std::fmt;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use vm_memory::{Bytes, GuestAddress};

use super::path::open_regular;
use crate::hypervisor::backing::{Mapped, View};
use crate::memory::GuestMemory;

/// Something to load, of known size.
#[derive(Debug)]
pub struct Image {
    name: String,
    source: Source,
    len: u64,
    /// What has been copied from. To unmap a kernel takes as long as a hundred of a guest's exits, and need not come before it runs.
    spent: Mutex<Vec<Mapped>>,
}

#[derive(Debug)]
enum Source {
    File(File),
    Bytes(&'static [u8]),
}

impl fmt::Display for Image {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(&self.name)
    }
}

impl Image {
    /// Opens a file; `role` ("kernel", "initrd") is what messages call it.
    ///
    /// # Errors
    /// It is missing, unreadable, empty or no regular file.
    pub fn open(role: &str, path: &Path) -> Result<Self> {
        let name = format!("{role} {}", path.display());
        let file = open_regular(path).with_context(|| format!("Cannot load the {role}"))?;
        let metadata = file
            .metadata()
            .with_context(|| format!("Cannot examine {name}"))?;
        ensure!(metadata.len() > 0, "Cannot load {name}: it is empty");
        Ok(Self {
            name,
            source: Source::File(file),
            len: metadata.len(),
            spent: Mutex::default(),
        })
    }

    /// An image that is part of this program.
    #[must_use]
    pub fn built_in(name: &str, bytes: &'static [u8]) -> Self {
        Self {
            name: name.into(),
            source: Source::Bytes(bytes),
            len: bytes.len() as u64,
            spent: Mutex::default(),
        }
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Reads from `offset` until `into` is full.
    pub(super) fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        match &self.source {
            Source::File(file) => file
                .read_exact_at(into, offset)
                .with_context(|| format!("Cannot read {self}")),
            Source::Bytes(bytes) => {
                let rest = usize::try_from(offset)
                    .ok()
                    .and_then(|offset| bytes.get(offset..));
                let Some(part) = rest.and_then(|rest| rest.get(..into.len())) else {
                    bail!("Cannot read {self}: it ends too early");
                };
                into.copy_from_slice(part);
                Ok(())
            }
        }
    }

    /// As many bytes of the beginning as there are, up to `N`; the rest is 0.
    pub(super) fn head<const N: usize>(&self) -> Result<[u8; N]> {
        let mut head = [0; N];
        let len = self.len.min(N as u64) as usize;
        self.read_at(0, &mut head[..len])?;
        Ok(head)
    }

    /// Copies `len` bytes from `offset` to guest address `gpa`, once. What is there is all zeros, or has been `used`.
    pub(super) fn load(
        &self,
        memory: &GuestMemory,
        used: bool,
        offset: u64,
        gpa: u64,
        len: u64,
    ) -> Result<()> {
        let describe = || format!("Cannot load {self} at {gpa:#x}");
        let end = offset.checked_add(len).filter(|&end| end <= self.len);
        let end = end.with_context(|| {
            format!(
                "Cannot load {self}: it ends too early, at {} bytes: is it truncated?",
                self.len
            )
        })?;
        let range = usize::try_from(offset)?..usize::try_from(end)?;
        match &self.source {
            Source::Bytes(bytes) => {
                let part = bytes.get(range).with_context(describe)?;
                let write = if used {
                    GuestMemory::write
                } else {
                    GuestMemory::write_to_zeros
                };
                write(memory, gpa, part).with_context(describe)
            }
            Source::File(file) => {
                // In used memory every byte counts, and the system copies them without our looking at them.
                let view = if used { None } else { View::new(file, range) };
                if let Some(view) = view {
                    memory
                        .write_to_zeros(gpa, view.bytes())
                        .with_context(describe)?;
                    self.spent().push(view.close());
                    return Ok(());
                }
                let mut file: &File = file;
                file.seek(SeekFrom::Start(offset)).with_context(describe)?;
                memory.mark_dirty(gpa, len);
                memory
                    .view()
                    .read_exact_volatile_from(GuestAddress(gpa), &mut file, usize::try_from(len)?)
                    .with_context(describe)
            }
        }
    }

    fn spent(&self) -> MutexGuard<'_, Vec<Mapped>> {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back what loading has left behind for a time when nobody waits.
    pub fn tidy(&self) {
        self.spent().clear();
    }

    /// What a file that is no kernel seems to be.
    pub(super) fn guess(&self) -> Result<String> {
        let head = self.head::<64>()?;
        let compressed: &[(&[u8], &str, &str)] = &[
            (&[0x1f, 0x8b], "gzip", "gunzip"),
            (b"BZh", "bzip2", "bunzip2"),
            (&[0xfd, b'7', b'z', b'X', b'Z'], "xz", "unxz"),
            (&[0x28, 0xb5, 0x2f, 0xfd], "zstd", "unzstd"),
            (&[0x04, 0x22, 0x4d, 0x18], "lz4", "unlz4"),
        ];
        if let Some((_, format, tool)) = compressed
            .iter()
            .find(|(magic, ..)| head.starts_with(magic))
        {
            return Ok(format!(
                "it is compressed with {format}: unpack it with {tool} first"
            ));
        }
        let what = match &head {
            _ if head[0x38..0x3c] == *b"ARM\x64" => "it is a kernel for ARM",
            _ if head.starts_with(b"MZ") => "it is an EFI or Windows program",
            _ if head.starts_with(&[0x27, 0x05, 0x19, 0x56]) => "it is a U-Boot image",
            _ if head.starts_with(b"070701") => "it is a cpio archive: is it the initrd?",
            _ if head.starts_with(b"QFI\xfb") => "it is a qcow2 disk image",
            _ if is_text(&head[..self.len.min(64) as usize]) => "it is a text file",
            _ => "it has neither a bzImage nor an ELF header",
        };
        Ok(what.into())
    }
}

fn is_text(bytes: &[u8]) -> bool {
    bytes
        .iter()
        .all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
}

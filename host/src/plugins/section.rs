//! Takes a plugin's manifest text out of its file without running anything of it.
//!
//! Only the ELF header, the section headers, their names and the one section are read: what this costs does not depend
//! on how large the file is. The file may be anything, since it is only known to end in `.so`.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use object::elf::{FileHeader64, SectionHeader64};
use object::pod::{from_bytes, slice_from_bytes};
use object::read::elf::{FileHeader, SectionHeader};
use object::{Endianness, elf};

type Header = FileHeader64<Endianness>;

/// The section that holds the manifest.
pub const SECTION: &str = ".vmm.plugin";

/// No manifest is longer. A file may claim more and is not believed.
const MANIFEST_MAX: u64 = 1 << 20;
/// No plugin has names of sections that are longer together.
const NAMES_MAX: u64 = 1 << 20;

#[cfg(target_arch = "x86_64")]
const MACHINE: elf::Machine = elf::EM_X86_64;
#[cfg(target_arch = "aarch64")]
const MACHINE: elf::Machine = elf::EM_AARCH64;

/// Why a file yields no manifest text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SectionError {
    /// The file can't be opened or read.
    Unreadable(String),
    /// A directory, a FIFO, a device.
    NotRegular,
    /// No ELF magic.
    NotElf,
    /// An ELF file that ends before what its headers describe.
    Truncated,
    /// ELF for another processor or word size than the host's.
    OtherMachine(String),
    /// An ELF executable or relocatable object.
    NotSharedLibrary,
    /// A proper shared library without the section.
    NotPlugin,
    /// The section is larger than any manifest.
    TooLarge(u64),
    /// The section is not UTF-8 text.
    NotText,
}

impl fmt::Display for SectionError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SectionError::Unreadable(why) => write!(out, "can't be read: {why}"),
            SectionError::NotRegular => write!(out, "not a regular file"),
            SectionError::NotElf => write!(out, "not an ELF shared library"),
            SectionError::Truncated => write!(
                out,
                "truncated: the file ends before its section table or manifest; copy or build it again"
            ),
            SectionError::OtherMachine(what) => {
                write!(
                    out,
                    "built for {what}, this host runs on {}: build the plugin for this machine",
                    std::env::consts::ARCH
                )
            }
            SectionError::NotSharedLibrary => write!(out, "an ELF file, but no shared library"),
            SectionError::NotPlugin => write!(out, "not a vmm-host plugin (no {SECTION} section)"),
            SectionError::TooLarge(size) => write!(
                out,
                "its manifest section claims {size} bytes, the most is {MANIFEST_MAX}"
            ),
            SectionError::NotText => write!(out, "its manifest is not UTF-8 text"),
        }
    }
}

impl std::error::Error for SectionError {}

/// A file that may be a plugin, open.
#[derive(Debug)]
pub struct PluginFile {
    file: File,
    metadata: Metadata,
}

impl PluginFile {
    /// Opens it.
    ///
    /// # Errors
    /// It can't be opened, or is no regular file.
    pub fn open(path: &Path) -> Result<Self, SectionError> {
        let mut options = OpenOptions::new();
        // A FIFO would wait for its other end.
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open(path).map_err(|error| {
            // Some files can only be looked at.
            match std::fs::metadata(path) {
                Ok(metadata) if !metadata.is_file() => SectionError::NotRegular,
                _ => unreadable(error),
            }
        })?;
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(SectionError::NotRegular);
        }
        Ok(Self { file, metadata })
    }

    /// The same for each of a file's names.
    pub fn identity(&self) -> (u64, u64) {
        (self.metadata.dev(), self.metadata.ino())
    }

    /// Reads the plugin's manifest text, without the NULs that pad it.
    ///
    /// # Errors
    /// It is no plugin, or a damaged one.
    pub fn manifest_text(&self) -> Result<String, SectionError> {
        let mut start = [0; size_of::<Header>()];
        let length = usize::try_from(self.metadata.len()).unwrap_or(usize::MAX);
        let start = &mut start[..length.min(size_of::<Header>())];
        self.file.read_exact_at(start, 0).map_err(unreadable)?;
        check_ident(start)?;
        let bytes = section(&self.file, start)?;
        let text = String::from_utf8(bytes).map_err(|_| SectionError::NotText)?;
        Ok(text.trim_end_matches('\0').to_string())
    }
}

fn unreadable(error: std::io::Error) -> SectionError {
    SectionError::Unreadable(error.to_string())
}

/// Checks e_ident and e_machine, which have the same place in both classes (System V gABI, "ELF Header").
fn check_ident(start: &[u8]) -> Result<(), SectionError> {
    if !start.starts_with(&elf::ELFMAG) {
        return Err(SectionError::NotElf);
    }
    let Some((head, _)) = start.split_first_chunk::<20>() else {
        return Err(SectionError::Truncated);
    };
    let [_, _, _, _, class, data, .., machine_low, machine_high] = *head;
    if class == elf::ELFCLASS32.0 {
        return Err(SectionError::OtherMachine("a 32-bit processor".to_string()));
    }
    let machine = if data == elf::ELFDATA2MSB.0 {
        u16::from_be_bytes([machine_low, machine_high])
    } else {
        u16::from_le_bytes([machine_low, machine_high])
    };
    // Byte order is part of it: the same number in the other order is no machine of ours.
    if machine != MACHINE.0 || (data == elf::ELFDATA2LSB.0) != cfg!(target_endian = "little") {
        return Err(SectionError::OtherMachine(machine_name(machine)));
    }
    Ok(())
}

fn machine_name(machine: u16) -> String {
    match elf::Machine(machine) {
        elf::EM_X86_64 => "x86_64".to_string(),
        elf::EM_AARCH64 => "aarch64".to_string(),
        elf::EM_RISCV => "riscv".to_string(),
        elf::EM_PPC64 => "powerpc64".to_string(),
        elf::EM_S390 => "s390x".to_string(),
        elf::EM_SPARCV9 => "sparcv9".to_string(),
        other => format!("ELF machine {}", other.0),
    }
}

fn read(file: &File, at: u64, length: u64) -> Result<Vec<u8>, SectionError> {
    // What the headers say lies inside the file, or the file was cut: every failed read means that.
    let cut = |_| SectionError::Truncated;
    let mut bytes = vec![0; usize::try_from(length).map_err(|_| SectionError::Truncated)?];
    file.read_exact_at(&mut bytes, at).map_err(cut)?;
    Ok(bytes)
}

/// Of the file that begins with `start`. Three reads: at a start, every plugin on the search path is looked at.
fn section(file: &File, start: &[u8]) -> Result<Vec<u8>, SectionError> {
    let cut = |()| SectionError::Truncated;
    let (header, _) = from_bytes::<Header>(start).map_err(cut)?;
    let endian = header.endian().map_err(|_| SectionError::Truncated)?;
    if header.e_type(endian) != elf::ET_DYN {
        return Err(SectionError::NotSharedLibrary);
    }
    let (at, count) = (header.e_shoff(endian), header.e_shnum(endian));
    // A count of 0 means "see section 0", for more than 65 279 sections: no plugin, and not a number to trust.
    if at == 0 || count == 0 {
        return Err(SectionError::NotPlugin);
    }
    if usize::from(header.e_shentsize(endian)) != size_of::<SectionHeader64<Endianness>>() {
        return Err(SectionError::Truncated);
    }
    let count = usize::from(count);
    let table = read(
        file,
        at,
        (count * size_of::<SectionHeader64<Endianness>>()) as u64,
    )?;
    let (headers, _) =
        slice_from_bytes::<SectionHeader64<Endianness>>(&table, count).map_err(cut)?;
    let names = headers
        .get(usize::from(header.e_shstrndx(endian).0))
        .ok_or(SectionError::Truncated)?;
    if names.sh_size(endian) > NAMES_MAX {
        return Err(SectionError::NotPlugin);
    }
    let names = read(file, names.sh_offset(endian), names.sh_size(endian))?;
    let from = |header: &SectionHeader64<Endianness>| {
        let start = usize::try_from(header.sh_name(endian)).ok()?;
        names.get(start..)
    };
    let is_wanted = |header: &&SectionHeader64<Endianness>| {
        let rest = from(header).and_then(|name| name.strip_prefix(SECTION.as_bytes()));
        rest.is_some_and(|rest| rest.starts_with(&[0]))
    };
    let Some(section) = headers.iter().find(is_wanted) else {
        // With the name table gone nothing has a name; that is damage, not another kind of library.
        let named = |header| from(header).is_some_and(|name| name.contains(&0));
        return Err(match headers.iter().all(named) {
            true => SectionError::NotPlugin,
            false => SectionError::Truncated,
        });
    };
    let size = section.sh_size(endian);
    if size > MANIFEST_MAX {
        return Err(SectionError::TooLarge(size));
    }
    read(file, section.sh_offset(endian), size)
}

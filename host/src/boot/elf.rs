//! 64-bit ELF programs: Linux's vmlinux, or a freestanding program of the same kind.

use std::ops::Range;

use anyhow::{Context, Result, anyhow, bail, ensure};
use linux_loader::bootparam::setup_header;
use object::LittleEndian as Le;
use object::elf::{
    ELFCLASS64, ELFDATA2LSB, ELFMAG, EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PT_INTERP, PT_LOAD,
    ProgramHeader64, SHF_ALLOC, SHF_TLS, SHT_NOBITS, SectionHeader64,
};

use super::entry::RESERVED;
use super::image::Image;
use super::linux::Loaded;
use crate::memory::GuestMemory;

/// COMMAND_LINE_SIZE of an x86 Linux, less the final 0.
const CMDLINE_MAX: u32 = 2047;
/// More than any kernel has, and little to read.
const MAX_SEGMENTS: u16 = 128;
/// Those behind are taken to have contents.
const MAX_SECTIONS: u16 = 1024;

/// Loads `image`, or returns `None` if it is no ELF file. `memory` is all zeros, or has been `used`.
pub(super) fn load(image: &Image, memory: &GuestMemory, used: bool) -> Result<Option<Loaded>> {
    let head = image.head::<{ size_of::<FileHeader64<Le>>() }>()?;
    if !head.starts_with(&ELFMAG) {
        return Ok(None);
    }
    let (header, _) = object::from_bytes::<FileHeader64<Le>>(&head)
        .map_err(|()| anyhow!("{image}: ELF header"))?;
    check(header).with_context(|| format!("Cannot load {image}"))?;
    let count = header.e_phnum.get(Le);
    ensure!(
        (1..=MAX_SEGMENTS).contains(&count),
        "Cannot load {image}: it has {count} program headers"
    );
    let mut table = vec![0; usize::from(count) * size_of::<ProgramHeader64<Le>>()];
    image.read_at(header.e_phoff.get(Le), &mut table)?;
    let (segments, _) = object::slice_from_bytes::<ProgramHeader64<Le>>(&table, count.into())
        .map_err(|()| anyhow!("{image}: program headers"))?;
    if segments
        .iter()
        .any(|segment| segment.p_type.get(Le) == PT_INTERP)
    {
        bail!(
            "Cannot load {image}: it is an ordinary program that needs a dynamic linker, not a kernel"
        );
    }

    let empty = empty_sections(image, header);
    let mut end = 0;
    for segment in segments
        .iter()
        .filter(|segment| segment.p_type.get(Le) == PT_LOAD && segment.p_memsz.get(Le) > 0)
    {
        end = end.max(load_segment(image, memory, segment, &empty, used)?);
    }
    let entry = entry_address(header.e_entry.get(Le), segments)
        .with_context(|| format!("Cannot load {image}: its entry point lies in no segment"))?;
    Ok(Some(Loaded {
        entry,
        end,
        header: boot_header(),
    }))
}

fn check(header: &FileHeader64<Le>) -> Result<()> {
    let ident = &header.e_ident;
    let machine = header.e_machine.get(Le);
    ensure!(
        ident.class == ELFCLASS64,
        "it is a 32-bit ELF file, and needs a 64-bit entry point"
    );
    ensure!(
        ident.data == ELFDATA2LSB && machine == EM_X86_64,
        "it is an ELF file for another CPU ({machine:?})"
    );
    let kind = header.e_type.get(Le);
    ensure!(
        kind == ET_EXEC || kind == ET_DYN,
        "it is an ELF object, library or core file (type {kind:?})"
    );
    ensure!(
        usize::from(header.e_phentsize.get(Le)) == size_of::<ProgramHeader64<Le>>(),
        "its ELF program headers have an odd size"
    );
    Ok(())
}

/// Returns the end of what it occupies.
fn load_segment(
    image: &Image,
    memory: &GuestMemory,
    segment: &ProgramHeader64<Le>,
    empty: &[Range<u64>],
    used: bool,
) -> Result<u64> {
    let (address, size) = (segment.p_paddr.get(Le), segment.p_memsz.get(Le));
    let in_file = segment.p_filesz.get(Le);
    ensure!(
        in_file <= size,
        "Cannot load {image}: a segment is larger in the file than in memory"
    );
    ensure!(
        address >= RESERVED,
        "Cannot load {image}: it wants memory at {address:#x}, and what lies below {RESERVED:#x} is the loader's"
    );
    let end = address
        .checked_add(size)
        .filter(|&end| end <= memory.low_end());
    let end = end.with_context(|| {
        format!(
            "Cannot load {image}: it needs {size:#x} bytes at {address:#x}, and the guest's memory ends at {:#x}: raise \
             [main] memory",
            memory.low_end()
        )
    })?;
    let mut at = 0;
    for gap in empty {
        let from = gap.start.saturating_sub(segment.p_vaddr.get(Le));
        let to = gap.end.saturating_sub(segment.p_vaddr.get(Le)).min(in_file);
        if from >= at && from < to {
            copy(image, memory, segment, used, at..from)?;
            if used {
                memory.zero(address + from, to - from)?;
            }
            at = to;
        }
    }
    copy(image, memory, segment, used, at..in_file)?;
    if used && in_file < size {
        // What the file does not say is 0 (System V ABI, "Program Header", p_memsz).
        memory.zero(address + in_file, size - in_file)?;
    }
    Ok(end)
}

/// Copies part of a segment, counted from its start.
fn copy(
    image: &Image,
    memory: &GuestMemory,
    segment: &ProgramHeader64<Le>,
    used: bool,
    part: Range<u64>,
) -> Result<()> {
    if part.is_empty() {
        return Ok(());
    }
    let offset = segment.p_offset.get(Le).saturating_add(part.start);
    let address = segment.p_paddr.get(Le) + part.start;
    image.load(memory, used, offset, address, part.end - part.start)
}

/// Where sections without contents lie in virtual memory, by ascending address. Linux's vmlinux has its bss in a segment as megabytes
/// of zeros, which need not be looked at. Nothing depends on it: a file may have no sections.
fn empty_sections(image: &Image, header: &FileHeader64<Le>) -> Vec<Range<u64>> {
    let count = header.e_shnum.get(Le).min(MAX_SECTIONS);
    let mut table = vec![0; usize::from(count) * size_of::<SectionHeader64<Le>>()];
    if image.read_at(header.e_shoff.get(Le), &mut table).is_err() {
        return Vec::new();
    }
    let sections = object::slice_from_bytes::<SectionHeader64<Le>>(&table, count.into());
    let sections = sections.map_or(&[][..], |(sections, _)| sections);
    let mut empty: Vec<_> = sections
        .iter()
        .filter(|section| {
            let flags = section.sh_flags.get(Le);
            // Those of thread-local storage lie over others.
            section.sh_type.get(Le) == SHT_NOBITS
                && flags.0 & SHF_ALLOC.0 != 0
                && flags.0 & SHF_TLS.0 == 0
        })
        .map(|section| {
            let start = section.sh_addr.get(Le);
            start..start.saturating_add(section.sh_size.get(Le))
        })
        .collect();
    empty.sort_by_key(|range| range.start);
    empty
}

/// The physical entry point: vmlinux states it so, other programs by the address they are linked at.
fn entry_address(entry: u64, segments: &[ProgramHeader64<Le>]) -> Option<u64> {
    let loads = || {
        segments
            .iter()
            .filter(|segment| segment.p_type.get(Le) == PT_LOAD)
    };
    let within = |start: u64, segment: &ProgramHeader64<Le>| {
        entry
            .checked_sub(start)
            .filter(|&offset| offset < segment.p_filesz.get(Le))
    };
    if loads().any(|segment| within(segment.p_paddr.get(Le), segment).is_some()) {
        return Some(entry);
    }
    loads().find_map(|segment| {
        Some(segment.p_paddr.get(Le) + within(segment.p_vaddr.get(Le), segment)?)
    })
}

/// What a bzImage would have said of itself.
fn boot_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        kernel_alignment: 16 << 20,
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: CMDLINE_MAX,
        ..Default::default()
    }
}

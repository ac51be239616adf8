//! Places a kernel with its initrd, which needs the guest's memory alone, and later writes command line and zero page, which tell
//! it of them and of the machine.

use anyhow::{Context, Result, bail, ensure};
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::entry::{BOOT_PARAMS, CMDLINE, CMDLINE_ROOM, Entry};
use super::image::Image;
use super::{bzimage, elf};
use crate::machine::e820::{E820Entry, EBDA};
use crate::memory::{GuestMemory, PAGE};

/// BIOS data area: segment of the extended BIOS data area, and KiB of memory below it. Kernels and tools look there for what
/// to leave alone.
const BDA_EBDA: u64 = 0x40e;
const BDA_BASE_KIB: u64 = 0x413;
/// "Undefined" boot loader (boot.rst, type_of_loader).
const LOADER_UNDEFINED: u8 = 0xff;

/// What a placed kernel is told when it is entered.
#[derive(Clone, Copy, Debug)]
pub struct DirectBoot<'a> {
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// The memory map, by ascending address.
    pub e820: &'a [E820Entry],
    /// Guest address of ACPI's RSDP, or 0.
    pub rsdp: u64,
    /// How many bits a physical address has on the guest's CPUs.
    pub address_bits: u32,
    /// A guest has run in this memory already. It keeps what it holds, as RAM does over a reset.
    pub used: bool,
}

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Guest physical address of its 64-bit entry point.
    pub entry: u64,
    /// First address that it leaves free.
    pub end: u64,
    /// Its own boot header, or what stands for one.
    pub header: setup_header,
}

/// A kernel in guest memory with its initrd, not told of its machine yet.
#[derive(Debug)]
pub struct Placed {
    entry: u64,
    header: setup_header,
}

/// Puts a bzImage or a 64-bit ELF file, and its initrd if any, into `memory`, which is all zeros, or has been `used` by a guest. Touches
/// no page more than it must.
///
/// # Errors
/// No kernel, or something doesn't fit. The text names the file, and what it is instead or how much it needs.
pub fn place(
    memory: &GuestMemory,
    kernel: &Image,
    initrd: Option<&Image>,
    used: bool,
) -> Result<Placed> {
    let loaded = match bzimage::load(kernel, memory, used)? {
        Some(loaded) => loaded,
        None => match elf::load(kernel, memory, used)? {
            Some(loaded) => loaded,
            None => bail!("{kernel} is not a kernel: {}", kernel.guess()?),
        },
    };
    let mut header = loaded.header;
    if let Some(initrd) = initrd {
        load_initrd(memory, initrd, used, loaded.end, &mut header)?;
    }
    Ok(Placed {
        entry: loaded.entry,
        header,
    })
}

/// Writes what a kernel in `memory` looks at first, all of it below 1 MiB.
///
/// # Errors
/// Something doesn't fit. The text says how much room there is.
pub fn prepare(memory: &GuestMemory, placed: &Placed, boot: &DirectBoot<'_>) -> Result<Entry> {
    if boot.used {
        // Interrupt vectors and the BIOS's variables, which firmware would have set up anew.
        memory.zero(0, PAGE)?;
    }
    memory.write_object(BDA_EBDA, (EBDA >> 4) as u16)?;
    memory.write_object(BDA_BASE_KIB, (EBDA >> 10) as u16)?;
    let mut params = boot_params {
        hdr: placed.header,
        acpi_rsdp_addr: boot.rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    write_cmdline(memory, boot.cmdline, &mut params.hdr)?;
    write_e820(boot.e820, &mut params)?;
    memory.write(BOOT_PARAMS, params.as_slice())?;
    Entry::prepare(memory, placed.entry, boot.address_bits)
        .context("Cannot prepare the guest's first CPU")
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str, header: &mut setup_header) -> Result<()> {
    let max = (header.cmdline_size as usize).min(CMDLINE_ROOM - 1);
    let len = cmdline.len();
    ensure!(
        len <= max,
        "[main] cmdline has {len} bytes, and this kernel takes at most {max}"
    );
    ensure!(
        !cmdline.contains('\0'),
        "[main] cmdline contains a NUL character, where the kernel would stop reading"
    );
    memory.write(CMDLINE, cmdline.as_bytes())?;
    memory.write_object(CMDLINE + len as u64, 0u8)?;
    header.cmd_line_ptr = u32::try_from(CMDLINE)?;
    Ok(())
}

/// As high as the kernel can reach, so that it is out of the way of what the kernel allocates early.
fn load_initrd(
    memory: &GuestMemory,
    initrd: &Image,
    used: bool,
    kernel_end: u64,
    header: &mut setup_header,
) -> Result<()> {
    let top = memory.low_end().min(u64::from(header.initrd_addr_max) + 1);
    let size = initrd.bytes();
    let address = top.checked_sub(size).map(|address| address & !(PAGE - 1));
    let Some(address) = address.filter(|&address| address >= kernel_end) else {
        bail!(
            "Cannot load {initrd}: its {size} bytes don't fit between the kernel's end at {kernel_end:#x} and {top:#x}: \
             raise [main] memory"
        );
    };
    initrd.load(memory, used, 0, address, size)?;
    header.ramdisk_image = u32::try_from(address)?;
    header.ramdisk_size = u32::try_from(size)?;
    Ok(())
}

fn write_e820(map: &[E820Entry], params: &mut boot_params) -> Result<()> {
    let room = { params.e820_table }.len();
    ensure!(
        map.len() <= room,
        "The memory map has {} ranges, and the zero page takes {room}",
        map.len()
    );
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.len,
            r#type: entry.kind as u32,
        };
    }
    params.e820_table = table;
    params.e820_entries = u8::try_from(map.len())?;
    Ok(())
}

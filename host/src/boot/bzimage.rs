//! Linux's bzImage (Documentation/arch/x86/boot.rst, "The real-mode kernel header").

use anyhow::{Result, ensure};
use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::image::Image;
use super::linux::Loaded;
use crate::memory::GuestMemory;

const HEADER: usize = 0x1f1;
/// Offset of the byte that, with 0x202, says where the header ends.
const HEADER_END: usize = 0x201;
const HEADER_MAX: usize = 0x202 + 0xff;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// First version whose header tells of the 64-bit entry point.
const OLDEST: u16 = 0x020c;
/// The 64-bit entry point lies this far into the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

/// Loads `image`, or returns `None` if it is no bzImage. `memory` is all zeros, or has been `used`.
pub(super) fn load(image: &Image, memory: &GuestMemory, used: bool) -> Result<Option<Loaded>> {
    let head = image.head::<HEADER_MAX>()?;
    let mut header = setup_header::default();
    let end = (0x202 + usize::from(head[HEADER_END])).min(HEADER + size_of::<setup_header>());
    header.as_mut_slice()[..end - HEADER].copy_from_slice(&head[HEADER..end]);
    if header.header != MAGIC {
        return Ok(None);
    }
    let version = header.version;
    let old = version < OLDEST
        || header.xloadflags & XLF_KERNEL_64 == 0
        || header.loadflags & LOADED_HIGH == 0;
    ensure!(
        !old,
        "Cannot load {image}: it has no 64-bit entry point (boot protocol {:#x})",
        version
    );

    let sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let offset = (sectors + 1) * SECTOR;
    ensure!(
        offset < image.bytes(),
        "Cannot load {image}: it ends before its kernel, at {} bytes",
        image.bytes()
    );
    let (address, len) = (header.pref_address, image.bytes() - offset);
    // It unpacks itself in place, for which it needs `init_size` bytes.
    let end = address.checked_add(len.max(u64::from(header.init_size)));
    ensure!(
        address >= super::entry::RESERVED && end.is_some_and(|end| end <= memory.low_end()),
        "Cannot load {image}: it needs memory from {address:#x} to {:#x}, and the guest's ends at {:#x}: raise [main] memory",
        end.unwrap_or(u64::MAX),
        memory.low_end()
    );
    image.load(memory, used, offset, address, len)?;
    header.code32_start = u32::try_from(address)?;
    Ok(Some(Loaded {
        entry: address + ENTRY_64,
        end: end.unwrap_or(address),
        header,
    }))
}

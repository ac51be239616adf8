//! What the loader left in memory, the DMA pool, and mappings above 4 GiB.

use crate::io::{read8, read16, read32, read64, write64};
use core::arch::asm;
use core::sync::atomic::{AtomicUsize, Ordering};

unsafe extern "C" {
    static mut bss_start: u8;
    static mut bss_end: u8;
    static boot_params: u64;
    static pvh_start_info: u64;
    static pdpt: u64;
    static dma_pool: u8;
    static spare_directories: u8;
}

/// Clears what the loader may not have: after a reset in place the last boot's values are there.
pub fn clear_bss() {
    // SAFETY: the linker script puts both symbols around .bss, and no stack or pool lies in it.
    unsafe {
        let start = &raw mut bss_start;
        let length = (&raw mut bss_end).offset_from(start) as usize;
        memset(start, 0, length);
    }
}

/// Address of Linux's boot_params, or 0 when the entry was another one.
pub fn zero_page() -> u64 {
    // SAFETY: written once by `boot.s` before this code runs.
    unsafe { (&raw const boot_params).read_volatile() }
}

fn start_info() -> u64 {
    // SAFETY: as above.
    unsafe { (&raw const pvh_start_info).read_volatile() }
}

/// A copy of the command line, cut at 512 bytes.
pub struct CommandLine {
    bytes: [u8; 512],
    length: usize,
}

impl CommandLine {
    /// The words of the line.
    pub fn words(&self) -> impl Iterator<Item = &str> {
        let text = core::str::from_utf8(&self.bytes[..self.length]).unwrap_or("");
        text.split_ascii_whitespace()
    }

    /// The value of `key=value`, or "" for a bare `key`.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.words().find_map(|word| match word.split_once('=') {
            Some((name, value)) if name == key => Some(value),
            None if word == key => Some(""),
            _ => None,
        })
    }

    /// The number in `key=number`, or the default when it is absent or no number.
    pub fn number(&self, key: &str, default: u64) -> u64 {
        self.value(key)
            .and_then(|v| v.parse().ok())
            .unwrap_or(default)
    }
}

/// Reads the command line that the boot protocol points to.
pub fn command_line() -> CommandLine {
    let address = match (zero_page(), start_info()) {
        (0, 0) => 0,
        // hdr.cmd_line_ptr and ext_cmd_line_ptr, Linux Documentation/arch/x86/zero-page.rst.
        (page, 0) => u64::from(read32(page + 0x228)) | u64::from(read32(page + 0xc8)) << 32,
        // hvm_start_info.cmdline_paddr.
        (_, info) => read64(info + 24),
    };
    let mut line = CommandLine {
        bytes: [0; 512],
        length: 0,
    };
    if address != 0 {
        while line.length < line.bytes.len() {
            let byte = read8(address + line.length as u64);
            if byte == 0 {
                break;
            }
            line.bytes[line.length] = byte;
            line.length += 1;
        }
    }
    line
}

/// Address of the ACPI RSDP as the boot protocol gives it, or 0.
pub fn rsdp() -> u64 {
    match (zero_page(), start_info()) {
        (0, 0) => 0,
        (page, 0) => read64(page + 0x70),
        (_, info) => read64(info + 32),
    }
}

/// One e820 entry: start, length, type.
pub type Range = (u64, u64, u32);

/// The e820 entries in boot_params, none when the entry was PVH.
pub fn e820() -> impl Iterator<Item = Range> {
    let page = zero_page();
    let entries = if page == 0 { 0 } else { read8(page + 0x1e8) };
    (0..u64::from(entries.min(128))).map(move |i| {
        let entry = page + 0x2d0 + i * 20;
        (read64(entry), read64(entry + 8), read32(entry + 16))
    })
}

/// The setup header's magic, 0x53726448 ("HdrS") from a careful loader.
pub fn header_magic() -> u32 {
    read32(zero_page() + 0x202)
}

/// The setup header's boot flag, 0xaa55.
pub fn boot_flag() -> u16 {
    read16(zero_page() + 0x1fe)
}

/// Makes an address above 4 GiB accessible, uncached, and returns it.
pub fn map(address: u64) -> u64 {
    const DIRECTORIES: usize = 8;
    static USED: AtomicUsize = AtomicUsize::new(0);
    let slot = (address >> 30) as usize;
    if slot < 4 {
        return address;
    }
    assert!(slot < 512, "the address {address:#x} is above 512 GiB");
    let table = (&raw const pdpt) as u64 + slot as u64 * 8;
    if read64(table) == 0 {
        let n = USED.fetch_add(1, Ordering::Relaxed);
        assert!(
            n < DIRECTORIES,
            "no page directory left to map {address:#x}"
        );
        let directory = (&raw const spare_directories) as u64 + n as u64 * 4096;
        for i in 0..512u64 {
            write64(directory + i * 8, ((slot as u64) << 30) + (i << 21) + 0xff);
        }
        // An entry that was not present is never cached, so nothing needs to be flushed.
        write64(table, directory + 0x27);
    }
    address
}

/// Size of the pool in `boot.s` that rings and buffers come from.
const POOL: usize = 4 << 20;

static POOL_USED: AtomicUsize = AtomicUsize::new(0);

/// Memory for a device: page aligned, zeroed, its virtual and physical addresses equal.
#[derive(Clone, Copy)]
pub struct Dma {
    address: u64,
    length: usize,
}

impl Dma {
    /// Where it is, for the processor and for devices.
    pub fn address(self) -> u64 {
        self.address
    }

    /// Its part from an offset on.
    pub fn from(self, offset: usize) -> Self {
        Dma {
            address: self.address + offset as u64,
            length: self.length - offset,
        }
    }

    /// Fills it with bytes made from a seed, different at each place.
    pub fn fill(self, seed: u64) {
        for i in 0..self.length as u64 / 8 {
            write64(self.address + i * 8, pattern(seed, i));
        }
    }

    /// Whether it holds what `fill` with this seed would have written in the first `length` bytes.
    pub fn holds(self, seed: u64, length: usize) -> bool {
        (0..length as u64 / 8).all(|i| read64(self.address + i * 8) == pattern(seed, i))
    }

    /// Whether every byte of the first `length` is the given one.
    pub fn all(self, byte: u8, length: usize) -> bool {
        let wide = u64::from(byte) * 0x0101_0101_0101_0101;
        (0..length as u64 / 8).all(|i| read64(self.address + i * 8) == wide)
    }

    /// Sets every byte.
    pub fn set(self, byte: u8) {
        let wide = u64::from(byte) * 0x0101_0101_0101_0101;
        for i in 0..self.length as u64 / 8 {
            write64(self.address + i * 8, wide);
        }
    }

    /// Its first bytes, as text up to the first NUL.
    pub fn text(self, into: &mut [u8]) -> &str {
        let mut length = 0;
        while length < into.len().min(self.length) {
            match read8(self.address + length as u64) {
                0 => break,
                byte => into[length] = byte,
            }
            length += 1;
        }
        core::str::from_utf8(&into[..length]).unwrap_or("(not UTF-8)")
    }
}

fn pattern(seed: u64, index: u64) -> u64 {
    (seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd129_0bfd_6e1b_2a45) | 1
}

/// Takes memory from the pool.
pub fn dma(length: usize) -> Dma {
    let length = length.next_multiple_of(4096);
    let offset = POOL_USED.fetch_add(length, Ordering::Relaxed);
    assert!(offset + length <= POOL, "the DMA pool is used up");
    let memory = Dma {
        address: (&raw const dma_pool) as u64 + offset as u64,
        length,
    };
    memory.set(0);
    memory
}

/// How much of the pool is used, for `free_to`.
pub fn mark() -> usize {
    POOL_USED.load(Ordering::Relaxed)
}

/// Gives back everything taken since the mark. No device may use it any more.
pub fn free_to(mark: usize) {
    POOL_USED.store(mark, Ordering::Relaxed);
}

// What compiled code calls and a C library would have.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's contract is memcpy's.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: moving upwards through memory is right when `to` is not inside the source.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller's contract is memmove's; from the end down nothing is overwritten early,
    // and the direction flag is clear again after it.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _,
            inout("rdi") to.add(count).sub(1) => _, inout("rsi") from.add(count).sub(1) => _, options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's contract is memset's.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8, options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for i in 0..count {
        // SAFETY: the caller's contract is memcmp's.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, count) }
}

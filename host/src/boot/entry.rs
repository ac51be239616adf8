//! The CPU state that Linux's 64-bit boot protocol asks for (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use anyhow::Result;

use crate::hypervisor::{DescriptorTable, Registers, Segment, Vcpu};
use crate::memory::{GuestMemory, HIGH_START, LOW_END};

/// Below this lies what direct boot itself puts into memory; a kernel starts here or above.
pub(super) const RESERVED: u64 = 1 << 20;
const GDT: u64 = 0x500;
/// The zero page.
pub(super) const BOOT_PARAMS: u64 = 0x7000;
const STACK_TOP: u64 = 0x9000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
/// Four page directories of 1 GiB each.
const PAGE_DIRECTORIES: u64 = 0xb000;
const GIGABYTES: u64 = 4;
/// The command line, up to 64 KiB.
pub(super) const CMDLINE: u64 = 0x2_0000;
pub(super) const CMDLINE_ROOM: usize = 0x1_0000;

/// Selectors that the protocol fixes: __BOOT_CS and __BOOT_DS.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TR: u16 = 0x20;

const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;

/// IA32_MTRR_DEF_TYPE: MTRRs on, the fixed ones too, and all memory write-back where none says otherwise, as firmware
/// leaves it.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 1 << 10 | 6);
/// Fixed ranges (Intel SDM volume 3, table 12-9), all below 1 MiB: write-back but for 0xa0000 to 0xbffff, which the memory
/// map leaves out.
const MTRR_FIXED: [(u32, u64); 11] = [
    (0x250, WRITE_BACK),
    (0x258, WRITE_BACK),
    (0x259, 0),
    (0x268, WRITE_BACK),
    (0x269, WRITE_BACK),
    (0x26a, WRITE_BACK),
    (0x26b, WRITE_BACK),
    (0x26c, WRITE_BACK),
    (0x26d, WRITE_BACK),
    (0x26e, WRITE_BACK),
    (0x26f, WRITE_BACK),
];
const WRITE_BACK: u64 = 0x0606_0606_0606_0606;
/// The first variable range (Intel SDM volume 3, section 12.11.2.3) takes out what is above RAM and below 4 GiB.
const MTRR_PHYSBASE0: (u32, u64) = (0x200, LOW_END);
const MTRR_PHYSMASK0: u32 = 0x201;
const MTRR_VALID: u64 = 1 << 11;

/// How CPU 0 enters a loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    registers: Registers,
    address_bits: u32,
}

impl Entry {
    /// Writes the descriptor and page tables that `address` is entered with.
    pub(super) fn prepare(memory: &GuestMemory, address: u64, address_bits: u32) -> Result<Self> {
        let code = Segment {
            selector: BOOT_CS,
            base: 0,
            limit: 0xffff_ffff,
            access: 0xa09b,
        };
        let data = Segment {
            selector: BOOT_DS,
            base: 0,
            limit: 0xffff_ffff,
            access: 0xc093,
        };
        let task = Segment {
            selector: BOOT_TR,
            base: 0,
            limit: 0x67,
            access: 0x8b,
        };
        let gdt = [
            0,
            0,
            descriptor(&code),
            descriptor(&data),
            descriptor(&task),
            0,
        ];
        for (at, entry) in (GDT..).step_by(8).zip(gdt) {
            memory.write_object(at, entry)?;
        }
        write_page_tables(memory)?;
        let registers = Registers {
            rip: address,
            rsi: BOOT_PARAMS,
            rsp: STACK_TOP - 16,
            rbp: STACK_TOP - 16,
            rflags: 2,
            cs: code,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: task,
            ldt: Segment {
                access: 1 << 16 | 0x82,
                ..Segment::default()
            },
            gdt: DescriptorTable {
                base: GDT,
                limit: gdt.len() as u16 * 8 - 1,
            },
            cr0: 0x8000_0011,
            cr3: PML4,
            cr4: 1 << 5,
            efer: 0x500,
            ..Registers::default()
        };
        Ok(Self {
            registers,
            address_bits,
        })
    }

    /// Does firmware's part for CPU `cpu`, which is in power-on state and not running: memory types on every CPU, for a
    /// kernel compares them, and the entry's registers on CPU 0. The kernel starts the others itself.
    ///
    /// # Errors
    /// The hypervisor refused.
    pub fn apply(&self, cpu: u32, vcpu: &mut impl Vcpu) -> Result<()> {
        let bits = self.address_bits.clamp(36, 52);
        let mask = ((1 << bits) - (HIGH_START - LOW_END)) | MTRR_VALID;
        let variable = [MTRR_PHYSBASE0, (MTRR_PHYSMASK0, mask), MTRR_DEF_TYPE];
        let all: Vec<_> = MTRR_FIXED.into_iter().chain(variable).collect();
        if let Err(error) = vcpu.set_msrs(&all) {
            // A guest without MTRRs takes all memory for write-back anyway.
            log::debug!("No MTRRs: {error:#}");
        }
        if cpu == 0 {
            vcpu.set_registers(&self.registers)
        } else {
            Ok(())
        }
    }

    /// Guest physical address of the first instruction.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.registers.rip
    }
}

/// As it stands in a descriptor table (Intel SDM volume 3, section 3.4.5).
fn descriptor(segment: &Segment) -> u64 {
    let (base, access) = (segment.base, u64::from(segment.access));
    let limit = u64::from(if access & 1 << 15 != 0 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | (access & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | (access >> 12 & 0xf) << 52
        | (base >> 24 & 0xff) << 56
}

/// Maps the first 4 GiB one to one with 2 MiB pages, which every 64-bit CPU has.
fn write_page_tables(memory: &GuestMemory) -> Result<()> {
    // Whole pages: on a restart the guest has left something in them.
    let mut pml4 = [0; 4096];
    pml4[..8].copy_from_slice(&(PDPT | PRESENT_WRITABLE).to_le_bytes());
    memory.write(PML4, &pml4)?;
    let mut pdpt = [0; 4096];
    for (gigabyte, bytes) in (0..GIGABYTES).zip(pdpt.chunks_exact_mut(8)) {
        let directory = PAGE_DIRECTORIES + gigabyte * 0x1000;
        bytes.copy_from_slice(&(directory | PRESENT_WRITABLE).to_le_bytes());
    }
    memory.write(PDPT, &pdpt)?;
    for gigabyte in 0..GIGABYTES {
        let directory = PAGE_DIRECTORIES + gigabyte * 0x1000;
        let mut page = [0; 4096];
        for (entry, bytes) in (gigabyte * 512..).zip(page.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&(entry << 21 | LARGE | PRESENT_WRITABLE).to_le_bytes());
        }
        memory.write(directory, &page)?;
    }
    Ok(())
}

//! What to show when a guest dies or stays silent: registers and code in words, and when the start-up reached what.

use std::fmt::Write;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::hypervisor::{Registers, Segment, Vcpu};
use crate::memory::GuestMemory;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const ENTRY_PRESENT: u64 = 1;
const ENTRY_LARGE: u64 = 1 << 7;
const ENTRY_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const CODE_BEFORE: u64 = 16;
const CODE_BYTES: usize = 48;

/// A vCPU's registers, its mode and the code around its instruction pointer, over several lines. Call it on the thread
/// that runs the vCPU, or while it is parked.
pub fn describe(vcpu: &impl Vcpu, memory: &GuestMemory) -> String {
    match vcpu.registers() {
        Ok(registers) => describe_registers(&registers, memory),
        Err(error) => format!("  Its registers are not known: {error:#}"),
    }
}

/// As [`describe`], for registers read before.
pub fn describe_registers(r: &Registers, memory: &GuestMemory) -> String {
    let mut text = format!("  {}, ring {}", mode(r), r.ss.access >> 5 & 3);
    let general = [
        [
            ("rip", r.rip),
            ("rsp", r.rsp),
            ("rbp", r.rbp),
            ("flags", r.rflags),
        ],
        [
            ("rax", r.rax),
            ("rbx", r.rbx),
            ("rcx", r.rcx),
            ("rdx", r.rdx),
        ],
        [("rsi", r.rsi), ("rdi", r.rdi), ("r8", r.r8), ("r9", r.r9)],
        [
            ("r10", r.r10),
            ("r11", r.r11),
            ("r12", r.r12),
            ("r13", r.r13),
        ],
        [
            ("r14", r.r14),
            ("r15", r.r15),
            ("cr0", r.cr0),
            ("cr2", r.cr2),
        ],
        [
            ("cr3", r.cr3),
            ("cr4", r.cr4),
            ("efer", r.efer),
            ("gdt", r.gdt.base),
        ],
    ];
    for line in general {
        text.push_str("\n ");
        for (name, value) in line {
            // Writing to a String can't fail.
            let _ = write!(text, " {name:<5} {value:016x}");
        }
    }
    for (name, segment) in [
        ("cs", &r.cs),
        ("ds", &r.ds),
        ("es", &r.es),
        ("fs", &r.fs),
        ("gs", &r.gs),
        ("ss", &r.ss),
    ] {
        let Segment {
            selector,
            base,
            limit,
            access,
        } = segment;
        let _ = write!(
            text,
            "\n  {name} {selector:04x} base {base:x} limit {limit:x} access {access:x}"
        );
    }
    let _ = write!(text, "\n  idt {:x} limit {:x}", r.idt.base, r.idt.limit);
    let _ = write!(text, "\n  code {}", code(r, memory));
    text
}

fn mode(r: &Registers) -> &'static str {
    match (
        r.cr0 & CR0_PE != 0,
        r.efer & EFER_LMA != 0,
        r.cs.access & 1 << 13 != 0,
        r.cs.access & 1 << 14 != 0,
    ) {
        (false, ..) => "Real mode",
        (true, true, true, _) => "64-bit mode",
        (true, true, false, _) => "Compatibility mode",
        (true, false, _, true) => "32-bit protected mode",
        (true, false, _, false) => "16-bit protected mode",
    }
}

/// The bytes around the instruction pointer, that at the pointer itself in brackets.
fn code(r: &Registers, memory: &GuestMemory) -> String {
    let long = r.efer & EFER_LMA != 0 && r.cs.access & 1 << 13 != 0;
    let at = if long {
        r.rip
    } else {
        r.cs.base.wrapping_add(r.rip) & 0xffff_ffff
    };
    let mut text = format!("at {at:x}:");
    for index in 0..CODE_BYTES as u64 {
        let address = at.wrapping_sub(CODE_BEFORE).wrapping_add(index);
        let byte = translate(r, memory, address).and_then(|gpa| memory.read_object::<u8>(gpa).ok());
        let _ = match byte {
            Some(byte) if index == CODE_BEFORE => write!(text, " [{byte:02x}]"),
            Some(byte) => write!(text, " {byte:02x}"),
            None if index == CODE_BEFORE => write!(text, " [not in RAM]"),
            None => write!(text, " --"),
        };
    }
    text
}

/// The guest physical address that the vCPU's page tables give `linear` (Intel SDM volume 3, chapter 4), if any.
/// Nothing is marked as accessed.
pub fn translate(r: &Registers, memory: &GuestMemory, linear: u64) -> Option<u64> {
    if r.cr0 & CR0_PG == 0 {
        return Some(linear);
    }
    if r.cr4 & CR4_PAE == 0 {
        return translate_32(r, memory, linear);
    }
    let long = r.efer & EFER_LMA != 0;
    let levels = if !long {
        3
    } else if r.cr4 & CR4_LA57 != 0 {
        5
    } else {
        4
    };
    let mut table = if long {
        r.cr3 & ENTRY_ADDRESS
    } else {
        r.cr3 & 0xffff_ffe0
    };
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let entry: u64 = memory
            .read_object(table + (linear >> shift & 0x1ff) * 8)
            .ok()?;
        if entry & ENTRY_PRESENT == 0 {
            return None;
        }
        let large = (level == 1 || level == 2 && long) && entry & ENTRY_LARGE != 0;
        if large || level == 0 {
            let offset = (1u64 << shift) - 1;
            return Some(entry & ENTRY_ADDRESS & !offset | linear & offset);
        }
        table = entry & ENTRY_ADDRESS;
    }
    None
}

/// Two levels of 4-byte entries, as 32-bit guests without PAE use.
fn translate_32(r: &Registers, memory: &GuestMemory, linear: u64) -> Option<u64> {
    let directory = r.cr3 & 0xffff_f000;
    let entry: u32 = memory
        .read_object(directory + (linear >> 22 & 0x3ff) * 4)
        .ok()?;
    let entry = u64::from(entry);
    if entry & ENTRY_PRESENT == 0 {
        return None;
    }
    if entry & ENTRY_LARGE != 0 {
        return Some(entry & 0xffc0_0000 | linear & 0x3f_ffff);
    }
    let page: u32 = memory
        .read_object((entry & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4)
        .ok()?;
    let page = u64::from(page);
    (page & ENTRY_PRESENT != 0).then_some(page & 0xffff_f000 | linear & 0xfff)
}

/// A step of a VM's start, in the order in which they usually come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Mark {
    /// The configuration was read and checked.
    ConfigRead,
    /// Every plugin that the VM needs is loaded.
    PluginsLoaded,
    /// The hypervisor made the VM and mapped its memory.
    VmCreated,
    /// Devices and backends exist.
    DevicesCreated,
    /// The kernel is in guest memory.
    KernelLoaded,
    /// The CPUs were told to run.
    Running,
    /// The guest first wrote to a port: it lives.
    FirstPortWrite,
}

const MARKS: [(Mark, &str); 7] = [
    (Mark::ConfigRead, "configuration read"),
    (Mark::PluginsLoaded, "plugins loaded"),
    (Mark::VmCreated, "VM created, memory mapped"),
    (Mark::DevicesCreated, "devices created"),
    (Mark::KernelLoaded, "kernel loaded"),
    (Mark::Running, "CPUs run"),
    (Mark::FirstPortWrite, "first port write"),
];

/// When a VM's start reached each [`Mark`]. Marking is lock-free and may be done on any thread, any number of times: the
/// first counts.
#[derive(Debug)]
pub struct Timeline {
    start: Instant,
    marks: [OnceLock<Duration>; MARKS.len()],
}

impl Timeline {
    /// Starts at `start`, best the first instant of `main`.
    pub fn new(start: Instant) -> Self {
        Self {
            start,
            marks: Default::default(),
        }
    }

    /// Says that `mark` was reached now, unless it had been before.
    pub fn mark(&self, mark: Mark) {
        if self.marks[mark as usize].get().is_none() {
            // Two threads may both see it unset: the loser's time is dropped.
            let _ = self.marks[mark as usize].set(self.start.elapsed());
        }
    }

    /// One line per mark that was reached, with the milliseconds since the start and since the line before.
    pub fn report(&self) -> String {
        let mut text = String::from("Boot timeline (ms since start, ms since the step before)");
        let mut before = Duration::ZERO;
        for (mark, name) in MARKS {
            if let Some(&at) = self.marks[mark as usize].get() {
                let step = at.saturating_sub(before);
                let (at_ms, step_ms) = (at.as_secs_f64() * 1e3, step.as_secs_f64() * 1e3);
                let _ = write!(text, "\n  {at_ms:9.3} {step_ms:9.3}  {name}");
                before = at;
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long_mode(memory: &GuestMemory) -> Registers {
        // PML4 at 0x1000, PDPT at 0x2000, PD at 0x3000, PT at 0x4000.
        memory.write_object(0x1000 + 511 * 8, 0x2003u64).unwrap();
        memory.write_object(0x2000 + 510 * 8, 0x3003u64).unwrap();
        memory.write_object(0x3000, 0x20_0083u64).unwrap();
        memory.write_object(0x3008, 0x4003u64).unwrap();
        memory
            .write_object(0x4000 + 5 * 8, 0x8000_0000_0000_7003u64)
            .unwrap();
        Registers {
            cr0: CR0_PE | CR0_PG,
            cr3: 0x1000,
            cr4: CR4_PAE,
            efer: EFER_LMA,
            cs: Segment {
                access: 0xa09b,
                ..Segment::default()
            },
            ..Registers::default()
        }
    }

    #[test]
    fn page_tables_are_walked() {
        let memory = GuestMemory::new(4 << 20).unwrap();
        let registers = long_mode(&memory);
        let base = 0xffff_ffff_8000_0000u64;
        assert_eq!(
            translate(&registers, &memory, base + 0x1234),
            Some(0x20_1234)
        );
        assert_eq!(
            translate(&registers, &memory, base + 0x20_5678),
            Some(0x7678)
        );
        assert_eq!(translate(&registers, &memory, base + 0x20_6000), None);
        assert_eq!(translate(&registers, &memory, 0), None);
        let real = Registers::default();
        assert_eq!(translate(&real, &memory, 0x7c00), Some(0x7c00));
    }

    #[test]
    fn thirty_two_bit_tables_are_walked() {
        let memory = GuestMemory::new(4 << 20).unwrap();
        memory.write_object(0x1000 + 4, 0x40_0083u32).unwrap();
        memory.write_object(0x1000, 0x2003u32).unwrap();
        memory.write_object(0x2000 + 7 * 4, 0x9003u32).unwrap();
        let registers = Registers {
            cr0: CR0_PE | CR0_PG,
            cr3: 0x1000,
            ..Registers::default()
        };
        assert_eq!(translate(&registers, &memory, 0x40_1234), Some(0x40_1234));
        assert_eq!(translate(&registers, &memory, 0x7abc), Some(0x9abc));
        assert_eq!(translate(&registers, &memory, 0x8000), None);
    }

    #[test]
    fn a_description_shows_mode_and_code() {
        let memory = GuestMemory::new(4 << 20).unwrap();
        let mut registers = long_mode(&memory);
        registers.rip = 0xffff_ffff_8000_1000;
        memory.write(0x20_0ff0, &[0x90; 16]).unwrap();
        memory.write(0x20_1000, &[0x0f, 0x0b]).unwrap();
        let text = describe_registers(&registers, &memory);
        assert!(text.contains("64-bit mode, ring 0"), "{text}");
        assert!(text.contains("90 90 [0f] 0b 00"), "{text}");
        registers.rip = 0x5000;
        assert!(describe_registers(&registers, &memory).contains("[not in RAM]"));
    }

    #[test]
    fn the_first_mark_counts() {
        let timeline = Timeline::new(Instant::now());
        timeline.mark(Mark::Running);
        let first = timeline.report();
        timeline.mark(Mark::Running);
        assert_eq!(timeline.report(), first);
        assert!(
            first.ends_with("CPUs run") && !first.contains("kernel"),
            "{first}"
        );
    }
}

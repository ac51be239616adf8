//! FADT and MADT: fixed hardware and interrupt controllers.

use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::machine::Board;
use crate::machine::pm::{
    GPE0_BASE, GPE0_LEN, PM_BASE, PM_TIMER, PM1_CONTROL, PM1_EVENT, SCI, SLEEP_CONTROL,
    SLEEP_STATUS,
};
use crate::machine::reset::{RESET_PORT, RESET_VALUE};
use crate::machine::rtc::CENTURY;
use crate::machine::{IOAPIC_BASE, LAPIC_BASE};
use crate::pci::LINK_GSI;

/// FADT flags (ACPI 6.4 table 5.10): WBINVD, C1 works, no sleep button, RTC can't wake, 32-bit timer, reset register.
/// The power button flag stays 0: there is one, in the fixed registers.
const FADT_FLAGS: u32 = 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10;
/// And without fixed hardware: WBINVD, no power button, no sleep button, reset register, hardware-reduced ACPI.
const FADT_FLAGS_REDUCED: u32 = 1 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20;
/// Boot flags without the PC of old: no VGA, no CMOS clock.
const BOOT_FLAGS_REDUCED: u16 = 1 << 2 | 1 << 5;
/// IA-PC boot flags (ACPI 6.4 table 5.11): devices on the ISA bus, no VGA.
const BOOT_FLAGS: u16 = 1 | 1 << 2;
/// The flag of a keyboard controller.
const BOOT_8042: u16 = 1 << 1;
/// A latency that says there is no such C state.
const NO_C2: u16 = 0xfff;
const NO_C3: u16 = 0xfff;

/// I/O APIC id, as the hypervisors' has at power-on.
const IOAPIC_ID: u8 = 0;
/// Active high (1) and level triggered (3 << 2) (ACPI 6.4 table 5.25).
const LEVEL_HIGH: u16 = 0b1101;
/// Local APIC ids from here on only an x2APIC has.
const FIRST_X2APIC: u32 = 255;
/// `ACPI Processor UID` that means all of them.
const ALL_CPUS: u8 = 0xff;

/// A generic address structure in I/O space (ACPI 6.4 section 5.2.3.2); `access` is 1, 2, 3 for byte, word, dword.
fn port(address: u16, bits: u8, access: u8) -> [u8; 12] {
    let mut gas = [1, bits, 0, access, 0, 0, 0, 0, 0, 0, 0, 0];
    gas[4..6].copy_from_slice(&address.to_le_bytes());
    gas
}

/// The revision of ACPI that the tables agree with is 6.5; of what it added to 6.4, which comments here cite, none is on
/// this board. The MADT's revision follows from it (ACPI 6.5 table 5.19).
const FADT_MINOR: u8 = 5;
const MADT_REVISION: u8 = 6;

/// FADT: which fields are pointers, and their widths: FIRMWARE_CTRL, DSDT, X_DSDT. The FACS, being below 4 GiB, has no
/// second one (ACPI 6.4 table 5.9).
pub(super) const FADT_POINTERS: [(usize, u8); 3] = [(36, 4), (40, 4), (140, 8)];

/// Fixed ACPI Description Table, revision 6 with its minor part.
pub(super) fn fadt(facs: u32, dsdt: u32, board: Board) -> Vec<u8> {
    let mut table = Sdt::new(*b"FACP", 276, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.write_u32(36, facs);
    table.write_u32(40, dsdt);
    table.write_bytes(116, &port(RESET_PORT, 8, 1));
    table.write_u8(128, RESET_VALUE);
    table.write_u8(131, FADT_MINOR);
    table.write_u64(140, u64::from(dsdt));
    if board.legacy {
        fixed_hardware(&mut table, board);
    } else {
        table.write_u16(109, BOOT_FLAGS_REDUCED);
        table.write_u32(112, FADT_FLAGS_REDUCED);
        table.write_bytes(244, &port(PM_BASE + SLEEP_CONTROL, 8, 1));
        table.write_bytes(256, &port(PM_BASE + SLEEP_STATUS, 8, 1));
    }
    table.as_slice().to_vec()
}

fn fixed_hardware(table: &mut Sdt, board: Board) {
    let (event, control) = (PM_BASE + PM1_EVENT, PM_BASE + PM1_CONTROL);
    let timer = PM_BASE + PM_TIMER;
    table.write_u16(46, u16::from(SCI));
    // SMI_CMD (48) stays 0: the machine is in ACPI mode from the start.
    table.write_u32(56, u32::from(event));
    table.write_u32(64, u32::from(control));
    table.write_u32(76, u32::from(timer));
    table.write_u32(80, u32::from(GPE0_BASE));
    table.write_bytes(88, &[4, 2, 0, 4, GPE0_LEN]);
    table.write_u16(96, NO_C2);
    table.write_u16(98, NO_C3);
    table.write_u8(108, CENTURY);
    let keyboard = if board.ps2 { BOOT_8042 } else { 0 };
    table.write_u16(109, BOOT_FLAGS | keyboard);
    table.write_u32(112, FADT_FLAGS);
    table.write_bytes(148, &port(event, 32, 2));
    table.write_bytes(172, &port(control, 16, 2));
    table.write_bytes(208, &port(timer, 32, 3));
    table.write_bytes(220, &port(GPE0_BASE, 8 * GPE0_LEN, 1));
}

fn interrupt_override(irq: u8, gsi: u32, flags: u16) -> [u8; 10] {
    let ([g0, g1, g2, g3], [f0, f1]) = (gsi.to_le_bytes(), flags.to_le_bytes());
    [2, 10, 0, irq, g0, g1, g2, g3, f0, f1]
}

/// Multiple APIC Description Table (ACPI 6.4 section 5.2.12), for CPUs with these local APIC ids.
pub(super) fn madt(apic_ids: &[u32], board: Board) -> Vec<u8> {
    let mut body = (LAPIC_BASE as u32).to_le_bytes().to_vec();
    // Whether there is a pair of 8259s too.
    body.extend(u32::from(board.legacy).to_le_bytes());
    // Ids never are smaller than the numbers of their CPUs, so a small entry has room for both.
    for (uid, &id) in (0_u32..).zip(apic_ids) {
        if id < FIRST_X2APIC {
            body.extend([0, 8, uid as u8, id as u8, 1, 0, 0, 0]);
        } else {
            body.extend([9, 16, 0, 0]);
            for word in [id, 1, uid] {
                body.extend(word.to_le_bytes());
            }
        }
    }
    body.extend([1, 12, IOAPIC_ID, 0]);
    body.extend((IOAPIC_BASE as u32).to_le_bytes());
    body.extend(0_u32.to_le_bytes());
    // Where there is no ISA interrupt to override, PCI's own routing says what its lines are like.
    if board.legacy {
        // The timer's line 0 is wired to input 2.
        body.extend(interrupt_override(0, 2, 0));
        let mut level = vec![5, SCI, 10, 11];
        level.extend(LINK_GSI.iter().map(|&gsi| gsi as u8));
        level.sort_unstable();
        level.dedup();
        for irq in level {
            body.extend(interrupt_override(irq, u32::from(irq), LEVEL_HIGH));
        }
    }
    // LINT1 is NMI on every CPU.
    body.extend([4, 6, ALL_CPUS, 0, 0, 1]);
    if apic_ids.iter().any(|&id| id >= FIRST_X2APIC) {
        body.extend([10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    let mut table = Sdt::new(
        *b"APIC",
        36,
        MADT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(&body);
    table.as_slice().to_vec()
}

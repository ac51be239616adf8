//! The ACPI tables: checksums, and what the other checks need from them.

use crate::io::{inw, read8, read16, read32, read64};
use crate::{check, clock, memory, power, skip};

fn sum(address: u64, length: u64) -> u8 {
    (0..length).fold(0u8, |sum, i| sum.wrapping_add(read8(address + i)))
}

fn signature(address: u64) -> [u8; 4] {
    read32(address).to_le_bytes()
}

/// Calls `each` with the address of every table that the XSDT (or RSDT) names.
fn tables(rsdp: u64, mut each: impl FnMut(u64)) {
    let xsdt = if read8(rsdp + 15) >= 2 {
        read64(rsdp + 24)
    } else {
        0
    };
    let (root, width) = if xsdt != 0 {
        (xsdt, 8)
    } else {
        (u64::from(read32(rsdp + 16)), 4)
    };
    let entries = u64::from(read32(root + 4)).saturating_sub(36) / width;
    for i in 0..entries.min(64) {
        let entry = root + 36 + i * width;
        each(if width == 8 {
            read64(entry)
        } else {
            u64::from(read32(entry))
        });
    }
}

/// The table with a signature.
pub fn find(wanted: &[u8; 4]) -> Option<u64> {
    let rsdp = memory::rsdp();
    if rsdp == 0 {
        return None;
    }
    let mut found = None;
    tables(rsdp, |table| {
        if &signature(table) == wanted && found.is_none() {
            found = Some(table);
        }
    });
    found
}

/// Start of the memory-mapped PCI configuration space of bus 0, from the MCFG.
pub fn ecam() -> Option<u64> {
    let table = find(b"MCFG")?;
    (read32(table + 4) >= 44 + 16).then(|| read64(table + 44))
}

/// Takes the ports of the fixed hardware from the FADT; every mode needs them.
pub fn set_up() {
    if let Some(fadt) = find(b"FACP") {
        power::set_ports(read32(fadt + 56) as u16, read32(fadt + 64) as u16);
        clock::set_port(read32(fadt + 76) as u16);
    }
}

/// Checks tables, timer and PM1 registers.
pub fn run() {
    let rsdp = memory::rsdp();
    if rsdp == 0 {
        skip!("acpi", "the boot protocol gives no RSDP");
        return;
    }
    check!(
        read64(rsdp) == u64::from_le_bytes(*b"RSD PTR ") && sum(rsdp, 20) == 0,
        "acpi",
        "RSDP at {rsdp:#x}"
    );
    if read8(rsdp + 15) >= 2 {
        let length = u64::from(read32(rsdp + 20));
        check!(
            length >= 36 && sum(rsdp, length) == 0,
            "acpi",
            "RSDP's extended checksum over {length} bytes"
        );
    }
    let mut count = 0;
    tables(rsdp, |table| {
        let name = signature(table);
        let name = core::str::from_utf8(&name).unwrap_or("????");
        let length = u64::from(read32(table + 4));
        check!(
            length >= 36 && sum(table, length) == 0,
            "acpi",
            "{name} at {table:#x}, {length} bytes, checksum"
        );
        count += 1;
    });
    check!(count > 0, "acpi", "{count} tables listed");
    fadt();
    madt();
    let before = clock::ticks();
    let moved = clock::wait_until(100, || clock::ticks() != before);
    check!(moved, "acpi", "the power management timer moves");
}

fn fadt() {
    let Some(fadt) = find(b"FACP") else {
        check!(false, "acpi", "there is a FADT");
        return;
    };
    let dsdt = match (read32(fadt + 4), u64::from(read32(fadt + 40))) {
        (148.., narrow) => match read64(fadt + 140) {
            0 => narrow,
            wide => wide,
        },
        (_, narrow) => narrow,
    };
    let length = u64::from(read32(dsdt + 4));
    check!(
        &signature(dsdt) == b"DSDT" && sum(dsdt, length) == 0,
        "acpi",
        "DSDT at {dsdt:#x}, {length} bytes, checksum"
    );
    let control = read32(fadt + 64) as u16;
    check!(
        control != 0 && inw(control) != 0xffff,
        "acpi",
        "PM1_CNT answers at port {control:#x}"
    );
    check!(
        !power::button_pressed(),
        "acpi",
        "no power button event is pending; SCI is interrupt {}",
        read16(fadt + 46)
    );
}

fn madt() {
    let Some(madt) = find(b"APIC") else {
        check!(false, "acpi", "there is a MADT");
        return;
    };
    let (mut at, end) = (madt + 44, madt + u64::from(read32(madt + 4)));
    let (mut processors, mut ioapics) = (0, 0);
    while at + 2 <= end {
        match read8(at) {
            0 if read32(at + 4) & 1 != 0 => processors += 1,
            1 => ioapics += 1,
            _ => {}
        }
        match read8(at + 1) {
            0 => break,
            length => at += u64::from(length),
        }
    }
    check!(
        processors >= 1 && ioapics == 1 && at == end,
        "acpi",
        "MADT lists {processors} processors, {ioapics} I/O APIC"
    );
}

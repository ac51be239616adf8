//! A vCPU's registers.

#![allow(unsafe_code)] // requests with arrays

use std::io;

use super::abi::*;
use super::node::{self, Node};
use crate::hypervisor::{DescriptorTable, Registers, Segment};

/// One register of [`Registers`]: its number and its field.
type Field = (i32, fn(&mut Registers) -> &mut u64);

/// Those that are a number. Control registers come last, so that each of them finds what its value needs: EFER and CR4 before CR0.
const NUMBERS: [Field; 23] = [
    (VM_REG_GUEST_RAX, |r| &mut r.rax),
    (VM_REG_GUEST_RBX, |r| &mut r.rbx),
    (VM_REG_GUEST_RCX, |r| &mut r.rcx),
    (VM_REG_GUEST_RDX, |r| &mut r.rdx),
    (VM_REG_GUEST_RSI, |r| &mut r.rsi),
    (VM_REG_GUEST_RDI, |r| &mut r.rdi),
    (VM_REG_GUEST_RSP, |r| &mut r.rsp),
    (VM_REG_GUEST_RBP, |r| &mut r.rbp),
    (VM_REG_GUEST_R8, |r| &mut r.r8),
    (VM_REG_GUEST_R9, |r| &mut r.r9),
    (VM_REG_GUEST_R10, |r| &mut r.r10),
    (VM_REG_GUEST_R11, |r| &mut r.r11),
    (VM_REG_GUEST_R12, |r| &mut r.r12),
    (VM_REG_GUEST_R13, |r| &mut r.r13),
    (VM_REG_GUEST_R14, |r| &mut r.r14),
    (VM_REG_GUEST_R15, |r| &mut r.r15),
    (VM_REG_GUEST_RIP, |r| &mut r.rip),
    (VM_REG_GUEST_RFLAGS, |r| &mut r.rflags),
    (VM_REG_GUEST_CR2, |r| &mut r.cr2),
    (VM_REG_GUEST_EFER, |r| &mut r.efer),
    (VM_REG_GUEST_CR4, |r| &mut r.cr4),
    (VM_REG_GUEST_CR3, |r| &mut r.cr3),
    (VM_REG_GUEST_CR0, |r| &mut r.cr0),
];

type SegmentField = (i32, fn(&mut Registers) -> &mut Segment);

const SEGMENTS: [SegmentField; 8] = [
    (VM_REG_GUEST_ES, |r| &mut r.es),
    (VM_REG_GUEST_CS, |r| &mut r.cs),
    (VM_REG_GUEST_SS, |r| &mut r.ss),
    (VM_REG_GUEST_DS, |r| &mut r.ds),
    (VM_REG_GUEST_FS, |r| &mut r.fs),
    (VM_REG_GUEST_GS, |r| &mut r.gs),
    (VM_REG_GUEST_LDTR, |r| &mut r.ldt),
    (VM_REG_GUEST_TR, |r| &mut r.tr),
];

type TableField = (i32, fn(&mut Registers) -> &mut DescriptorTable);

const TABLES: [TableField; 2] = [
    (VM_REG_GUEST_GDTR, |r| &mut r.gdt),
    (VM_REG_GUEST_IDTR, |r| &mut r.idt),
];

/// The registers of these numbers.
pub(super) fn get<const N: usize>(
    node: &Node,
    vcpu: i32,
    numbers: &[i32; N],
) -> io::Result<[u64; N]> {
    let mut values = [0; N];
    let mut request = VmRegisterSet {
        cpuid: vcpu,
        count: N as u32,
        regnums: numbers.as_ptr(),
        regvals: values.as_mut_ptr(),
    };
    // SAFETY: both arrays have `count` elements and live during the call; the driver reads the first and writes the second.
    unsafe { node.raw(VM_GET_REGISTER_SET, &mut request) }?;
    Ok(values)
}

/// Sets the registers of these numbers, in this order.
pub(super) fn set<const N: usize>(
    node: &Node,
    vcpu: i32,
    numbers: &[i32; N],
    mut values: [u64; N],
) -> io::Result<()> {
    set_many(node, vcpu, numbers, &mut values)
}

/// The same for as many as there are in both, one number for each value.
fn set_many(node: &Node, vcpu: i32, numbers: &[i32], values: &mut [u64]) -> io::Result<()> {
    let mut request = VmRegisterSet {
        cpuid: vcpu,
        count: numbers.len().min(values.len()) as u32,
        regnums: numbers.as_ptr(),
        regvals: values.as_mut_ptr(),
    };
    // SAFETY: both arrays have `count` elements and live during the call; the driver reads them.
    unsafe { node.raw(VM_SET_REGISTER_SET, &mut request) }.map(drop)
}

fn get_segment(node: &Node, vcpu: i32, number: i32) -> io::Result<SegDesc> {
    let mut request = VmSegDesc {
        cpuid: vcpu,
        regnum: number,
        ..Default::default()
    };
    node.request(&node::GET_SEGMENT, &mut request)?;
    Ok(request.desc)
}

fn set_segment(node: &Node, vcpu: i32, number: i32, desc: SegDesc) -> io::Result<()> {
    let mut request = VmSegDesc {
        cpuid: vcpu,
        regnum: number,
        desc,
    };
    node.request(&node::SET_SEGMENT, &mut request).map(drop)
}

/// All of [`Registers`].
pub(super) fn read(node: &Node, vcpu: i32) -> io::Result<Registers> {
    let mut registers = Registers::default();
    let values = get(node, vcpu, &NUMBERS.map(|(number, _)| number))?;
    for ((_, field), value) in NUMBERS.iter().zip(values) {
        *field(&mut registers) = value;
    }
    let selectors = get(node, vcpu, &SEGMENTS.map(|(number, _)| number))?;
    for ((number, field), selector) in SEGMENTS.iter().zip(selectors) {
        let desc = get_segment(node, vcpu, *number)?;
        *field(&mut registers) = Segment {
            selector: selector as u16,
            base: desc.base,
            limit: desc.limit,
            access: desc.access,
        };
    }
    for (number, field) in TABLES {
        let desc = get_segment(node, vcpu, number)?;
        *field(&mut registers) = DescriptorTable {
            base: desc.base,
            limit: desc.limit as u16,
        };
    }
    Ok(registers)
}

/// Sets all of [`Registers`]. Segments come first: what they are must fit the mode that the control registers turn on.
pub(super) fn write(node: &Node, vcpu: i32, registers: &Registers) -> io::Result<()> {
    let mut registers = *registers;
    for (number, field) in SEGMENTS {
        let segment = *field(&mut registers);
        let desc = SegDesc {
            base: segment.base,
            limit: segment.limit,
            access: segment.access,
        };
        set_segment(node, vcpu, number, desc)?;
    }
    for (number, field) in TABLES {
        let table = *field(&mut registers);
        let desc = SegDesc {
            base: table.base,
            limit: u32::from(table.limit),
            access: 0,
        };
        set_segment(node, vcpu, number, desc)?;
    }
    let selectors = SEGMENTS.map(|(_, field)| u64::from(field(&mut registers).selector));
    set(node, vcpu, &SEGMENTS.map(|(number, _)| number), selectors)?;
    let values = NUMBERS.map(|(_, field)| *field(&mut registers));
    set(node, vcpu, &NUMBERS.map(|(number, _)| number), values)
}

/// What a saved vCPU has beside [`NUMBERS`] and selectors.
const FURTHER: [i32; 7] = [
    VM_REG_GUEST_XCR0,
    VM_REG_GUEST_DR0,
    VM_REG_GUEST_DR1,
    VM_REG_GUEST_DR2,
    VM_REG_GUEST_DR3,
    VM_REG_GUEST_DR6,
    VM_REG_GUEST_DR7,
];

/// All registers that are a number, in the order to set them.
pub(super) fn read_all(node: &Node, vcpu: i32) -> io::Result<Vec<(i32, u64)>> {
    fn of<const N: usize>(
        node: &Node,
        vcpu: i32,
        numbers: &[i32; N],
    ) -> io::Result<impl Iterator<Item = (i32, u64)> + use<N>> {
        let values = get(node, vcpu, numbers)?;
        Ok((*numbers).into_iter().zip(values))
    }
    let selectors = SEGMENTS.map(|(number, _)| number);
    let mut all = Vec::new();
    all.extend(of(node, vcpu, &selectors)?);
    all.extend(of(node, vcpu, &NUMBERS.map(|(number, _)| number))?);
    all.extend(of(node, vcpu, &FURTHER)?);
    Ok(all)
}

/// Sets what [`read_all`] has read.
pub(super) fn write_all(node: &Node, vcpu: i32, all: &[(i32, u64)]) -> io::Result<()> {
    let numbers: Vec<i32> = all.iter().map(|&(number, _)| number).collect();
    let mut values: Vec<u64> = all.iter().map(|&(_, value)| value).collect();
    set_many(node, vcpu, &numbers, &mut values)
}

fn descriptors() -> impl Iterator<Item = i32> {
    let tables = TABLES.into_iter().map(|(number, _)| number);
    SEGMENTS.into_iter().map(|(number, _)| number).chain(tables)
}

/// Hidden parts of segment registers, and descriptor tables.
pub(super) fn read_segments(node: &Node, vcpu: i32) -> io::Result<Vec<(i32, SegDesc)>> {
    let read = |number| Ok((number, get_segment(node, vcpu, number)?));
    descriptors().map(read).collect()
}

/// Sets them.
pub(super) fn write_segments(node: &Node, vcpu: i32, all: &[(i32, SegDesc)]) -> io::Result<()> {
    let mut all = all.iter();
    all.try_for_each(|&(number, desc)| set_segment(node, vcpu, number, desc))
}

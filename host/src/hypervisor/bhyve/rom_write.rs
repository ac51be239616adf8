//! A guest's write to a ROM. The driver stops at the instruction without decoding it, so the few that firmware programs its flash
//! with are decoded here: MOV of a register or an immediate value to memory (Intel SDM volume 2, MOV; AMD APM volume 3).
//!
//! The address comes with the exit. What has to be found out is the width, the value, and where the next instruction is.

use std::io;

use super::abi::*;
use super::node;
use super::registers;
use super::vcpu::Shared;
use crate::hypervisor::{ExitHandler, Registers};
use crate::memory::PAGE;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LMA: u64 = 1 << 10;
const CS_LONG: u32 = 1 << 13;
const CS_DEFAULT_32: u32 = 1 << 14;

/// The longest instruction.
const LONGEST: usize = 15;

/// How wide operands and addresses are without a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Code {
    Bits16,
    Bits32,
    Bits64,
}

/// What a write is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Immediate(u64),
    /// The number of the register in instructions, and the bit at which the value begins in it.
    Register(u8, u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Write {
    source: Source,
    width: u8,
    /// Bytes of the instruction.
    len: usize,
}

/// Serves the write of vCPU `vcpu` at `gpa`, and moves the vCPU past it. `Err` in the result: the instruction is none of those
/// that are known, and these are its bytes.
pub(super) fn serve(
    shared: &Shared,
    vcpu: i32,
    gpa: u64,
    handler: &mut dyn ExitHandler,
) -> io::Result<Result<(), Vec<u8>>> {
    let registers = registers::read(&shared.node, vcpu)?;
    let code = code(&registers);
    let bytes = fetch(shared, vcpu, &registers, code)?;
    let Some(write) = decode(&bytes, code) else {
        return Ok(Err(bytes));
    };
    let mask = u64::MAX >> (64 - 8 * u32::from(write.width));
    let value = match write.source {
        Source::Immediate(value) => value,
        Source::Register(number, shift) => general(&registers, number) >> shift,
    };
    handler.mmio_write(gpa, write.width, value & mask);
    let next = registers.rip.wrapping_add(write.len as u64);
    let next = match code {
        Code::Bits64 => next,
        Code::Bits16 | Code::Bits32 => next & 0xffff_ffff,
    };
    registers::set(&shared.node, vcpu, &[VM_REG_GUEST_RIP], [next])?;
    Ok(Ok(()))
}

fn code(r: &Registers) -> Code {
    if r.efer & EFER_LMA != 0 && r.cs.access & CS_LONG != 0 {
        Code::Bits64
    } else if r.cr0 & CR0_PE != 0 && r.cs.access & CS_DEFAULT_32 != 0 {
        Code::Bits32
    } else {
        Code::Bits16
    }
}

/// The bytes at the instruction pointer: fewer than an instruction may have where the next page is not there.
fn fetch(shared: &Shared, vcpu: i32, r: &Registers, code: Code) -> io::Result<Vec<u8>> {
    let start = match code {
        Code::Bits64 => r.rip,
        Code::Bits16 | Code::Bits32 => r.cs.base.wrapping_add(r.rip) & 0xffff_ffff,
    };
    let mut bytes = Vec::with_capacity(LONGEST);
    while bytes.len() < LONGEST {
        let at = start.wrapping_add(bytes.len() as u64);
        let in_page = (PAGE - at % PAGE) as usize;
        let Some(gpa) = translate(shared, vcpu, r, at)? else {
            break;
        };
        let mut part = vec![0; in_page.min(LONGEST - bytes.len())];
        if shared.memory.read(gpa, &mut part).is_err() {
            let Some(rom) = shared.roms.at(gpa) else {
                break;
            };
            rom.read(gpa - rom.gpa(), &mut part);
        }
        bytes.extend(part);
    }
    Ok(bytes)
}

/// The guest physical address of `linear`, by the vCPU's own tables and without a fault in the guest.
fn translate(shared: &Shared, vcpu: i32, r: &Registers, linear: u64) -> io::Result<Option<u64>> {
    let long = r.efer & EFER_LMA != 0;
    let mut request = VmGla2gpa {
        vcpuid: vcpu,
        prot: PROT_READ,
        gla: linear,
        paging: VmGuestPaging {
            cr3: r.cr3,
            cpl: (r.ss.access >> 5 & 3) as i32,
            // Real, protected, compatibility and 64-bit mode.
            cpu_mode: match (r.cr0 & CR0_PE != 0, long, r.cs.access & CS_LONG != 0) {
                (false, ..) => 0,
                (true, false, _) => 1,
                (true, true, false) => 2,
                (true, true, true) => 3,
            },
            // None, 32-bit, PAE and 64-bit tables.
            paging_mode: match (r.cr0 & CR0_PG != 0, r.cr4 & CR4_PAE != 0, long) {
                (false, ..) => 0,
                (true, false, _) => 1,
                (true, true, false) => 2,
                (true, true, true) => 3,
            },
        },
        ..Default::default()
    };
    shared.node.request(&node::GLA2GPA_NOFAULT, &mut request)?;
    Ok((request.fault == 0).then_some(request.gpa))
}

/// In the order of instructions' register numbers.
fn general(r: &Registers, number: u8) -> u64 {
    let all = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ];
    all[usize::from(number & 15)]
}

/// Reads an instruction byte by byte.
struct Bytes<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Bytes<'_> {
    fn next(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn skip(&mut self, count: usize) -> Option<()> {
        self.at += count;
        (self.at <= self.bytes.len()).then_some(())
    }

    /// A signed value of this many bytes.
    fn signed(&mut self, count: u8) -> Option<u64> {
        let mut value = 0;
        for index in 0..count {
            value |= u64::from(self.next()?) << (8 * index);
        }
        let unused = 64 - 8 * u32::from(count);
        Some(((value << unused) as i64 >> unused) as u64)
    }
}

/// `None`: it is no such MOV.
fn decode(bytes: &[u8], code: Code) -> Option<Write> {
    let mut bytes = Bytes { bytes, at: 0 };
    let (mut operand_prefix, mut address_prefix, mut rex) = (false, false, 0);
    let opcode = loop {
        match bytes.next()? {
            0x66 => operand_prefix = true,
            0x67 => address_prefix = true,
            // Segments change the address, which is known.
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
            // It counts only right before the instruction.
            byte @ 0x40..=0x4f if code == Code::Bits64 => {
                rex = byte;
                break bytes.next()?;
            }
            other => break other,
        }
    };
    let full = match (code, operand_prefix) {
        (Code::Bits64, _) if rex & 8 != 0 => 8,
        (Code::Bits16, false) | (Code::Bits32 | Code::Bits64, true) => 2,
        (Code::Bits16, true) | (Code::Bits32 | Code::Bits64, false) => 4,
    };
    let address = match (code, address_prefix) {
        (Code::Bits64, false) => 8,
        (Code::Bits16, false) | (Code::Bits32, true) => 2,
        (Code::Bits16, true) | (Code::Bits32, false) | (Code::Bits64, true) => 4,
    };
    let width = if opcode & 1 == 0 { 1 } else { full };
    let source = match opcode {
        // MOV r/m, r.
        0x88 | 0x89 => {
            let reg = memory_operand(&mut bytes, address)?;
            // Without REX, numbers 4 to 7 are the second bytes of the first four registers.
            match width == 1 && rex == 0 && reg >= 4 {
                true => Source::Register(reg - 4, 8),
                false => Source::Register(reg | (rex & 4) << 1, 0),
            }
        }
        // MOV r/m, imm; of 8 bytes, 4 are in the instruction.
        0xc6 | 0xc7 => {
            if memory_operand(&mut bytes, address)? != 0 {
                return None;
            }
            Source::Immediate(bytes.signed(width.min(4))?)
        }
        // MOV moffs, AL/AX/EAX/RAX.
        0xa2 | 0xa3 => {
            bytes.skip(address)?;
            Source::Register(0, 0)
        }
        _ => return None,
    };
    Some(Write {
        source,
        width,
        len: bytes.at,
    })
}

/// Passes a ModRM byte that names memory, and what belongs to it; its register field.
fn memory_operand(bytes: &mut Bytes<'_>, address: usize) -> Option<u8> {
    let modrm = bytes.next()?;
    let (mode, reg, rm) = (modrm >> 6, modrm >> 3 & 7, modrm & 7);
    if mode == 3 {
        return None;
    }
    if address == 2 {
        bytes.skip(match (mode, rm) {
            (0, 6) | (2, _) => 2,
            (1, _) => 1,
            _ => 0,
        })?;
        return Some(reg);
    }
    let base = match rm {
        4 => bytes.next()? & 7,
        other => other,
    };
    bytes.skip(match (mode, base) {
        (0, 5) | (2, _) => 4,
        (1, _) => 1,
        _ => 0,
    })?;
    Some(reg)
}

#[cfg(test)]
mod tests;

//! Where the instruction began with which a guest wrote to a ROM.
//!
//! The driver stops before such an instruction. KVM tells of the write when it is past it, so its beginning is looked for backwards: the
//! nearest MOV that ends there, with the width and the value that were written.

use std::io;

use kvm_bindings::kvm_regs;

use crate::machine::Machine;
use crate::vcpu::Cpu;

const LONGEST: usize = 15;
const EFER_LMA: u64 = 1 << 10;

/// What KVM told of the write.
pub struct Written {
    pub width: usize,
    pub value: u64,
}

/// A MOV to memory.
struct Mov {
    len: usize,
    width: usize,
    value: u64,
}

/// Puts the vCPU back to the instruction, and tells where that is. `None`: there is no such MOV.
pub fn rewind(vm: &Machine, cpu: &mut Cpu, written: &Written) -> io::Result<Option<u64>> {
    let (mut regs, sregs) = (cpu.fd.get_regs()?, cpu.fd.get_sregs()?);
    let code = match (sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0, sregs.cs.db) {
        (true, _) => 64,
        (false, 0) => 16,
        (false, _) => 32,
    };
    let base = if code == 64 { 0 } else { sregs.cs.base };
    let mut bytes = Vec::new();
    for back in 1..=LONGEST as u64 {
        let linear = base.wrapping_add(regs.rip).wrapping_sub(back);
        let translated = cpu.fd.translate_gva(linear)?;
        let byte = match translated.valid {
            0 => None,
            _ => vm.read_byte(translated.physical_address),
        };
        let Some(byte) = byte else { break };
        bytes.insert(0, byte);
        let found = decode(&bytes, code, &regs).is_some_and(|mov| {
            let mask = u64::MAX >> (64 - 8 * mov.width);
            (mov.len, mov.width, mov.value & mask) == (bytes.len(), written.width, written.value)
        });
        if found {
            regs.rip = regs.rip.wrapping_sub(back);
            cpu.fd.set_regs(&regs)?;
            return Ok(Some(regs.rip));
        }
    }
    Ok(None)
}

fn decode(bytes: &[u8], code: u8, regs: &kvm_regs) -> Option<Mov> {
    let (mut at, mut operand, mut address, mut rex) = (0, false, false, 0);
    let mut next = || {
        at += 1;
        bytes.get(at - 1).copied()
    };
    let opcode = loop {
        match next()? {
            0x66 => operand = true,
            0x67 => address = true,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
            byte @ 0x40..=0x4f if code == 64 => {
                rex = byte;
                break next()?;
            }
            other => break other,
        }
    };
    let width = match (opcode & 1, rex & 8 != 0, (code == 16) != operand) {
        (0, ..) => 1,
        (_, true, _) => 8,
        (_, false, true) => 2,
        (_, false, false) => 4,
    };
    let address = match (code, address) {
        (64, false) => 8,
        (16, false) | (32, true) => 2,
        _ => 4,
    };
    let mut reg = 0;
    let operand_len = match opcode {
        0x88 | 0x89 | 0xc6 | 0xc7 => {
            let modrm = next()?;
            let (mode, rm) = (modrm >> 6, modrm & 7);
            reg = modrm >> 3 & 7;
            match (address, mode, rm) {
                (_, 3, _) => return None,
                (2, 0, 6) | (2, 2, _) => 2,
                (2, 0, _) => 0,
                (2, ..) => 1,
                (_, mode, 4) => {
                    let base = next()? & 7;
                    match (mode, base) {
                        (0, 5) | (2, _) => 4,
                        (1, _) => 1,
                        _ => 0,
                    }
                }
                (_, 0, 5) | (_, 2, _) => 4,
                (_, 1, _) => 1,
                _ => 0,
            }
        }
        0xa2 | 0xa3 => address,
        _ => return None,
    };
    at += operand_len;
    let value = match opcode {
        0xc6 | 0xc7 => {
            let len = width.min(4);
            let mut value = [0; 8];
            value[..len].copy_from_slice(bytes.get(at..at + len)?);
            at += len;
            // Of 8 bytes, 4 are in the instruction, with a sign.
            let unused = 64 - 8 * len as u32;
            ((u64::from_le_bytes(value) << unused) as i64 >> unused) as u64
        }
        _ if width == 1 && rex == 0 && reg >= 4 => general(regs, reg - 4) >> 8,
        _ => general(regs, reg | (rex & 4) << 1),
    };
    Some(Mov {
        len: at,
        width,
        value,
    })
}

fn general(r: &kvm_regs, number: u8) -> u64 {
    let all = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ];
    all[usize::from(number & 15)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn movs_of_firmware_are_known() {
        let regs = kvm_regs {
            rax: 0x1240,
            rcx: 0x77,
            r8: 9,
            ..Default::default()
        };
        for (bytes, code, width, value) in [
            (&[0x88, 0x07][..], 64, 1, 0x1240),
            (&[0x88, 0x20], 32, 1, 0x12),
            (&[0x44, 0x88, 0x07], 64, 1, 9),
            (&[0xc6, 0x07, 0x20], 64, 1, 0x20),
            (&[0x66, 0x89, 0x4f, 0x10], 32, 2, 0x77),
            (&[0x89, 0x05], 16, 2, 0x1240),
            (&[0x89, 0x04, 0x25, 0, 0, 0, 0], 64, 4, 0x1240),
            (&[0x48, 0xc7, 0x00, 0xff, 0xff, 0xff, 0xff], 64, 8, u64::MAX),
        ] {
            let mov = decode(bytes, code, &regs).unwrap();
            assert_eq!(
                (mov.len, mov.width, mov.value),
                (bytes.len(), width, value),
                "{bytes:x?}"
            );
        }
        for bytes in [&[0x88, 0xc0][..], &[0xf4], &[0x88], &[]] {
            assert!(decode(bytes, 64, &regs).is_none(), "{bytes:x?}");
        }
    }
}

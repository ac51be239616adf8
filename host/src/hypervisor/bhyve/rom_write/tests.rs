#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;

fn decoded(code: Code, bytes: &[u8]) -> Option<(Source, u8)> {
    // What follows belongs to the next instruction.
    let mut more = bytes.to_vec();
    more.resize(LONGEST, 0x90);
    let write = decode(&more, code)?;
    assert_eq!(write.len, bytes.len(), "{bytes:02x?}");
    assert_eq!(
        decode(&bytes[..bytes.len() - 1], code),
        None,
        "cut off: {bytes:02x?}"
    );
    Some((write.source, write.width))
}

#[test]
fn moves_of_registers() {
    use Code::*;
    let reg = |number, shift, width| Some((Source::Register(number, shift), width));
    for (code, bytes, expected) in [
        // mov [rdi], al; mov [rsi], dil; mov [rax], ah
        (Bits64, &[0x88, 0x07][..], reg(0, 0, 1)),
        (Bits64, &[0x40, 0x88, 0x3e], reg(7, 0, 1)),
        (Bits64, &[0x88, 0x20], reg(0, 8, 1)),
        // mov [r9], r10b; mov [rax+rcx*4+0x10], edx; mov [rbp+0x12345678], r8; mov [rip+1], ax
        (Bits64, &[0x45, 0x88, 0x11], reg(10, 0, 1)),
        (Bits64, &[0x89, 0x54, 0x88, 0x10], reg(2, 0, 4)),
        (
            Bits64,
            &[0x4c, 0x89, 0x85, 0x78, 0x56, 0x34, 0x12],
            reg(8, 0, 8),
        ),
        (Bits64, &[0x66, 0x89, 0x05, 1, 0, 0, 0], reg(0, 0, 2)),
        // mov [disp32 with SIB and no base], ecx; mov [moffs64], al
        (Bits64, &[0x89, 0x0c, 0x25, 0, 0, 0x40, 0], reg(1, 0, 4)),
        (Bits64, &[0xa2, 0, 0, 0xc0, 0xff, 0, 0, 0, 0], reg(0, 0, 1)),
        // mov [edi], bl; mov [moffs32], eax; mov [bx+si], cx with both prefixes
        (Bits32, &[0x88, 0x1f], reg(3, 0, 1)),
        (Bits32, &[0xa3, 0, 0, 0xc0, 0xff], reg(0, 0, 4)),
        (Bits32, &[0x66, 0x67, 0x89, 0x08], reg(1, 0, 2)),
        // mov es:[di], al; mov [disp16], dx; mov [edi], eax
        (Bits16, &[0x26, 0x88, 0x05], reg(0, 0, 1)),
        (Bits16, &[0x89, 0x16, 0x34, 0x12], reg(2, 0, 2)),
        (Bits16, &[0x67, 0x66, 0x89, 0x07], reg(0, 0, 4)),
    ] {
        assert_eq!(decoded(code, bytes), expected, "{bytes:02x?}");
    }
}

#[test]
fn moves_of_immediate_values() {
    use Code::*;
    let imm = |value, width| Some((Source::Immediate(value), width));
    for (code, bytes, expected) in [
        // mov byte [rdi], 0x70; mov byte [rdi+rsi], 0x40; mov word [rax], 0x1234; mov qword [rax], -1
        (Bits64, &[0xc6, 0x07, 0x70][..], imm(0x70, 1)),
        (Bits64, &[0xc6, 0x04, 0x37, 0x40], imm(0x40, 1)),
        (Bits64, &[0x66, 0xc7, 0x00, 0x34, 0x12], imm(0x1234, 2)),
        (
            Bits64,
            &[0x48, 0xc7, 0x00, 0xff, 0xff, 0xff, 0xff],
            imm(u64::MAX, 8),
        ),
        // mov dword [ebp+8], 5; mov byte [di], 0x50
        (Bits32, &[0xc7, 0x45, 8, 5, 0, 0, 0], imm(5, 4)),
        (Bits16, &[0xc6, 0x05, 0x50], imm(0x50, 1)),
    ] {
        assert_eq!(decoded(code, bytes), expected, "{bytes:02x?}");
    }
}

#[test]
fn others_are_left_alone() {
    for bytes in [
        // mov al, cl is none to memory; rep stosb; add [rax], al; mov with another /digit
        &[0x88, 0xc8][..],
        &[0xf3, 0xaa],
        &[0x00, 0x00],
        &[0xc6, 0x4f, 0x70, 0],
        &[],
    ] {
        assert_eq!(decode(bytes, Code::Bits64), None, "{bytes:02x?}");
    }
}

#[test]
fn code_is_as_wide_as_its_segment_says() {
    let mut r = Registers::default();
    r.cs.access = CS_DEFAULT_32;
    assert_eq!(code(&r), Code::Bits16, "real mode");
    r.cr0 = CR0_PE;
    assert_eq!(code(&r), Code::Bits32);
    r.efer = EFER_LMA;
    assert_eq!(code(&r), Code::Bits32, "compatibility mode");
    r.cs.access = CS_LONG;
    assert_eq!(code(&r), Code::Bits64);
}

# Entry points, descriptor tables, page tables and interrupt stubs.
#
# Everything that has to run in ring 0 is here and nothing else, in the plainest instructions:
# some hypervisors interpret ring 0 one instruction at a time and know few opcodes. The rest of
# the guest runs in ring 3 with all ports and all memory open to it.

# ---- Entry by PVH (Xen hvm_start_info in ebx, 32-bit protected mode, paging off) ----------------
.section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18                      # name size, value size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_start

.section .boot, "ax"
.code32
.global pvh_start
pvh_start:
    mov dword ptr [pvh_start_info], ebx
    mov eax, cr4
    or eax, 0x20                        # PAE
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER.LME
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    lgdt [gdt_pointer]
    mov esp, offset ring0_stack_top     # the protocol gives no stack
    mov eax, 0x08
    push eax
    mov eax, offset enter_long_mode
    push eax
    retf

# ---- Entry by the Linux 64-bit boot protocol (long mode, rsi = boot_params) ---------------------
.code64
.global _start
_start:
    mov qword ptr [boot_params], rsi
enter_long_mode:
    mov dx, 0x3f8                       # the first byte of the banner, before anything else
    mov al, 'v'
    out dx, al
    cli
    cld
    mov eax, offset ring0_stack_top
    mov rsp, rax
    mov rax, cr4
    or eax, 0x600                       # OSFXSR, OSXMMEXCPT: ring 3 is compiled code and uses SSE
    and eax, 0xffcfffff                 # not SMEP, SMAP: ring 0 runs from user pages
    mov cr4, rax
    mov rax, cr0
    and eax, 0xfffffff3                 # not EM, TS
    or eax, 2                           # MP
    mov cr0, rax
    mov eax, offset pml4
    mov cr3, rax
    mov eax, offset tss                 # the descriptor splits the base address in three
    mov word ptr [gdt_tss + 2], ax
    shr eax, 16
    mov byte ptr [gdt_tss + 4], al
    mov byte ptr [gdt_tss + 7], ah
    mov byte ptr [gdt_tss + 5], 0x89    # available again, should this be a second boot
    lgdt [gdt_pointer]
    lidt [idt_pointer]
    mov ax, 0x28
    ltr ax
    mov al, 0xff                        # both PICs masked: the local APIC delivers what is tested
    out 0x21, al
    out 0xa1, al
    mov ax, 0x1b
    mov ds, ax
    mov es, ax
    push 0x1b                           # ss
    mov eax, offset ring3_stack_top - 8
    push rax                            # rsp, aligned as after a call
    push 0x202                          # rflags: IF
    push 0x23                           # cs
    mov eax, offset ring3_main
    push rax
    iretq

# ---- Exceptions: note what happened, continue in ring 3 -----------------------------------------
# Frame here: vector, error code, rip, cs, rflags, rsp, ss.
exception:
    pop qword ptr [exception_vector]
    pop qword ptr [exception_error]
    cmp byte ptr [halt_requested], 0
    jne halted
    mov rax, qword ptr [rsp]
    mov qword ptr [exception_rip], rax
    mov rax, cr2
    mov qword ptr [exception_address], rax
    mov eax, offset ring3_exception
    mov qword ptr [rsp], rax
    mov eax, offset ring3_exception_stack_top - 8
    mov qword ptr [rsp + 24], rax
    iretq
halted:
    cli
    hlt
    jmp halted

.balign 16
.global exception_stubs
exception_stubs:
.set vector, 0
.rept 32
    .balign 16
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    push 0
    .endif
    push vector
    jmp exception
    .set vector, vector + 1
.endr

# ---- Interrupts: count, end of interrupt, back ---------------------------------------------------
.balign 32
.global interrupt_stubs
interrupt_stubs:
.set vector, 0
.rept 32
    .balign 32
    push rax
    inc dword ptr [interrupt_counts + 4 * vector]
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    pop rax
    iretq
    .set vector, vector + 1
.endr

# ---- Tables --------------------------------------------------------------------------------------
.section .data
.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 0x08 ring 0 code, 64 bit
    .quad 0x00cf93000000ffff            # 0x10 ring 0 data
    .quad 0x00cff3000000ffff            # 0x18 ring 3 data
    .quad 0x00affb000000ffff            # 0x20 ring 3 code, 64 bit
gdt_tss:
    .quad 0x0000890000002068            # 0x28 TSS, limit 104 + 8192
    .quad 0
gdt_end:
.balign 16
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
.balign 16
idt_pointer:
    .word 64 * 16 - 1
    .quad idt

.balign 16
tss:
    .long 0
    .quad ring0_stack_top               # rsp0
    .fill 11, 8, 0
    .word 0, 0
    .word 0, 104                        # I/O map base
    .fill 8192, 1, 0                    # every port open to ring 3
    .byte 0xff

# Page tables: the low 4 GiB one to one, open to ring 3, in 2 MiB pages; from 3 GiB up uncached.
.balign 4096
.global pml4, pdpt
pml4:
    .quad pdpt + 0x27
    .fill 511, 8, 0
pdpt:
    .quad pd + 0x27, pd + 0x1027, pd + 0x2027, pd + 0x3027
    .fill 508, 8, 0
pd:
.set page, 0
.rept 1536
    .quad (page << 21) + 0xe7
    .set page, page + 1
.endr
.rept 512
    .quad (page << 21) + 0xff
    .set page, page + 1
.endr

.global boot_params, pvh_start_info, halt_requested
.balign 8
boot_params:        .quad 0
pvh_start_info:     .quad 0
.global exception_vector, exception_error, exception_rip, exception_address
exception_vector:   .quad 0
exception_error:    .quad 0
exception_rip:      .quad 0
exception_address:  .quad 0
.global interrupt_counts
interrupt_counts:   .fill 32, 4, 0
halt_requested:     .byte 0
.global idt
.balign 16
idt:                .fill 128, 8, 0

.section .stacks, "aw", @nobits
.balign 16
    .skip 4096
ring0_stack_top:
    .skip 65536
ring3_stack_top:
    .skip 16384
ring3_exception_stack_top:

# Memory for rings and buffers; its size stands in memory.rs too.
.section .pool, "aw", @nobits
.balign 4096
.global dma_pool
dma_pool:
    .skip 4 << 20
# Page directories for addresses above 4 GiB; their number stands in memory.rs too.
.global spare_directories
spare_directories:
    .skip 8 * 4096

//! Tiny real-mode guests on whatever hypervisor there is. They use simple instructions only, since some KVMs
//! interpret the kernel mode of guests.
#![allow(unsafe_code)] // reads guest programs out of the test binary

use std::os::fd::{AsFd, OwnedFd};

use super::*;

/// Where guest programs are loaded.
pub(crate) const ENTRY: u64 = 0x1000;
/// Where `ds` points in guest programs: registers of some device.
pub(crate) const MMIO: u64 = 0xd000_0000;
const LOCAL_APIC: u64 = 0xfee0_0000;
pub(crate) const RAM: u64 = 4 << 20;

/// Assembles a real-mode program and returns its bytes.
macro_rules! guest {
    ($name:literal, $($line:literal),+ $(,)?) => {{
        mod program {
            std::arch::global_asm!(
                ".pushsection .rodata",
                ".code16",
                concat!($name, "_start:"),
                $($line,)+
                concat!($name, "_end:"),
                ".code64",
                ".popsection",
            );
        }
        unsafe extern "C" {
            #[link_name = concat!($name, "_start")]
            static START: u8;
            #[link_name = concat!($name, "_end")]
            static END: u8;
        }
        // SAFETY: both symbols lie in one section, in this order, with the program between them.
        unsafe { std::slice::from_raw_parts(&raw const START, (&raw const END).offset_from(&raw const START) as usize) }
    }};
}
pub(crate) use guest;

/// `cpus` cores of what this machine has.
pub(crate) fn cores(cpus: u8) -> CpuModel {
    CpuModel {
        topology: Topology::of_cores(cpus),
        profile: None,
        x2apic: true,
    }
}

/// A VM with `program` loaded, or `None` (and why, on standard output) where no hypervisor is to be had.
pub(crate) fn vm(test: &str, program: &[u8]) -> Option<Backend> {
    let (begun, backing) = (Backend::begin(false), backing::Backing::default());
    match Backend::create(begun, test, RAM, &backing, |_| {}) {
        Ok(vm) => {
            vm.memory().write(ENTRY, program).unwrap();
            Some(vm)
        }
        Err(error) => {
            let text = format!("{error:#}");
            assert!(
                text.contains("Cannot open /dev/") || text.contains("not supported yet"),
                "{text}"
            );
            println!("SKIPPED: {test}: {text}");
            None
        }
    }
}

fn real_mode_segment(base: u64) -> Segment {
    Segment {
        selector: (base >> 4) as u16,
        base,
        limit: 0xffff,
        access: 0x93,
    }
}

/// CPU 0 at [`ENTRY`] in real mode: `ds` over [`MMIO`], `es` over the local APIC, `ss`, `fs` over the start of RAM.
pub(crate) fn at_entry(vcpu: &mut impl Vcpu) {
    let mut registers = vcpu.registers().unwrap();
    let flat = real_mode_segment(0);
    registers.cs = Segment {
        access: 0x9b,
        ..flat
    };
    (registers.ss, registers.fs, registers.gs) = (flat, flat, flat);
    registers.ds = real_mode_segment(MMIO);
    registers.es = real_mode_segment(LOCAL_APIC);
    registers.rip = ENTRY;
    registers.rsp = 0x8000;
    vcpu.set_registers(&registers).unwrap();
}

/// Records what the guest does, and lets a test react.
#[derive(Default)]
struct Record<F> {
    seen: Vec<(Space, u64, u8, u64)>,
    react: F,
}

impl<F: FnMut(Space, u64, u64)> Record<F> {
    fn new(react: F) -> Self {
        Self {
            seen: Vec::new(),
            react,
        }
    }

    fn write(&mut self, space: Space, address: u64, width: u8, value: u64) {
        self.seen.push((space, address, width, value));
        (self.react)(space, address, value);
    }
}

impl<F: FnMut(Space, u64, u64)> ExitHandler for Record<F> {
    fn pio_read(&mut self, port: u16, _: u8) -> u32 {
        u32::from(port) ^ 0x1234_5678
    }
    fn pio_write(&mut self, port: u16, width: u8, value: u32) {
        self.write(Space::Pio, port.into(), width, value.into());
    }
    fn mmio_read(&mut self, address: u64, _: u8) -> u64 {
        address ^ 0x0102_0304_0506_0708
    }
    fn mmio_write(&mut self, address: u64, width: u8, value: u64) {
        self.write(Space::Mmio, address, width, value);
    }
}

#[test]
fn ports_and_memory_reach_the_handler() {
    let program = guest!(
        "guest_accesses",
        "mov dx, 0x3f8",
        "mov al, 'A'",
        "out dx, al",
        "in eax, dx",
        "out dx, eax",
        "mov si, 0x2000",
        "mov cx, 3",
        "cld",
        "rep outsb dx, byte ptr fs:[si]",
        "mov eax, [0x10]",
        "mov [0x20], ax",
        "out 0x81, al",
    );
    let Some(vm) = vm("ports_and_memory_reach_the_handler", program) else {
        return;
    };
    vm.memory().write(0x2000, b"xyz").unwrap();
    let mut vcpu = vm.create_vcpu(0, &cores(1)).unwrap();
    let expected = [
        (Space::Pio, 0x3f8, 1, u64::from(b'A')),
        (Space::Pio, 0x3f8, 4, 0x3f8 ^ 0x1234_5678),
        (Space::Pio, 0x3f8, 1, u64::from(b'x')),
        (Space::Pio, 0x3f8, 1, u64::from(b'y')),
        (Space::Pio, 0x3f8, 1, u64::from(b'z')),
        (Space::Mmio, MMIO + 0x20, 2, 0x0718),
        (Space::Pio, 0x81, 1, 0x18),
    ];
    // Twice: the second time after a reset in place.
    for _ in 0..2 {
        at_entry(&mut vcpu);
        let mut record = Record::new(kick_at_the_end(&vcpu));
        let exit = vcpu.run(&mut record).unwrap();
        assert!(matches!(exit, Exit::Kicked), "{exit:?}");
        assert_eq!(record.seen, expected);
        vm.reset().unwrap();
        vcpu.reset().unwrap();
        let registers = vcpu.registers().unwrap();
        assert_eq!(
            (registers.rip, registers.cs.base, registers.cr0 & 1),
            (0xfff0, 0xffff_0000, 0)
        );
    }
    assert!(vcpu.kick_handle().exits() >= 12);
}

/// Guests end by a write to port 0x81.
fn kick_at_the_end<V: Vcpu>(vcpu: &V) -> impl FnMut(Space, u64, u64) + use<V> {
    let kick = vcpu.kick_handle();
    move |space, address, _| {
        if (space, address) == (Space::Pio, 0x81) {
            kick.kick();
        }
    }
}

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(
        0,
        rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC,
    )
    .unwrap()
}

fn signal(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(fd, &mut bytes) {
        Ok(_) => u64::from_ne_bytes(bytes),
        Err(rustix::io::Errno::AGAIN) => 0,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn doorbells_signal_without_an_exit() {
    let program = guest!(
        "guest_doorbells",
        "mov dx, 0x600",
        "mov ax, 7",
        "out dx, ax",     // bound, any value of this width
        "out dx, al",     // another width
        "mov [0x40], ax", // bound to value 7
        "inc ax",
        "mov [0x40], ax",
        "mov [0x44], eax", // bound, any width and value
        "mov byte ptr [0x44], al",
        "out 0x81, al",
    );
    let Some(vm) = vm("doorbells_signal_without_an_exit", program) else {
        return;
    };
    let (port, exact, any) = (eventfd(), eventfd(), eventfd());
    let bells = [
        (
            Doorbell {
                space: Space::Pio,
                address: 0x600,
                width: 2,
                value: None,
            },
            &port,
        ),
        (
            Doorbell {
                space: Space::Mmio,
                address: MMIO + 0x40,
                width: 2,
                value: Some(7),
            },
            &exact,
        ),
        (
            Doorbell {
                space: Space::Mmio,
                address: MMIO + 0x44,
                width: 0,
                value: None,
            },
            &any,
        ),
    ];
    for (bell, fd) in bells {
        if !vm.bind_doorbell(bell, fd.as_fd()).unwrap() {
            println!("SKIPPED: doorbells_signal_without_an_exit: this hypervisor has no doorbells");
            return;
        }
    }
    assert!(
        vm.bind_doorbell(bells[0].0, any.as_fd()).is_err(),
        "an address was bound twice"
    );
    let mut vcpu = vm.create_vcpu(0, &cores(1)).unwrap();
    at_entry(&mut vcpu);
    let mut record = Record::new(kick_at_the_end(&vcpu));
    assert!(matches!(vcpu.run(&mut record).unwrap(), Exit::Kicked));
    assert_eq!(
        record.seen,
        [
            (Space::Pio, 0x600, 1, 7),
            (Space::Mmio, MMIO + 0x40, 2, 8),
            (Space::Pio, 0x81, 1, 8)
        ]
    );
    assert_eq!((count(&port), count(&exact), count(&any)), (1, 1, 2));
    for (bell, fd) in bells {
        vm.unbind_doorbell(bell, fd.as_fd()).unwrap();
    }
    assert!(vm.unbind_doorbell(bells[0].0, port.as_fd()).is_err());
}

#[test]
fn msrs_that_nobody_has_are_no_exceptions() {
    let program = guest!(
        "guest_msrs",
        "mov ecx, 0x1234567",
        "mov eax, 5",
        "mov edx, 6",
        "wrmsr",
        "rdmsr",
        "out 0x80, eax",
        "mov eax, edx",
        "out 0x80, eax",
        "out 0x81, al",
    );
    let Some(vm) = vm("msrs_that_nobody_has_are_no_exceptions", program) else {
        return;
    };
    let mut vcpu = vm.create_vcpu(0, &cores(1)).unwrap();
    at_entry(&mut vcpu);
    let mut record = Record::new(kick_at_the_end(&vcpu));
    let exit = vcpu.run(&mut record).unwrap();
    #[cfg(target_os = "linux")]
    if !kvm_ioctls::Kvm::new()
        .unwrap()
        .check_extension(kvm_ioctls::Cap::X86UserSpaceMsr)
    {
        println!("SKIPPED: msrs_that_nobody_has_are_no_exceptions: this KVM keeps them to itself");
        return;
    }
    assert!(matches!(exit, Exit::Kicked), "{exit:?}");
    let zero = (Space::Pio, 0x80, 4, 0);
    assert_eq!(record.seen, [zero, zero, (Space::Pio, 0x81, 1, 0)]);
}

#[test]
fn interrupts_arrive_by_every_way() {
    // Handlers of vectors 0x40 and up write their vector to port 0x80; IRQ 4 is vector 0x24.
    let program = guest!(
        "guest_interrupts",
        "xor bx, bx",
        "mov word ptr fs:[0x24 * 4], 0x1300",
        "mov word ptr fs:[0x24 * 4 + 2], bx",
        "mov word ptr fs:[0x40 * 4], 0x1310",
        "mov word ptr fs:[0x40 * 4 + 2], bx",
        "mov word ptr fs:[0x41 * 4], 0x1320",
        "mov word ptr fs:[0x41 * 4 + 2], bx",
        "mov word ptr fs:[0x42 * 4], 0x1330",
        "mov word ptr fs:[0x42 * 4 + 2], bx",
        "mov eax, es:[0xf0]", // software-enable the local APIC
        "or eax, 0x100",
        "mov es:[0xf0], eax",
        "mov al, 0x11", // 8259: ICW1 to ICW4, then only IRQ 4
        "out 0x20, al",
        "mov al, 0x20",
        "out 0x21, al",
        "mov al, 4",
        "out 0x21, al",
        "mov al, 1",
        "out 0x21, al",
        "mov al, 0xef",
        "out 0x21, al",
        "mov al, 1",
        "out 0x80, al",
        "2: sti",
        "hlt",
        "jmp 2b",
        ".org guest_interrupts_start + 0x300",
        "mov al, 0x20",
        "out 0x20, al",
        "mov al, 0x24",
        "out 0x80, al",
        "iret",
        ".org guest_interrupts_start + 0x310",
        "mov al, 0x40",
        "jmp 3f",
        ".org guest_interrupts_start + 0x320",
        "mov al, 0x41",
        "jmp 3f",
        ".org guest_interrupts_start + 0x330",
        "mov al, 0x42",
        "3: mov dword ptr es:[0xb0], 0", // end of interrupt
        "out 0x80, al",
        "iret",
    );
    let Some(vm) = vm("interrupts_arrive_by_every_way", program) else {
        return;
    };
    let mut vcpu = vm.create_vcpu(0, &cores(1)).unwrap();
    at_entry(&mut vcpu);
    let fd = eventfd();
    let message = |vector| Msi {
        address: LOCAL_APIC,
        data: vector,
    };
    let mut route = None;
    let kick = vcpu.kick_handle();
    let mut record = Record::new(|_, _, value| match value {
        1 => {
            route = Some(vm.connect_msi(fd.as_fd(), message(0x40)).unwrap());
            signal(&fd);
        }
        0x40 => {
            vm.update_msi(route.as_ref().unwrap(), message(0x41))
                .unwrap();
            signal(&fd);
        }
        0x41 => {
            vm.disconnect_msi(fd.as_fd(), route.take().unwrap())
                .unwrap();
            signal(&fd);
            vm.send_msi(message(0x42)).unwrap();
        }
        0x42 => {
            vm.set_irq_line(4, true).unwrap();
            vm.set_irq_line(4, false).unwrap();
        }
        _ => kick.kick(),
    });
    let exit = vcpu.run(&mut record).unwrap();
    assert!(matches!(exit, Exit::Kicked), "{exit:?}");
    let values: Vec<_> = record
        .seen
        .iter()
        .map(|&(_, port, _, value)| (port, value))
        .collect();
    assert_eq!(
        values,
        [
            (0x80, 1),
            (0x80, 0x40),
            (0x80, 0x41),
            (0x80, 0x42),
            (0x80, 0x24)
        ]
    );
    assert_eq!(count(&fd), 1, "a disconnected eventfd keeps its counts");
    assert!(
        !vcpu.halted_for_good(),
        "this guest halts with interrupts enabled"
    );
    assert!(vm.set_irq_line(24, true).is_err());
}

#[test]
fn a_crash_says_what_happened() {
    let program = guest!(
        "guest_crash",
        "push word ptr 0xf000",
        "push word ptr 0",
        "retf"
    );
    let Some(vm) = vm("a_crash_says_what_happened", program) else {
        return;
    };
    let mut vcpu = vm.create_vcpu(0, &cores(1)).unwrap();
    at_entry(&mut vcpu);
    let mut registers = vcpu.registers().unwrap();
    // Executing device registers is beyond every hypervisor's instruction emulator.
    registers.cs.base = MMIO;
    vcpu.set_registers(&registers).unwrap();
    let exit = vcpu.run(&mut Record::new(|_, _, _| {})).unwrap();
    let Exit::Crash(text) = exit else {
        panic!("{exit:?}")
    };
    let known = text.contains("KVM internal error") || text.contains("VM_EXITCODE_");
    assert!(known, "{text}");
}

#[test]
fn memory_beyond_the_machine_is_refused_before_a_vm_exists() {
    let error = format!(
        "{:#}",
        Backend::create(
            Backend::begin(false),
            "big",
            1 << 50,
            &backing::Backing::default(),
            |_| unreachable!("there is no such memory"),
        )
        .unwrap_err()
    );
    let known = error.contains("more than") || error.contains("not supported yet");
    assert!(error.contains("Cannot create VM big") && known, "{error}");
}

#[test]
fn a_kick_may_come_before_the_run_and_after_the_end() {
    let test = "a_kick_may_come_before_the_run_and_after_the_end";
    let Some(vm) = vm(test, guest!("guest_kick", "2: jmp 2b")) else {
        return;
    };
    let mut vcpu = vm.create_vcpu(0, &cores(1)).unwrap();
    at_entry(&mut vcpu);
    let kick = vcpu.kick_handle();
    kick.kick();
    let exit = vcpu.run(&mut Record::new(|_, _, _| {})).unwrap();
    assert!(matches!(exit, Exit::Kicked), "{exit:?}");
    assert!(!vcpu.halted_for_good());
    assert_eq!(kick.exits(), 0, "a kick is no exit");
    drop(vcpu);
    drop(vm);
    kick.kick();
}

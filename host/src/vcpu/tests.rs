#![allow(unsafe_code)] // the `guest!` programs

use std::sync::mpsc;

use super::*;
use crate::hypervisor::tests::{at_entry, cores, guest, vm};
use crate::hypervisor::{Backend, DescriptorTable, Registers, Segment, Vm};

const PATIENCE: Duration = Duration::from_secs(10);

/// Sends each value that a guest writes to any port.
struct Ports(mpsc::Sender<u32>);

impl ExitHandler for Ports {
    fn pio_read(&mut self, _: u16, _: u8) -> u32 {
        0
    }
    fn pio_write(&mut self, _: u16, _: u8, value: u32) {
        let _ = self.0.send(value);
    }
    fn mmio_read(&mut self, _: u64, _: u8) -> u64 {
        0
    }
    fn mmio_write(&mut self, _: u64, _: u8, _: u64) {}
}

struct Running {
    set: VcpuSet<<Backend as Vm>::Vcpu>,
    ports: mpsc::Receiver<u32>,
    events: mpsc::Receiver<VmEvent>,
    _vm: Backend,
}

fn start(test: &str, program: &[u8], cpus: u32) -> Option<Running> {
    let vm = vm(test, program)?;
    let mut vcpus: Vec<_> = (0..cpus)
        .map(|cpu| vm.create_vcpu(cpu, &cores(cpus as u8)).unwrap())
        .collect();
    at_entry(&mut vcpus[0]);
    let (port_sender, ports) = mpsc::channel();
    let (event_sender, events) = mpsc::channel();
    let events_to = Arc::new(move |event| event_sender.send(event).unwrap_or(()));
    let memory = Arc::clone(vm.memory());
    let set = VcpuSet::spawn(
        vcpus,
        memory,
        &[],
        |_| Ports(port_sender.clone()),
        events_to,
    )
    .unwrap();
    Some(Running {
        set,
        ports,
        events,
        _vm: vm,
    })
}

#[test]
fn a_spinning_cpu_pauses_resumes_and_stops() {
    let program = guest!("guest_spin", "mov al, 1", "out 0x80, al", "2: jmp 2b");
    let Some(running) = start("a_spinning_cpu_pauses_resumes_and_stops", program, 1) else {
        return;
    };
    assert!(running.ports.try_recv().is_err(), "a thread starts parked");
    running.set.resume();
    assert_eq!(running.ports.recv_timeout(PATIENCE), Ok(1));
    running.set.pause(PATIENCE).unwrap();
    let mut rip = 0;
    running
        .set
        .for_each(|_, vcpu| {
            rip = vcpu.registers()?.rip;
            Ok(())
        })
        .unwrap();
    assert_eq!(rip, 0x1004);
    running
        .set
        .for_each(|_, vcpu| {
            at_entry(vcpu);
            Ok(())
        })
        .unwrap();
    running.set.resume();
    assert_eq!(
        running.ports.recv_timeout(PATIENCE),
        Ok(1),
        "it starts again at its entry"
    );
    for _ in 0..3 {
        assert!(!running.set.find_halt());
        std::thread::sleep(Duration::from_millis(20));
    }
    running.set.stop(PATIENCE).unwrap();
    assert!(running.events.try_recv().is_err());
}

/// The hold may come before the threads have woken up, which happens when a guest resets as soon as it runs.
#[test]
fn cpus_held_right_after_their_start_are_parked() {
    let program = guest!("guest_spin_again", "2: jmp 2b");
    let test = "cpus_held_right_after_their_start_are_parked";
    let Some(running) = start(test, program, 2) else {
        return;
    };
    for _ in 0..200 {
        running.set.resume();
        running.set.pause(PATIENCE).unwrap();
    }
    running.set.stop(PATIENCE).unwrap();
}

#[test]
fn a_second_cpu_starts_by_sipi_and_both_halt_for_good() {
    let program = guest!(
        "guest_sipi",
        "mov eax, es:[0xf0]",
        "or eax, 0x100",
        "mov es:[0xf0], eax",
        "mov dword ptr es:[0x310], 0x01000000", // to APIC id 1: INIT, then SIPI to 0x2000
        "mov dword ptr es:[0x300], 0x4500",
        "mov dword ptr es:[0x300], 0x4602",
        "mov al, 1",
        "out 0x80, al",
        "cli",
        "2: hlt",
        "jmp 2b",
    );
    let second = guest!(
        "guest_sipi_target",
        "mov al, 2",
        "out 0x80, al",
        "cli",
        "2: hlt",
        "jmp 2b"
    );
    let Some(running) = start(
        "a_second_cpu_starts_by_sipi_and_both_halt_for_good",
        program,
        2,
    ) else {
        return;
    };
    running._vm.memory().write(0x2000, second).unwrap();
    running.set.resume();
    let mut seen = [0, 0].map(|_| running.ports.recv_timeout(PATIENCE).unwrap());
    seen.sort_unstable();
    assert_eq!(seen, [1, 2]);
    let end = Instant::now() + PATIENCE;
    while !running.set.find_halt() {
        assert!(Instant::now() < end, "the halt was not found");
        std::thread::sleep(Duration::from_millis(20));
    }
    running.set.stop(PATIENCE).unwrap();
}

#[test]
fn a_crash_is_an_event_with_registers() {
    let program = guest!("guest_crash_event", "2: jmp 2b");
    let Some(running) = start("a_crash_is_an_event_with_registers", program, 1) else {
        return;
    };
    running
        .set
        .for_each(|_, vcpu| {
            let mut registers = vcpu.registers()?;
            registers.cs.base = crate::hypervisor::tests::MMIO;
            vcpu.set_registers(&registers)
        })
        .unwrap();
    running.set.resume();
    let event = running.events.recv_timeout(PATIENCE).unwrap();
    let VmEvent::Crash { cpu: 0, text } = event else {
        panic!("{event:?}")
    };
    assert!(
        text.contains("Real mode, ring 0") && text.contains("[not in RAM]"),
        "{text}"
    );
    running.set.stop(PATIENCE).unwrap();
}

#[test]
fn a_device_can_freeze_the_cpu_that_calls_it() {
    let program = guest!(
        "guest_freeze",
        "mov al, 1",
        "out 0x80, al",
        "mov al, 2",
        "out 0x80, al",
        "2: jmp 2b"
    );
    let Some(vm) = vm("a_device_can_freeze_the_cpu_that_calls_it", program) else {
        return;
    };
    struct Freezing(Arc<std::sync::OnceLock<Freezer>>, mpsc::Sender<u32>);
    impl ExitHandler for Freezing {
        fn pio_read(&mut self, _: u16, _: u8) -> u32 {
            0
        }
        fn pio_write(&mut self, _: u16, _: u8, value: u32) {
            self.0.get().unwrap().freeze();
            self.1.send(value).unwrap();
        }
        fn mmio_read(&mut self, _: u64, _: u8) -> u64 {
            0
        }
        fn mmio_write(&mut self, _: u64, _: u8, _: u64) {}
    }
    let mut vcpu = vm.create_vcpu(0, &cores(1)).unwrap();
    at_entry(&mut vcpu);
    let (freezer, (sender, ports)) = (Arc::new(std::sync::OnceLock::new()), mpsc::channel());
    let make = |_| Freezing(Arc::clone(&freezer), sender.clone());
    let set = VcpuSet::spawn(
        vec![vcpu],
        Arc::clone(vm.memory()),
        &[],
        make,
        Arc::new(|_| {}),
    )
    .unwrap();
    freezer.set(set.freezer()).unwrap_or(());
    set.resume();
    assert_eq!(ports.recv_timeout(PATIENCE), Ok(1));
    set.await_parked(PATIENCE).unwrap();
    assert!(ports.try_recv().is_err(), "it ran on after the freeze");
    set.resume();
    assert_eq!(ports.recv_timeout(PATIENCE), Ok(2));
    set.stop(PATIENCE).unwrap();
}

#[test]
fn a_fault_that_nothing_handles_is_a_triple_fault() {
    let test = "a_fault_that_nothing_handles_is_a_triple_fault";
    let Some(running) = start(test, &[], 1) else {
        return;
    };
    // Ring 3 with paging and an empty IDT, since some hypervisors interpret ring 0 and retry there for ever.
    let memory = running._vm.memory();
    memory.write_object(0x2000, 0x3007u64).unwrap();
    memory.write_object(0x3000, 0x4007u64).unwrap();
    memory.write_object(0x4000, 0x0087u64).unwrap();
    memory.write(0x1000, &[0x0f, 0x0b]).unwrap();
    let user = |selector, access| Segment {
        selector,
        base: 0,
        limit: 0xffff_ffff,
        access,
    };
    let enter = |_, vcpu: &mut <Backend as Vm>::Vcpu| {
        let old = vcpu.registers()?;
        vcpu.set_registers(&Registers {
            rip: 0x1000,
            rflags: 2,
            cs: user(0x23, 0xa0fb),
            ss: user(0x1b, 0xc0f3),
            ds: user(0x1b, 0xc0f3),
            es: user(0x1b, 0xc0f3),
            tr: Segment {
                access: 0x8b,
                ..old.tr
            },
            idt: DescriptorTable { base: 0, limit: 0 },
            cr0: 0x8000_0011,
            cr3: 0x2000,
            cr4: 1 << 5,
            efer: 0x500,
            ..old
        })
    };
    // It stays parked after its end, until it is told to run again.
    for _ in 0..2 {
        running.set.for_each(enter).unwrap();
        running.set.resume();
        let event = running.events.recv_timeout(PATIENCE);
        assert_eq!(event, Ok(VmEvent::TripleFault));
        running.set.pause(PATIENCE).unwrap();
        running.set.for_each(|_, vcpu| vcpu.reset()).unwrap();
    }
    running.set.stop(PATIENCE).unwrap();
}

//! The bhyve backend on the emulated driver, by what a host does not ask for yet: saved state, dirty pages, figures, the reservoir.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;

use vmm_driver::Emulated;
use vmm_host::hypervisor::backing::Backing;
use vmm_host::hypervisor::bhyve::{BhyveVm, reservoir};
use vmm_host::hypervisor::topology::Topology;
use vmm_host::hypervisor::{CpuModel, Exit, ExitHandler, Kick, Segment, Vcpu, Vm};

const RAM: u64 = 4 << 20;
const ENTRY: u64 = 0x1000;
/// Counts in AX, writes the count to 0x3000, and tells it at port 0x80.
const COUNTER: [u8; 8] = [
    0x40, // inc ax
    0xa3, 0x00, 0x30, // mov [0x3000], ax
    0xe7, 0x80, // out 0x80, ax
    0xeb, 0xf8, // jmp to inc
];

type Emulation = BhyveVm<Emulated>;

fn model() -> CpuModel {
    CpuModel {
        topology: Topology::of_cores(1),
        profile: None,
        x2apic: true,
    }
}

/// A VM with the program and its only CPU; `None`, and says why, where there is no KVM.
fn counting(name: &str) -> Option<(Emulation, impl Vcpu)> {
    if let Err(error) = std::fs::File::open("/dev/kvm") {
        println!("SKIPPED: {name}: /dev/kvm: {error}");
        return None;
    }
    let vm = Emulation::create(false, name, RAM, &Backing::default(), |_| {}).unwrap();
    vm.memory().write(ENTRY, &COUNTER).unwrap();
    let mut vcpu = vm.create_vcpu(0, &model()).unwrap();
    let mut registers = vcpu.registers().unwrap();
    let flat = Segment {
        selector: 0,
        base: 0,
        limit: 0xffff,
        access: 0x93,
    };
    (registers.cs, registers.ds, registers.rip) = (flat, flat, ENTRY);
    registers.rax = 0;
    vcpu.set_registers(&registers).unwrap();
    Some((vm, vcpu))
}

/// Kicks the CPU when it has told `last`.
struct Until {
    last: u32,
    told: Vec<u32>,
    kick: Arc<dyn Kick>,
}

impl ExitHandler for Until {
    fn pio_read(&mut self, _: u16, _: u8) -> u32 {
        0
    }
    fn pio_write(&mut self, _: u16, _: u8, value: u32) {
        self.told.push(value);
        if value == self.last {
            self.kick.kick();
        }
    }
    fn mmio_read(&mut self, _: u64, _: u8) -> u64 {
        0
    }
    fn mmio_write(&mut self, _: u64, _: u8, _: u64) {}
}

/// The counts up to `last`.
fn run(vcpu: &mut impl Vcpu, last: u32) -> Vec<u32> {
    let mut until = Until {
        last,
        told: Vec::new(),
        kick: vcpu.kick_handle(),
    };
    let exit = vcpu.run(&mut until).unwrap();
    assert!(matches!(exit, Exit::Kicked), "{exit:?}");
    until.told
}

#[test]
fn a_vm_goes_on_in_another_where_it_was_saved() {
    let Some((first, mut vcpu)) = counting("saved") else {
        return;
    };
    assert_eq!(run(&mut vcpu, 3), [1, 2, 3]);
    first.set_irq_line(9, true).unwrap();
    let state = first.export().unwrap();
    assert_eq!(state.lines, 1 << 9);

    let (second, mut other) = counting("restored").unwrap();
    second.import(&state).unwrap();
    assert_eq!(run(&mut other, 5), [4, 5]);
    second.set_irq_line(9, false).unwrap();
    assert_eq!(run(&mut vcpu, 4), [4], "the first is as it was");

    let (third, _) = counting("others").unwrap();
    let mut others = state.clone();
    others.vcpus.clear();
    let error = third.import(&others).unwrap_err().to_string();
    assert!(error.contains("this VM has [0]"), "{error}");
    assert_eq!(Emulated::violations(), [""; 0]);
}

#[test]
fn pages_that_the_guest_writes_are_told_once() {
    let Some((vm, mut vcpu)) = counting("dirty") else {
        return;
    };
    assert!(vm.take_dirty(0, RAM).is_err(), "nothing is noted yet");
    vm.track_dirty(true).unwrap();
    run(&mut vcpu, 2);
    let written = vm.take_dirty(0, 8 << 12).unwrap();
    assert_eq!(written, [1 << 3]);
    assert_eq!(vm.take_dirty(0, RAM).unwrap(), [0; 128]);
    vm.mark_dirty(0, 8 << 12, &written).unwrap();
    assert_eq!(vm.take_dirty(0, 8 << 12).unwrap(), written);
    assert!(vm.mark_dirty(0, RAM, &[0]).is_err());
    vm.track_dirty(false).unwrap();
    assert!(vm.take_dirty(0, RAM).is_err());
}

#[test]
fn figures_have_names() {
    let Some((vm, mut vcpu)) = counting("figures") else {
        return;
    };
    run(&mut vcpu, 2);
    let figures = vm.statistics(0).unwrap();
    let exits = figures.iter().find(|(name, _)| name.contains("exits"));
    assert!(exits.unwrap().1 >= 2, "{figures:?}");
}

#[test]
fn lines_fall_although_no_8259_saw_them_rise() {
    let Some((vm, _)) = counting("lines") else {
        return;
    };
    for gsi in [0, 4, 9, 16, 23] {
        for high in [true, true, false, false] {
            vm.set_irq_line(gsi, high).unwrap();
        }
    }
    assert!(vm.set_irq_line(24, true).is_err());
    vm.set_level_triggered(1 << 9 | 1 << 10).unwrap();
    assert_eq!(Emulated::violations(), [""; 0]);
}

#[test]
fn the_reservoir_grows_and_shrinks() {
    const MIB: u64 = 1 << 20;
    assert_eq!(
        reservoir::set_target::<Emulated>(64 * MIB, 0).unwrap(),
        64 * MIB
    );
    let held = reservoir::query::<Emulated>().unwrap();
    assert_eq!((held.free, held.used), (64 * MIB, 0));
    assert_eq!(reservoir::set_target::<Emulated>(0, MIB).unwrap(), 0);
    let error = reservoir::set_target::<Emulated>(u64::MAX << 12, 0).unwrap_err();
    assert!(format!("{error:#}").contains("ask for less"), "{error:#}");
    assert!(reservoir::set_target::<Emulated>(5, 0).is_err());
}

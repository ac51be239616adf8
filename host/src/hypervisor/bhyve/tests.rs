//! A VM on a driver that keeps record of its requests and answers `VM_RUN` from a script: what is asked for, in what order.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod scripted_driver;

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::hypervisor::topology::Topology;
use crate::hypervisor::{Exit, ExitHandler, Space, Vcpu};
use scripted_driver::{Fake, FakeDriver, VMS};

const RAM: u64 = 4 << 20;

fn vm(name: &str) -> (BhyveVm<FakeDriver>, Arc<Fake>) {
    let vm = BhyveVm::create(false, name, RAM, &Backing::default(), |_| {}).unwrap();
    (vm, Fake::of(name))
}

fn model(x2apic: bool, topology: Topology) -> CpuModel {
    CpuModel {
        topology,
        profile: None,
        x2apic,
    }
}

fn vcpu(vm: &BhyveVm<FakeDriver>) -> BhyveVcpu {
    let vcpu = vm.create_vcpu(0, &model(true, Topology::of_cores(1)));
    vcpu.unwrap()
}

fn descriptor() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap()
}

fn signal(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

/// What a guest did; reads give 0x1234_5678 and so on.
#[derive(Default)]
struct Record(Vec<(Space, u64, u8, Option<u64>)>);

impl ExitHandler for Record {
    fn pio_read(&mut self, port: u16, width: u8) -> u32 {
        self.0.push((Space::Pio, port.into(), width, None));
        0x1234_5678
    }
    fn pio_write(&mut self, port: u16, width: u8, value: u32) {
        self.0
            .push((Space::Pio, port.into(), width, Some(value.into())));
    }
    fn mmio_read(&mut self, address: u64, width: u8) -> u64 {
        self.0.push((Space::Mmio, address, width, None));
        0x1122_3344_5566_7788
    }
    fn mmio_write(&mut self, address: u64, width: u8, value: u64) {
        self.0.push((Space::Mmio, address, width, Some(value)));
    }
}

fn port(port: u16, bytes: u8, flags: u8, eax: u32) -> VmExit {
    let inout = VmInout {
        port,
        bytes,
        flags,
        eax,
        ..Default::default()
    };
    exit(EXITCODE_INOUT, ExitPayload { inout })
}

fn mmio(gpa: u64, bytes: u8, read: bool, data: u64) -> VmExit {
    let mmio = VmMmio {
        gpa,
        bytes,
        read: read.into(),
        data,
        ..Default::default()
    };
    exit(EXITCODE_MMIO, ExitPayload { mmio })
}

fn msr(code: i32, wval: u64) -> VmExit {
    let msr = VmExitMsr { code: 0x1234, wval };
    exit(code, ExitPayload { msr })
}

fn suspended(how: i32) -> VmExit {
    let suspended = VmExitSuspended {
        how,
        ..Default::default()
    };
    exit(EXITCODE_SUSPENDED, ExitPayload { suspended })
}

fn exit(exitcode: i32, u: ExitPayload) -> VmExit {
    VmExit {
        exitcode,
        u,
        ..Default::default()
    }
}

#[test]
fn a_vm_is_made_and_goes_with_its_last_user() {
    let (vm, fake) = vm("made");
    let made = [
        "autodestruct 1",
        "segment 0 0x400000 \"\"",
        "map 0 at 0x0+0x400000 7",
    ];
    assert_eq!(fake.log(), made);
    vm.memory().write(0x1000, b"guest").unwrap();
    let mut seen = [0; 5];
    let file = fake.lock().segments[0].clone().unwrap();
    rustix::io::pread(&file, &mut seen, 0x1000).unwrap();
    assert_eq!(&seen, b"guest");
    assert_eq!(vm.max_vcpus(), 32);

    let vcpu = vm
        .create_vcpu(3, &model(false, Topology::of_cores(4)))
        .unwrap();
    let made = [
        "activate 3",
        "reset 3 kind 0",
        "run state 3 0",
        "x2apic 3 0",
        "cpuid 3 flags 2",
        "capability 0 1",
    ];
    assert_eq!(fake.log(), made);
    let (memory, kick) = (Arc::clone(vm.memory()), vcpu.kick_handle());
    drop(vm);
    assert_eq!(fake.log(), [""; 0]);
    drop(vcpu);
    assert_eq!(fake.log(), ["destroy"]);
    kick.kick();
    assert_eq!(memory.read_object::<u8>(0x1000).unwrap(), b'g');
}

#[test]
fn what_cannot_be_made_leaves_nothing_behind() {
    let create = |name: &str, memory| {
        let made = BhyveVm::<FakeDriver>::create(false, name, memory, &Backing::default(), |_| {});
        format!("{:#}", made.map(drop).unwrap_err())
    };
    let error = create("unopenable", RAM);
    assert!(error.contains("/dev/vmm/unopenable"), "{error}");
    assert!(!VMS.lock().unwrap().contains_key("unopenable"));
    let (_first, _) = vm("twice");
    let error = create("twice", RAM);
    assert!(
        error.contains("VM twice") && error.contains("--force"),
        "{error}"
    );
    let error = create("odd", 4097);
    assert!(error.contains("4 KiB"), "{error}");
    assert!(!VMS.lock().unwrap().contains_key("odd"));
}

#[test]
fn ids_that_bhyve_lacks_are_refused() {
    let (vm, _) = vm("ids");
    let topology = Topology::new(5, 3, 2).unwrap();
    let last = topology.cpus() - 1;
    let error = vm.create_vcpu(last, &model(true, topology)).map(drop);
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("local APIC id 37, and 31 is the last"),
        "{error}"
    );
}

#[test]
fn roms_hide_and_come_back_after_a_reset() {
    let (vm, fake) = vm("roms");
    fake.log();
    let first = vm.create_rom(0xffff_0000, 0x1_0000).unwrap();
    let second = vm.create_rom(0xfffe_0000, 0x1000).unwrap();
    assert_eq!(
        fake.log(),
        [
            "segment 1 0x10000 \"bootrom\"",
            "map 1 at 0xffff0000+0x10000 5",
            "segment 2 0x1000 \"rom1\"",
            "map 2 at 0xfffe0000+0x1000 5"
        ]
    );
    first.write(4, b"code");
    let mut seen = [0; 4];
    let file = fake.lock().segments[1].clone().unwrap();
    rustix::io::pread(&file, &mut seen, 4).unwrap();
    assert_eq!(&seen, b"code");
    for _ in 0..2 {
        vm.show_rom(&second, false).unwrap();
    }
    assert_eq!(fake.log(), ["unmap 0xfffe0000+0x1000"]);
    let _vcpu = vcpu(&vm);
    vm.set_irq_line(9, true).unwrap();
    fake.log();
    vm.reset().unwrap();
    assert_eq!(
        fake.log(),
        [
            "pause",
            "reinit 1",
            "map 1 at 0xffff0000+0x10000 5",
            "activate 0",
            "reset 0 kind 0",
            "run state 0 2",
            "x2apic 0 1",
            "resume",
            "ioapic 9 high"
        ]
    );
    vm.show_rom(&second, true).unwrap();
    assert_eq!(fake.log(), ["map 2 at 0xfffe0000+0x1000 5"]);
    vm.create_rom(0xc000_0000, 0x1000).unwrap();
    vm.create_rom(0xc000_1000, 0x1000).unwrap();
    let error = vm.create_rom(0xc000_2000, 0x1000).unwrap_err().to_string();
    assert!(error.contains("no room for another ROM"), "{error}");
    assert!(vm.create_rom(0xc000_2000, 0x800).is_err());
    assert!(
        vm.show_rom(&Rom::detached(0, 0x1000).unwrap(), true)
            .is_err()
    );
}

#[test]
fn clocks_are_placed_again_and_the_clock_is_set_once() {
    let (vm, fake) = vm("clocks");
    fake.log();
    assert!(vm.start_clocks(0x608, &[(0x15, 0x80)]).unwrap());
    assert!(vm.start_clocks(0x608, &[(0x15, 0x80)]).unwrap());
    let both = ["pm timer 0x608", "cmos 0x15 = 0x80"];
    assert_eq!(fake.log(), [&both[..], &["clock"], &both[..]].concat());
}

#[test]
fn accesses_are_completed_by_the_next_entry() {
    let (vm, fake) = vm("accesses");
    let bell = descriptor();
    let doorbell = Doorbell {
        space: Space::Mmio,
        address: 0xd000_0040,
        width: 2,
        value: None,
    };
    assert!(vm.bind_doorbell(doorbell, bell.as_fd()).unwrap());
    let mut vcpu = vcpu(&vm);
    fake.log();
    fake.lock().exits.extend([
        port(0x60, 1, INOUT_IN, 0),
        port(0x80, 2, 0, 0xaaaa_bbbb),
        mmio(0xd000_0000, 4, true, 0),
        mmio(0xd000_0040, 2, false, 7),
        mmio(0xd000_0048, 8, false, 9),
        msr(EXITCODE_RDMSR, 0),
        msr(EXITCODE_WRMSR, 5),
        suspended(VM_SUSPEND_TRIPLEFAULT),
    ]);
    fake.lock().registers.insert(VM_REG_GUEST_RDX, 99);
    let mut record = Record::default();
    let end = vcpu.run(&mut record).unwrap();
    assert!(matches!(end, Exit::TripleFault), "{end:?}");
    assert_eq!(
        record.0,
        [
            (Space::Pio, 0x60, 1, None),
            (Space::Pio, 0x80, 2, Some(0xbbbb)),
            (Space::Mmio, 0xd000_0000, 4, None),
            (Space::Mmio, 0xd000_0048, 8, Some(9)),
        ]
    );
    assert_eq!(
        fake.log(),
        [
            "run",
            "run: port 0x60 0x78",
            "run: port 0x80 0xaaaabbbb",
            "run: memory 0xd0000000 0x55667788",
            "run: memory 0xd0000040 0x7",
            "run: memory 0xd0000048 0x9",
            "run",
            "run"
        ]
    );
    assert_eq!(count(&bell), 1);
    assert_eq!(fake.lock().registers[&VM_REG_GUEST_RDX], 0);
    assert_eq!(vcpu.kick_handle().exits(), 8);
}

/// As a device does that a vCPU is in: what the guest does is completed, and no more of it runs.
#[test]
fn a_kick_from_within_completes_the_access_and_leaves() {
    struct Kicks(Arc<dyn crate::hypervisor::Kick>);
    impl ExitHandler for Kicks {
        fn pio_read(&mut self, _: u16, _: u8) -> u32 {
            0
        }
        fn pio_write(&mut self, _: u16, _: u8, _: u32) {
            self.0.kick();
        }
        fn mmio_read(&mut self, _: u64, _: u8) -> u64 {
            0
        }
        fn mmio_write(&mut self, _: u64, _: u8, _: u64) {}
    }
    let (vm, fake) = vm("within");
    let mut vcpu = vcpu(&vm);
    fake.log();
    fake.lock()
        .exits
        .extend([port(0xcf9, 1, 0, 6), suspended(VM_SUSPEND_HALT)]);
    let mut kicks = Kicks(vcpu.kick_handle());
    assert!(matches!(vcpu.run(&mut kicks).unwrap(), Exit::Kicked));
    assert_eq!(fake.log(), ["run", "run: port 0xcf9 0x6 and leave"]);
    assert!(matches!(vcpu.run(&mut kicks).unwrap(), Exit::Halted));
    assert_eq!(fake.log(), ["run"]);
    fake.lock().exits.push_back(port(0x80, 1, 0, 1));
    vcpu.reset().unwrap();
    assert_eq!(
        fake.log(),
        ["reset 0 kind 0", "run state 0 2", "x2apic 0 1"]
    );
}

#[test]
fn a_kick_from_elsewhere_ends_a_run() {
    let (vm, fake) = vm("elsewhere");
    let mut vcpu = vcpu(&vm);
    let kick = vcpu.kick_handle();
    for _ in 0..50 {
        let thread = std::thread::spawn({
            let (kick, fake) = (Arc::clone(&kick), Arc::clone(&fake));
            move || {
                fake.wait_for(|state| state.running);
                kick.kick();
            }
        });
        let end = vcpu.run(&mut Record::default()).unwrap();
        assert!(matches!(end, Exit::Kicked), "{end:?}");
        thread.join().unwrap();
    }
    assert_eq!(kick.exits(), 0, "kicks are no exits");
}

#[test]
fn a_vm_that_another_process_destroys_says_so() {
    let (vm, fake) = vm("destroyed");
    let mut vcpu = vcpu(&vm);
    fake.lock().gone = true;
    let end = vcpu.run(&mut Record::default()).unwrap();
    assert!(matches!(end, Exit::Destroyed), "{end:?}");
    vcpu.kick_handle().kick();
}

#[test]
fn eventfds_become_messages() {
    let (vm, fake) = vm("messages");
    fake.log();
    let msi = |data| Msi {
        address: 0xfee0_0000,
        data,
    };
    let (fd, other) = (descriptor(), descriptor());
    let route = vm.connect_msi(fd.as_fd(), msi(0x40)).unwrap();
    let second = vm.connect_msi(other.as_fd(), msi(0x50)).unwrap();
    signal(&fd);
    fake.wait_for(|state| state.log == ["msi 0x40 to 0xfee00000"]);
    fake.log();
    vm.update_msi(&route, msi(0x41)).unwrap();
    signal(&fd);
    fake.wait_for(|state| state.log == ["msi 0x41 to 0xfee00000"]);
    fake.log();
    vm.disconnect_msi(fd.as_fd(), route).unwrap();
    signal(&fd);
    signal(&other);
    fake.wait_for(|state| state.log == ["msi 0x50 to 0xfee00000"]);
    assert_eq!(count(&fd), 1, "its counts stay");
    vm.disconnect_msi(other.as_fd(), second).unwrap();
    // What was counted before is delivered too.
    signal(&fd);
    let route = vm.connect_msi(fd.as_fd(), msi(0x42)).unwrap();
    fake.wait_for(|state| state.log.last().unwrap() == "msi 0x42 to 0xfee00000");
    vm.disconnect_msi(fd.as_fd(), route).unwrap();
    assert!(vm.update_msi(&MsiRoute(7), msi(1)).is_err());
}

#[test]
fn flash_writes_reach_the_device_and_are_passed() {
    let (vm, fake) = vm("flash");
    let rom = vm.create_rom(0xffc0_0000, 0x1000).unwrap();
    let mut vcpu = vcpu(&vm);
    // mov byte [rdi], al in real mode's 16-bit code, at 0x1000: mov [di], al.
    vm.memory().write(0x1000, &[0x88, 0x05, 0xf4]).unwrap();
    let set = [(VM_REG_GUEST_RIP, 0x1000), (VM_REG_GUEST_RAX, 0x1240)];
    fake.lock().registers.extend(set);
    let paging = |gpa| {
        let paging = VmExitPaging {
            gpa,
            fault_type: PROT_WRITE,
        };
        exit(EXITCODE_PAGING, ExitPayload { paging })
    };
    fake.lock()
        .exits
        .extend([paging(rom.gpa() + 8), paging(rom.gpa() + 8)]);
    let mut record = Record::default();
    // The second is at HLT, which writes nothing.
    let Exit::Crash(text) = vcpu.run(&mut record).unwrap() else {
        panic!("HLT does not write");
    };
    assert!(
        text.contains("0xffc00008") && text.contains("[f4"),
        "{text}"
    );
    assert_eq!(record.0, [(Space::Mmio, 0xffc0_0008, 1, Some(0x40))]);
    fake.lock().exits.push_back(paging(0xc000_0000));
    let end = vcpu.run(&mut record).unwrap();
    assert!(matches!(end, Exit::Crash(_)), "no ROM: {end:?}");
}

#[test]
fn msrs_are_set_one_after_the_other() {
    let (vm, fake) = vm("msrs");
    let mut vcpu = vcpu(&vm);
    fake.log();
    let error = vcpu.set_msrs(&[(0x2ff, 6), (0x277, u64::MAX), (0x10, 1)]);
    let error = format!("{:#}", error.unwrap_err());
    assert!(error.contains("MSR 0x277"), "{error}");
    assert_eq!(fake.log(), ["msr 0x2ff = 0x6"]);
}

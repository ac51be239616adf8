use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::power::VmEvent;
use super::*;
use crate::hypervisor::{ExitHandler, Space};
use crate::pci::fake_vm::FakeVm;
use crate::pci::{BarDesc, BarKind};

struct Fixture {
    vm: Arc<FakeVm>,
    machine: Machine<FakeVm>,
    events: Arc<Mutex<Vec<VmEvent>>>,
    debug_port: Arc<DebugPort>,
    io: BusAccess,
}

impl Fixture {
    fn new() -> Self {
        Self::with(Board::default())
    }

    fn with(board: Board) -> Self {
        Self::on(FakeVm::default(), board)
    }

    fn on(vm: FakeVm, board: Board) -> Self {
        let vm = Arc::new(vm);
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let sender: EventSender = Arc::new(move |event| sink.lock().unwrap().push(event));
        let debug_port = Arc::new(DebugPort::default());
        // As of two sockets with three cores.
        let cpus = vec![0, 1, 2, 4, 5, 6];
        let memory = Arc::clone(vm.memory());
        let machine = Machine::new(vm.clone(), &memory, cpus, board, debug_port.clone(), sender);
        let machine = machine.unwrap();
        let io = machine.exit_handler();
        Self {
            vm,
            machine,
            events,
            debug_port,
            io,
        }
    }

    fn events(&self) -> Vec<VmEvent> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }
}

struct Still;

impl Registers for Still {
    fn read(&self, region: u32, offset: u64, _: u8) -> u64 {
        u64::from(region) << 8 | offset
    }
    fn write(&self, _: u32, _: u64, _: u8, _: u64) {}
}

fn still() -> Arc<dyn Registers> {
    Arc::new(Still)
}

fn com(address: u64, irq: u8) -> IsaDesc {
    IsaDesc {
        regions: vec![IsaRegion {
            id: 3,
            space: Space::Pio,
            address,
            size: 8,
        }],
        pins: vec![IsaPin { irq, level: false }],
        hid: Some("PNP0501".to_owned()),
    }
}

#[test]
fn the_chipset_is_where_guests_expect_it() {
    let mut fixture = Fixture::new();
    for (address, ids, class, subsystem) in [
        (0x8000_0000_u32, 0x1237_8086, 0x0600_0002, 0xfffe_01de_u32),
        (0x8000_0800, 0x7000_8086, 0x0601_0000, 0xfffd_01de),
        (0x8000_0b00, 0x7113_8086, 0x0680_0003, 0xfffc_01de),
    ] {
        let mut read = |register| {
            fixture.io.pio_write(0xcf8, 4, address | register);
            fixture.io.pio_read(0xcfc, 4)
        };
        assert_eq!((read(0), read(8), read(0x2c)), (ids, class, subsystem));
    }
    fixture.io.pio_write(0xcf8, 4, 0x8000_0b40);
    assert_eq!(fixture.io.pio_read(0xcfc, 4), 0xb001);
    fixture.io.pio_write(0xcf8, 4, 0x8000_0860);
    assert_eq!(fixture.io.pio_read(0xcfc, 4), 0x8080_8080);
    fixture.io.pio_write(0xcf8, 4, 0x8000_080c);
    assert_eq!(fixture.io.pio_read(0xcfe, 1), 0x80);
}

#[test]
fn a_device_cannot_have_a_slot_of_the_board() {
    let fixture = Fixture::new();
    let desc = PciFunctionDesc {
        vendor: 1,
        ..PciFunctionDesc::default()
    };
    for (slot, holder) in [("0.0.0", "i440FX"), ("0.1.0", "PIIX3"), ("0.1.3", "PIIX4")] {
        let result =
            fixture
                .machine
                .add_pci("dev.block0", slot.parse().unwrap(), &desc, still(), None);
        let error = format!("{:#}", result.err().unwrap());
        assert!(
            error.contains("dev.block0") && error.contains(holder) && error.contains(slot),
            "{error}"
        );
    }
}

#[test]
fn isa_devices_answer_and_share_lines() {
    let mut fixture = Fixture::new();
    let one = fixture
        .machine
        .add_isa("dev.com1", &com(0x3f8, 4), &still())
        .unwrap();
    let three = fixture
        .machine
        .add_isa("dev.com3", &com(0x3e8, 4), &still())
        .unwrap();
    assert_eq!(fixture.io.pio_read(0x3fd, 1), 5);
    assert_eq!(fixture.io.pio_read(0x3fd, 2), 0x305);
    one.level(0, true).unwrap();
    three.level(0, true).unwrap();
    one.level(0, false).unwrap();
    assert!(fixture.vm.line(4));
    three.reset();
    assert!(!fixture.vm.line(4));
    assert!(
        one.level(1, true)
            .unwrap_err()
            .to_string()
            .contains("dev.com1: interrupt pin 1 of 1")
    );
}

#[test]
fn unsound_isa_devices_are_refused_and_leave_nothing() {
    let fixture = Fixture::new();
    let before = fixture.machine.buses().pio.claims();
    let try_add = |desc: &IsaDesc| {
        format!(
            "{:#}",
            fixture
                .machine
                .add_isa("dev.x", desc, &still())
                .err()
                .unwrap()
        )
    };
    for (address, holder) in [
        (0x70, "CMOS clock"),
        (0x20, "interrupt controller"),
        (0xcf8, "PCI"),
        (0xb010, "power"),
    ] {
        let error = try_add(&com(address, 4));
        assert!(error.contains("dev.x") && error.contains(holder), "{error}");
    }
    assert!(try_add(&com(0x3f8, 16)).contains("0 to 15"));
    assert!(try_add(&com(0x3f8, 2)).contains("belongs to the board"));
    assert!(try_add(&com(0x1_0000, 4)).contains("0xffff"));
    assert!(
        try_add(&IsaDesc {
            hid: Some("serial".to_owned()),
            ..com(0x3f8, 4)
        })
        .contains("ACPI hardware id")
    );
    let mut two = com(0x3f8, 4);
    two.regions.push(IsaRegion {
        id: 4,
        space: Space::Pio,
        address: 0x3fc,
        size: 8,
    });
    assert!(try_add(&two).contains("taken by dev.x"));
    assert_eq!(fixture.machine.buses().pio.claims(), before);
    assert_eq!(
        fixture.machine.write_acpi(fixture.vm.memory()).unwrap(),
        0xf0000
    );
}

#[test]
fn the_guest_routes_interrupt_pins() {
    let mut fixture = Fixture::new();
    let desc = PciFunctionDesc {
        vendor: 1,
        intx: true,
        ..PciFunctionDesc::default()
    };
    // INTA of device 4 is on link D.
    let function = fixture
        .machine
        .add_pci("dev.a", "0.4.0".parse().unwrap(), &desc, still(), None)
        .unwrap();
    let mut route = |value| {
        fixture.io.pio_write(0xcf8, 4, 0x8000_0860);
        fixture.io.pio_write(0xcff, 1, value);
        fixture.io.pio_read(0xcff, 1)
    };
    function.level(true).unwrap();
    assert!(fixture.vm.seen.lock().unwrap().lines.is_empty());
    for line in 0..16 {
        // Bits 6 to 4 are reserved.
        assert_eq!(route(0x70 | line), line);
        let high: Vec<u32> = (0..24).filter(|&gsi| fixture.vm.line(gsi)).collect();
        let good = matches!(line, 3..=7 | 9..=12 | 14 | 15);
        assert_eq!(high, if good { vec![line] } else { vec![] }, "{line}");
    }
    assert_eq!(route(0x8f), 0x8f);
    assert!(!fixture.vm.line(15));
    fixture.machine.assign_resources().unwrap();
    fixture.io.pio_write(0xcf8, 4, 0x8000_0860);
    assert_eq!(fixture.io.pio_read(0xcfc, 4), 0x0b0b_0a0a);
    assert_eq!(
        fixture.vm.seen.lock().unwrap().level_triggered,
        1 << 9 | 1 << 10 | 1 << 11
    );
    assert!(fixture.vm.line(11));
    fixture.machine.reset();
    assert!(!fixture.vm.line(11));
    assert_eq!(fixture.io.pio_read(0xcfc, 4), 0xffff_ffff);
    fixture.io.pio_write(0xcf8, 4, 0x8000_0860);
    assert_eq!(fixture.io.pio_read(0xcfc, 4), 0x8080_8080);
}

#[test]
fn latches_hold_until_a_reset() {
    let mut fixture = Fixture::new();
    fixture.io.pio_write(0x80, 1, 0xa5);
    fixture.io.pio_write(0x84, 4, 0x4433_2211);
    fixture.io.pio_write(0xb2, 2, 0x02f1);
    assert_eq!(fixture.io.pio_read(0x80, 1), 0xa5);
    assert_eq!(fixture.io.pio_read(0x85, 2), 0x3322);
    assert_eq!(fixture.io.pio_read(0xb3, 1), 2);
    fixture.machine.reset();
    assert_eq!(
        (fixture.io.pio_read(0x80, 1), fixture.io.pio_read(0xb2, 2)),
        (0, 0)
    );
    assert_eq!(fixture.events(), []);
}

#[test]
fn the_debug_port_takes_each_byte_of_an_access() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.io.pio_read(0x402, 1), 0xe9);
    for byte in b"Sec" {
        fixture.io.pio_write(0x402, 1, u32::from(*byte));
    }
    // A reset is no reason to forget.
    fixture.machine.reset();
    assert_eq!(fixture.debug_port.tail().as_deref(), Some("Sec"));
}

#[test]
fn a_reduced_board_turns_off_by_its_sleep_register_and_has_the_host_bridge_alone() {
    let mut fixture = Fixture::with(Board {
        legacy: false,
        pci: false,
        ps2: false,
    });
    for (device, id) in [(0_u32, 0x1237_8086), (1, u32::MAX)] {
        fixture.io.pio_write(0xcf8, 4, 0x8000_0000 | device << 11);
        assert_eq!(fixture.io.pio_read(0xcfc, 4), id, "device {device}");
    }
    // Sleep type 0 without and with the bit that enables it, then a type that is not offered.
    fixture.io.pio_write(0xb010, 1, 0);
    fixture.io.pio_write(0xb011, 1, 1 << 5);
    fixture.io.pio_write(0xb010, 1, 1 << 5 | 3 << 2);
    assert_eq!(fixture.events(), []);
    fixture.io.pio_write(0xb010, 1, 1 << 5);
    assert_eq!(fixture.events(), [VmEvent::PowerOff]);
    assert_eq!(fixture.io.pio_read(0xb010, 2), 0);
}

#[test]
fn a_board_without_ps2_knows_its_reset_pulse_only() {
    let mut fixture = Fixture::with(Board {
        ps2: false,
        ..Board::default()
    });
    fixture.io.pio_write(0x64, 1, 0xaa);
    assert_eq!(fixture.io.pio_read(0x64, 1), 0);
    fixture.io.pio_write(0x64, 1, 0xfe);
    assert_eq!(fixture.events(), [VmEvent::Reset]);
    fixture
        .machine
        .add_isa("dev.x", &com(0x3f8, 12), &still())
        .unwrap();
    let error = Fixture::new()
        .machine
        .add_isa("dev.x", &com(0x3f8, 12), &still())
        .err()
        .unwrap();
    assert!(error.to_string().contains("belongs to the board"));
}

#[test]
fn power_off_and_reset_are_reported() {
    let mut fixture = Fixture::new();
    fixture.io.pio_write(0xb004, 2, 1 << 13);
    assert_eq!(fixture.events(), [VmEvent::PowerOff]);
    // Another sleep type, or no sleep enable: nothing.
    fixture.io.pio_write(0xb004, 2, 1 << 13 | 5 << 10);
    fixture.io.pio_write(0xb004, 2, 0);
    assert_eq!(fixture.events(), []);
    // By the upper byte alone, and as a dword over status and enable's neighbour.
    fixture.io.pio_write(0xb005, 1, 1 << 5);
    fixture.io.pio_write(0xb004, 4, 1 << 13);
    assert_eq!(fixture.events(), [VmEvent::PowerOff, VmEvent::PowerOff]);
    fixture.io.pio_write(0xcf9, 1, 2);
    assert_eq!(fixture.events(), []);
    assert_eq!(fixture.io.pio_read(0xcf9, 1), 2);
    fixture.io.pio_write(0xcf9, 1, 6);
    fixture.io.pio_write(0x64, 1, 0xfe);
    assert_eq!(fixture.events(), [VmEvent::Reset, VmEvent::Reset]);
    // A full reset, and the fast one; without its bit, port 0x92 does nothing.
    fixture.io.pio_write(0xcf9, 1, 0xe);
    assert_eq!(fixture.io.pio_read(0x92, 1), 2);
    fixture.io.pio_write(0x92, 1, 2);
    assert_eq!(fixture.events(), [VmEvent::Reset]);
    fixture.io.pio_write(0x92, 1, 1);
    assert_eq!(fixture.events(), [VmEvent::Reset]);
    fixture.machine.reset();
    assert_eq!(fixture.io.pio_read(0xcf9, 1), 0);
    // A configuration address whose second byte is 6 is no reset.
    fixture.io.pio_write(0xcf8, 4, 0x8000_0600);
    fixture.io.pio_write(0x64, 1, 0xd1);
    assert_eq!(fixture.events(), []);
}

#[test]
fn the_nmi_button_reaches_every_cpu() {
    let fixture = Fixture::new();
    fixture.machine.press_nmi_button();
    assert_eq!(fixture.vm.seen.lock().unwrap().nmis, [0, 1, 2, 4, 5, 6]);
}

#[test]
fn the_power_button_raises_the_sci_until_acknowledged() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.io.pio_read(0xb004, 2), 1);
    assert!(!fixture.machine.press_power_button());
    assert!(!fixture.vm.line(9));
    // Enabled afterwards: the event is still there.
    fixture.io.pio_write(0xb002, 2, 1 << 8);
    assert!(fixture.vm.line(9));
    assert_eq!(fixture.io.pio_read(0xb000, 4), 0x0100_0100);
    fixture.io.pio_write(0xb000, 2, 1 << 8);
    assert!(!fixture.vm.line(9));
    assert!(fixture.machine.press_power_button());
    assert!(fixture.vm.line(9));
    // Acknowledged by its byte alone; the enable bits stay.
    fixture.io.pio_write(0xb001, 1, 1);
    assert!(!fixture.vm.line(9));
    assert_eq!(fixture.io.pio_read(0xb002, 2), 1 << 8);
    fixture.machine.press_power_button();
    fixture.machine.reset();
    assert!(!fixture.vm.line(9));
    assert_eq!(fixture.io.pio_read(0xb000, 4), 0);
}

#[test]
fn general_purpose_enables_hold_and_nothing_is_pending() {
    let mut fixture = Fixture::new();
    fixture.io.pio_write(0xafe2, 1, 0xa5);
    fixture.io.pio_write(0xafe0, 2, 0xffff);
    assert_eq!(fixture.io.pio_read(0xafe0, 4), 0x00a5_0000);
    assert_eq!(fixture.io.pio_read(0xafe2, 1), 0xa5);
}

#[test]
fn the_timer_counts_at_its_rate() {
    let mut fixture = Fixture::new();
    let (start, first) = (Instant::now(), fixture.io.pio_read(0xb008, 4));
    std::thread::sleep(Duration::from_millis(20));
    let ticks = fixture.io.pio_read(0xb008, 4).wrapping_sub(first);
    let most = start.elapsed().as_micros() as f64 * 3.579_545;
    assert!(
        f64::from(ticks) >= 20_000.0 * 3.579 && f64::from(ticks) <= most + 8.0,
        "{ticks} of {most}"
    );
}

#[test]
fn a_guest_finds_and_uses_a_device_after_direct_boot() {
    let mut fixture = Fixture::new();
    let desc = PciFunctionDesc {
        vendor: 0x1af4,
        device: 0x1042,
        intx: true,
        bars: vec![BarDesc {
            index: 0,
            kind: BarKind::Mmio64,
            size: 0x4000,
            region: 2,
            prefetch: false,
        }],
        ..PciFunctionDesc::default()
    };
    let function = fixture
        .machine
        .add_pci("dev.block0", "0.4.0".parse().unwrap(), &desc, still(), None)
        .unwrap();
    fixture.machine.assign_resources().unwrap();
    let bar = fixture.io.mmio_read(ECAM_BASE + (4 << 15) + 0x10, 8) & !0xf;
    assert_eq!(fixture.io.mmio_read(bar + 0x20, 4), 0x220);
    function.level(true).unwrap();
    let line = fixture.io.mmio_read(ECAM_BASE + (4 << 15) + 0x3c, 1) as u32;
    assert!(fixture.vm.line(line));
    fixture.machine.reset();
    assert_eq!(fixture.io.mmio_read(bar + 0x20, 4), 0xffff_ffff);
    fixture.machine.assign_resources().unwrap();
    assert_eq!(fixture.io.mmio_read(bar + 0x20, 4), 0x220);
}

/// A disk with one BAR of 64 bits, at slot 4.
fn add_disk(fixture: &Fixture, size: u64) {
    let desc = PciFunctionDesc {
        vendor: 0x1af4,
        device: 0x1042,
        bars: vec![BarDesc {
            index: 0,
            kind: BarKind::Mmio64,
            size,
            region: 2,
            prefetch: false,
        }],
        ..PciFunctionDesc::default()
    };
    let slot = "0.4.0".parse().unwrap();
    fixture
        .machine
        .add_pci("dev.block0", slot, &desc, still(), None)
        .unwrap();
}

#[test]
fn firmware_gets_windows_around_the_bars_that_it_placed() {
    let mut fixture = Fixture::new();
    add_disk(&fixture, 0x4000);
    let holds = |blobs: &acpi::Blobs, number: u64| {
        let bytes = number.to_le_bytes();
        blobs.tables.windows(8).any(|window| window == bytes)
    };
    // As firmware leaves it: an address, and decoding off until a driver starts.
    let (first, last) = (0x3f_c000_0000_u64, 0x3f_c000_3fff_u64);
    let disk = ECAM_BASE + (4 << 15);
    let end = fixture.machine.apertures.mmio64.last;
    assert!(end < first);
    let blobs = fixture.machine.acpi_blobs();
    assert!(holds(&blobs, end) && !holds(&blobs, last));
    fixture.io.mmio_write(disk + 0x10, 4, first & 0xffff_ffff);
    fixture.io.mmio_write(disk + 0x14, 4, first >> 32);
    assert!(holds(&fixture.machine.acpi_blobs(), last));
    // A guest that is sizing the BAR, and a reset.
    fixture.io.mmio_write(disk + 0x10, 8, u64::MAX);
    assert!(holds(&fixture.machine.acpi_blobs(), end));
    fixture.machine.reset();
    assert_eq!(fixture.machine.acpi_blobs().tables, blobs.tables);
}

#[test]
fn a_guest_without_firmware_finds_smbios_where_it_searches() {
    let fixture = Fixture::new();
    add_disk(&fixture, 0x4000);
    let memory = fixture.vm.memory();
    let topology = crate::hypervisor::topology::Topology::new(1, 2, 1).unwrap();
    let processors = smbios::Processors::from_cpuid(topology, |_, _| None);
    let mut identity = smbios::Identity {
        serial: "SN-0042".to_owned(),
        ..smbios::Identity::default()
    };
    fixture.machine.write_acpi(memory).unwrap();
    let blobs = fixture
        .machine
        .smbios_blobs(memory, &identity, &processors, false);
    fixture.machine.write_smbios(memory, &blobs).unwrap();
    let mut area = vec![0; 0x1_0000];
    memory.read(0xf_0000, &mut area).unwrap();
    let found = |anchor: &[u8]| {
        let mut places = area.chunks(16).enumerate();
        let (at, _) = places.find(|(_, chunk)| chunk.starts_with(anchor)).unwrap();
        16 * at
    };
    assert_eq!(found(b"RSD PTR "), 0);
    let anchor = &area[found(b"_SM3_")..][..24];
    assert_eq!(anchor.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b)), 0);
    let address = u64::from_le_bytes(anchor[16..].try_into().unwrap());
    let tables = &area[usize::try_from(address - 0xf_0000).unwrap()..][..blobs.tables.len()];
    assert_eq!(tables, blobs.tables);
    // The disk's slot, and no slots of the chipset.
    let has = |text: &[u8]| tables.windows(text.len()).any(|window| window == text);
    assert!(has(b"SN-0042") && has(b"PCI slot 4") && !has(b"PCI slot 1"));
    // More than the area holds.
    identity.oem_strings = vec!["x".repeat(1023); 64];
    let blobs = fixture
        .machine
        .smbios_blobs(memory, &identity, &processors, false);
    let error = fixture.machine.write_smbios(memory, &blobs).unwrap_err();
    assert!(error.to_string().contains("beyond 0x100000"), "{error}");
}

#[test]
fn any_access_to_the_board_is_survived() {
    let mut fixture = Fixture::new();
    let mut seed = 0x1234_5678_9abc_def1_u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for port in 0..=0xffff_u16 {
        for width in [1, 2, 4] {
            fixture.io.pio_write(port, width, random() as u32);
            fixture.io.pio_read(port, width);
        }
    }
    for _ in 0..20_000 {
        let address = ECAM_BASE + random() % (ECAM_LEN + 16);
        fixture
            .io
            .mmio_write(address & 0xe000_ffff, 1 << (random() % 4), random());
        fixture.io.mmio_read(address, 1 << (random() % 4));
    }
    assert!(
        fixture
            .machine
            .buses()
            .pio
            .claims()
            .windows(2)
            .all(|pair| pair[0].1 < pair[1].0)
    );
}

#[test]
fn a_hypervisor_may_have_the_clocks() {
    let vm = FakeVm::default();
    vm.seen.lock().unwrap().has_clocks = true;
    let mut fixture = Fixture::on(vm, Board::default());
    assert_eq!(fixture.io.pio_read(0x71, 1), 0xff, "the board has none");
    let error = fixture.machine.add_isa("com9", &com(0x70, 4), &still());
    let error = format!("{:#}", error.err().unwrap());
    assert!(error.contains("the CMOS clock"), "{error}");

    fixture.machine.reset();
    fixture.machine.restart_clocks().unwrap();
    let seen = fixture.vm.seen.lock().unwrap();
    // 640 KiB below 1 MiB, at each start.
    let [first, again] = &seen.clock_starts[..] else {
        panic!("{:?}", seen.clock_starts)
    };
    assert_eq!(first, again);
    assert_eq!(first.0, pm::PM_BASE + pm::PM_TIMER);
    assert!(first.1.contains(&(0x15, 0x80)) && first.1.contains(&(0x16, 0x02)));
}

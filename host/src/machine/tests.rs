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
    io: BusAccess,
}

impl Fixture {
    fn new() -> Self {
        Self::with(Board::default())
    }

    fn with(board: Board) -> Self {
        let vm = Arc::new(FakeVm::default());
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let sender: EventSender = Arc::new(move |event| sink.lock().unwrap().push(event));
        let machine = Machine::new(Arc::clone(&vm), vm.memory(), 2, board, sender).unwrap();
        let io = machine.exit_handler();
        Self {
            vm,
            machine,
            events,
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
    assert_eq!(fixture.io.pio_read(0xcfc, 4), 0x0b0b_0a0a);
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
        0xe0000
    );
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
    // A configuration address whose second byte is 6 is no reset.
    fixture.io.pio_write(0xcf8, 4, 0x8000_0600);
    fixture.io.pio_write(0x64, 1, 0xd1);
    assert_eq!(fixture.events(), []);
}

#[test]
fn a_reduced_board_turns_off_by_its_sleep_register_and_has_the_host_bridge_alone() {
    let mut fixture = Fixture::with(Board {
        legacy: false,
        pci: false,
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

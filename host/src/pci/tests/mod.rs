use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};

use super::fake_vm::FakeVm;
use super::*;
use crate::bus::{BusReader, Buses, Registers};
use crate::hypervisor::Space;

mod interrupts;
mod random;

/// Capability, offset, width, and the value if it was a write.
type LiveAccess = (u32, u32, u8, Option<u32>);

/// A device whose registers read as region, offset and width, and which counts its writes.
#[derive(Default)]
struct Probe {
    writes: AtomicU64,
    live: Mutex<Vec<LiveAccess>>,
}

impl Registers for Probe {
    fn read(&self, region: u32, offset: u64, _: u8) -> u64 {
        u64::from(region) << 16 | offset
    }
    fn write(&self, _: u32, _: u64, _: u8, _: u64) {
        self.writes.fetch_add(1, Ordering::SeqCst);
    }
}

impl LiveCapability for Probe {
    fn read(&self, cap: u32, offset: u32, width: u8) -> u32 {
        self.live.lock().unwrap().push((cap, offset, width, None));
        0x8877_6655 >> (8 * (offset % 4))
    }
    fn write(&self, cap: u32, offset: u32, width: u8, value: u32) {
        self.live
            .lock()
            .unwrap()
            .push((cap, offset, width, Some(value)));
    }
}

struct Board {
    vm: Arc<FakeVm>,
    buses: Arc<Buses>,
    root: Arc<Root<FakeVm>>,
    lines: Arc<IrqLines<FakeVm>>,
    probe: Arc<Probe>,
}

const APERTURES: Apertures = Apertures {
    io: Aperture {
        first: 0xc000,
        last: 0xffff,
    },
    mmio32: Aperture {
        first: 0xc000_0000,
        last: 0xdfff_ffff,
    },
    mmio64: Aperture {
        first: 0x1_0000_0000,
        last: 0x10_ffff_ffff,
    },
};

impl Board {
    fn new() -> Self {
        let vm = Arc::new(FakeVm::default());
        let buses = Arc::new(Buses::default());
        buses.mmio.reserve("guest RAM", 0, 0x8000_0000).unwrap();
        buses
            .mmio
            .reserve("the I/O APIC", 0xfec0_0000, 0x1000)
            .unwrap();
        let lines = IrqLines::new(Arc::clone(&vm));
        for (link, gsi) in LINK_GSI.into_iter().enumerate() {
            lines.route(link, Some(gsi));
        }
        let root = Root::new(Arc::clone(&vm), Arc::clone(&buses), Arc::clone(&lines));
        let reset: Arc<dyn Registers> = Arc::new(Probe::default());
        let ports = Arc::new(ConfigPorts::new(Arc::clone(&root), reset));
        buses
            .pio
            .insert(
                &Arc::from("config"),
                u64::from(CONFIG_PORTS),
                u64::from(CONFIG_PORTS_LEN),
                0,
                ports,
            )
            .unwrap();
        let ecam = Arc::new(Ecam::new(Arc::clone(&root)));
        buses
            .mmio
            .insert(&Arc::from("ecam"), 0xe000_0000, 0x1000_0000, 0, ecam)
            .unwrap();
        Self {
            vm,
            buses,
            root,
            lines,
            probe: Arc::default(),
        }
    }

    fn add(&self, name: &str, bdf: &str, desc: &PciFunctionDesc) -> Arc<Function<FakeVm>> {
        self.try_add(name, bdf, desc).unwrap()
    }

    fn try_add(
        &self,
        name: &str,
        bdf: &str,
        desc: &PciFunctionDesc,
    ) -> anyhow::Result<Arc<Function<FakeVm>>> {
        let target = Target {
            registers: self.probe.clone(),
            live: Some(self.probe.clone()),
            board: None,
        };
        self.root
            .add(&Arc::from(name), bdf.parse().unwrap(), desc, &[], target)
    }

    fn mmio(&self) -> BusReader {
        self.buses.mmio.reader()
    }

    fn write(&self, device: u32, register: u16, width: u8, value: u32) {
        self.root
            .config_write(0, device << 3, register, width, value);
    }

    fn read(&self, device: u32, register: u16, width: u8) -> u32 {
        self.root.config_read(0, device << 3, register, width)
    }
}

fn desc() -> PciFunctionDesc {
    let bar = |index, kind, size, region| BarDesc {
        index,
        kind,
        size,
        region,
        prefetch: false,
    };
    PciFunctionDesc {
        vendor: 0x1af4,
        device: 0x1042,
        class: 0x01_80_00,
        intx: true,
        msix_vectors: 70,
        msix_bar: 1,
        bars: vec![
            bar(0, BarKind::Io, 0x40, 10),
            bar(2, BarKind::Mmio64, 0x4000, 12),
            bar(4, BarKind::Mmio32, 0x1000, 14),
        ],
        caps: vec![
            CapDesc {
                id: 9,
                body: vec![7; 14],
                live: false,
            },
            CapDesc {
                id: 9,
                body: vec![0; 18],
                live: true,
            },
        ],
        ..PciFunctionDesc::default()
    }
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

const COMMAND: u16 = 4;
const BAR2: u16 = 0x18;
const BAR4: u16 = 0x20;
const MSIX: u16 = 0x40;

#[test]
fn both_config_mechanisms_reach_the_same_function() {
    let board = Board::new();
    board.add("dev.a", "0.4.0", &desc());
    let mut pio = board.buses.pio.reader();
    pio.write(0xcf8, 4, 0x8000_2000);
    assert_eq!(pio.read(0xcf8, 4), 0x8000_2000);
    assert_eq!(pio.read(0xcfc, 4), 0x1042_1af4);
    assert_eq!(pio.read(0xcfe, 2), 0x1042);
    assert_eq!(pio.read(0xcff, 1), 0x10);
    let mut mmio = board.mmio();
    let base = 0xe000_0000 + (4 << 15);
    assert_eq!(mmio.read(base, 4), 0x1042_1af4);
    assert_eq!(mmio.read(base + 2, 2), 0x1042);
    assert_eq!(mmio.read(base, 8), 0x0010_0000_1042_1af4);
    pio.write(0xcf8, 4, 0x8000_203c);
    pio.write(0xcfc, 1, 0x55);
    assert_eq!(mmio.read(base + 0x3c, 2), 0x0155);
    // Beyond conventional space, other buses, absent functions, and with the enable bit clear: ones.
    assert_eq!(mmio.read(base + 0x100, 4), 0xffff_ffff);
    assert_eq!(mmio.read(base + (1 << 20), 4), 0xffff_ffff);
    assert_eq!(mmio.read(base + 0x1000, 2), 0xffff);
    pio.write(0xcf8, 4, 0x0000_2000);
    assert_eq!(pio.read(0xcfc, 4), 0xffff_ffff);
    // Narrow accesses don't touch the address register.
    pio.write(0xcf8, 2, 0x1234);
    assert_eq!(pio.read(0xcf8, 4), 0x0000_2000);
}

#[test]
fn a_taken_slot_is_refused_with_both_names() {
    let board = Board::new();
    board.add("dev.a", "0.4.0", &desc());
    let error = format!(
        "{:#}",
        board.try_add("dev.b", "0.4.0", &desc()).err().unwrap()
    );
    assert!(
        error.contains("dev.b") && error.contains("dev.a") && error.contains("0.4.0"),
        "{error}"
    );
    let error = format!(
        "{:#}",
        board
            .try_add("dev.c", "0.5.0", &PciFunctionDesc::default())
            .err()
            .unwrap()
    );
    assert!(
        error.contains("dev.c at PCI slot 0.5.0: vendor id"),
        "{error}"
    );
}

#[test]
fn the_multi_function_bit_follows_the_neighbours() {
    let board = Board::new();
    board.add("dev.a", "0.4.0", &desc());
    assert_eq!(board.read(4, 0xe, 1), 0);
    board.add("dev.b", "0.4.3", &desc());
    assert_eq!(board.read(4, 0xe, 1), 0x80);
    assert_eq!(board.root.config_read(0, 4 << 3 | 3, 0x3d, 1), 4);
}

#[test]
fn assigned_bars_decode_without_overlap() {
    let board = Board::new();
    for device in 2..32 {
        board.add(&format!("dev.{device}"), &format!("0.{device}.0"), &desc());
    }
    board
        .root
        .assign_resources(&APERTURES, &board.buses)
        .unwrap();
    let mut seen = 0;
    for function in board.root.functions() {
        for region in [10, 12, 14] {
            let (address, size) = function.placed(region).unwrap();
            assert_eq!(address % size, 0);
            let bus = if region == 10 {
                &board.buses.pio
            } else {
                &board.buses.mmio
            };
            assert_eq!(
                bus.reader().read(address + 4, 4),
                u64::from(region) << 16 | 4
            );
            seen += 1;
        }
    }
    assert_eq!(seen, 90);
    assert_eq!(board.read(4, COMMAND, 2), 3);
    assert_eq!(board.read(4, 0x3c, 1), intx_gsi(4, 1));
    let tables = board
        .buses
        .mmio
        .claims()
        .iter()
        .filter(|(.., owner)| owner.ends_with("MSI-X table"))
        .count();
    assert_eq!(tables, 30);
}

#[test]
fn a_full_aperture_names_device_and_bar() {
    let board = Board::new();
    let bar = BarDesc {
        index: 3,
        kind: BarKind::Mmio32,
        size: 256 << 20,
        region: 0,
        prefetch: false,
    };
    let desc = PciFunctionDesc {
        bars: vec![bar],
        msix_vectors: 0,
        ..desc()
    };
    for device in 2..5 {
        board.add(&format!("dev.{device}"), &format!("0.{device}.0"), &desc);
    }
    let error = board
        .root
        .assign_resources(&APERTURES, &board.buses)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("dev.4 at PCI slot 0.4.0: no room for BAR 3"),
        "{error}"
    );
}

#[test]
fn a_moved_bar_takes_its_doorbells_along() {
    let board = Board::new();
    let function = board.add("dev.a", "0.4.0", &desc());
    let (one, two) = (bell(), bell());
    // Bound before the BAR is anywhere, and after.
    function
        .doorbell(12, 0x3000, 2, Some(1), one.as_fd())
        .unwrap();
    assert_eq!(board.vm.doorbells(), []);
    board
        .root
        .assign_resources(&APERTURES, &board.buses)
        .unwrap();
    // Not before a driver lets the device work.
    assert_eq!(board.vm.doorbells(), []);
    board.write(4, COMMAND, 2, 7);
    assert!(function.doorbell(12, 0x3004, 0, None, two.as_fd()).unwrap());
    let (at, _) = function.placed(12).unwrap();
    assert_eq!(
        board.vm.doorbells(),
        [
            (Space::Mmio, at + 0x3000, 2, Some(1)),
            (Space::Mmio, at + 0x3004, 0, None)
        ]
    );
    board.write(4, BAR2, 4, 0xd000_0000);
    assert_eq!(function.placed(12), Some((0xd000_0000, 0x4000)));
    assert_eq!(board.vm.doorbells()[1], (Space::Mmio, 0xd000_3004, 0, None));
    assert_eq!(board.mmio().read(at, 4), 0xffff_ffff);
    assert_eq!(board.mmio().read(0xd000_0010, 4), 12 << 16 | 0x10);
    // Above 4 GiB, by its upper half.
    board.write(4, BAR2 + 4, 4, 5);
    assert_eq!(function.placed(12), Some((0x5_d000_0000, 0x4000)));
    // Decoding off: gone, and back where it was.
    board.write(4, COMMAND, 2, 5);
    assert_eq!((board.vm.doorbells().len(), function.placed(12)), (0, None));
    assert!(function.placed(10).is_some());
    board.write(4, COMMAND, 2, 6);
    assert_eq!(board.vm.doorbells().len(), 2);
    assert_eq!(function.placed(10), None);
    board.root.reset();
    assert_eq!((board.vm.doorbells().len(), function.placed(12)), (0, None));
    board
        .root
        .assign_resources(&APERTURES, &board.buses)
        .unwrap();
    assert_eq!(board.vm.doorbells(), []);
    board.write(4, COMMAND, 2, 7);
    assert_eq!(board.vm.doorbells().len(), 2);
}

#[test]
fn an_ended_doorbell_reaches_the_device_again() {
    let board = Board::new();
    let function = board.add("dev.a", "0.4.0", &desc());
    board
        .root
        .assign_resources(&APERTURES, &board.buses)
        .unwrap();
    let (one, two) = (bell(), bell());
    // One before the hypervisor has it, one after.
    for armed in [false, true] {
        function.doorbell(12, 0x3000, 0, None, one.as_fd()).unwrap();
        function.doorbell(12, 0x3008, 0, None, two.as_fd()).unwrap();
        if armed {
            board.write(4, COMMAND, 2, 7);
            assert_eq!(board.vm.doorbells().len(), 2);
        }
        function.end_doorbell(12, 0x3000, 0, None).unwrap();
        assert_eq!(board.vm.doorbells().len(), usize::from(armed));
        function.end_doorbell(12, 0x3008, 0, None).unwrap();
        assert_eq!(board.vm.doorbells(), []);
    }
    for (region, offset, part) in [(12, 0x3000, "no doorbell is bound"), (99, 0, "no BAR")] {
        let error = function.end_doorbell(region, offset, 0, None).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(part) && error.contains("dev.a"), "{error}");
    }
}

#[test]
fn bad_doorbells_are_refused() {
    let board = Board::new();
    let function = board.add("dev.a", "0.4.0", &desc());
    board
        .root
        .assign_resources(&APERTURES, &board.buses)
        .unwrap();
    let fd = bell();
    for (region, offset, width, part) in [
        (99, 0, 4, "no BAR"),
        (12, 0x4000, 1, "outside"),
        (12, 0x3ffe, 4, "outside"),
        (12, u64::MAX, 4, "outside"),
        (12, 0, 3, "can't be 3 bytes"),
    ] {
        let error = format!(
            "{:#}",
            function
                .doorbell(region, offset, width, None, fd.as_fd())
                .unwrap_err()
        );
        assert!(error.contains(part) && error.contains("dev.a"), "{error}");
    }
    function.doorbell(12, 0, 4, None, fd.as_fd()).unwrap();
    assert!(
        function
            .doorbell(12, 0, 4, None, fd.as_fd())
            .unwrap_err()
            .to_string()
            .contains("bound already")
    );
}

#[test]
fn without_doorbells_the_write_reaches_the_device() {
    let board = Board::new();
    board.vm.seen.lock().unwrap().without_doorbells = true;
    let function = board.add("dev.a", "0.4.0", &desc());
    board
        .root
        .assign_resources(&APERTURES, &board.buses)
        .unwrap();
    board.write(4, COMMAND, 2, 7);
    assert!(
        !function
            .doorbell(12, 0x3000, 2, None, bell().as_fd())
            .unwrap()
    );
    board
        .mmio()
        .write(function.placed(12).unwrap().0 + 0x3000, 2, 1);
    assert_eq!(board.probe.writes.load(Ordering::SeqCst), 1);
    // Decoding off and on again must not try to unbind what never was.
    board.write(4, COMMAND, 2, 0);
    board.write(4, COMMAND, 2, 7);
    assert!(function.placed(12).is_some());
}

#[test]
fn a_bar_on_top_of_another_owner_waits_for_its_place() {
    let board = Board::new();
    let (a, b) = (
        board.add("dev.a", "0.4.0", &desc()),
        board.add("dev.b", "0.5.0", &desc()),
    );
    board
        .root
        .assign_resources(&APERTURES, &board.buses)
        .unwrap();
    let (held, _) = a.placed(14).unwrap();
    let claims = board.buses.mmio.claims();
    // Over RAM, over the I/O APIC, over ECAM: not decoded, nobody disturbed.
    for taken in [0x1000, 0xfec0_0000, 0xe000_0000] {
        board.write(5, BAR4, 4, taken);
        assert_eq!(b.placed(14), None, "{taken:#x}");
    }
    board.write(5, BAR4, 4, held as u32);
    assert_eq!(b.placed(14), None);
    assert_eq!(a.placed(14), Some((held, 0x1000)));
    assert_eq!(board.buses.mmio.claims().len(), claims.len() - 1);
    // The holder leaves: the waiting one gets the place.
    board.write(4, BAR4, 4, 0xdf00_0000);
    assert_eq!(a.placed(14), Some((0xdf00_0000, 0x1000)));
    assert_eq!(b.placed(14), Some((held, 0x1000)));
    // The sizing pattern with decoding on is only another place.
    board.write(5, BAR4, 4, 0xffff_ffff);
    assert_eq!(board.read(5, BAR4, 4), 0xffff_f000);
    assert_eq!(b.placed(14), Some((0xffff_f000, 0x1000)));
    board.write(5, BAR4, 4, held as u32);
    assert_eq!(b.placed(14), Some((held, 0x1000)));
}

#[test]
fn live_capabilities_reach_the_device_and_others_are_read_only() {
    let board = Board::new();
    board.add("dev.a", "0.4.0", &desc());
    // MSI-X at 0x40 (12 bytes), then 0x4c (16), then the live one at 0x5c.
    assert_eq!(board.read(4, 0x4c, 4), 0x0707_5c09);
    board.write(4, 0x50, 4, 0);
    assert_eq!(board.read(4, 0x50, 4), 0x0707_0707);
    board.write(4, 0x60, 4, 0x1122_3344);
    board.write(4, 0x5c, 4, 0xaabb_ccdd);
    assert_eq!(board.read(4, 0x5c, 4), 0x6655_0009);
    assert_eq!(board.read(4, 0x63, 1), 0x66);
    assert_eq!(
        *board.probe.live.lock().unwrap(),
        [
            (1, 2, 4, Some(0x1122_3344)),
            (1, 0, 2, Some(0xaabb)),
            (1, 0, 2, None),
            (1, 5, 1, None)
        ]
    );
}

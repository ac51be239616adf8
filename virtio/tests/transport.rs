//! The PCI transport as drivers of both kinds see it, with a device that echoes what it is given.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use vmm_plugin_api::testing::{Buffer, FakeDevice, FakeHost, VirtioDriver};
use vmm_plugin_api::{Chain, Host, Options, Queue, QueueError, Result};
use vmm_virtio::{
    F_ANY_LAYOUT, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Pci, QueueWorker, VirtioDevice,
};

/// A device type of its own, with two queues.
struct Echo;

struct Worker(Chain);

const FEATURE: u64 = 1 << 3;
const WAIT: Duration = Duration::from_secs(20);

impl VirtioDevice for Echo {
    const TYPE: u16 = 63;
    const TRANSITIONAL_ID: u16 = 0x103f;
    const CLASS: u32 = 0xff_00_00;
    const NAME: &'static str = "echo";
    type Worker = Worker;

    fn create(_options: &Options<'_>, _host: &Host) -> Result<Self> {
        Ok(Self)
    }
    fn modern_only(&self) -> bool {
        false
    }
    fn features(&self) -> u64 {
        FEATURE
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 8]
    }
    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4, 5, 6]
    }
    fn worker(&self, _index: u16) -> Result<Worker> {
        Ok(Worker(Chain::default()))
    }
}

impl QueueWorker for Worker {
    fn activate(&mut self, _features: u64) {}

    fn take(&mut self, queue: &mut Queue) -> Result<(), QueueError> {
        while queue.pop(&mut self.0)? {
            let mut bytes = [0; 64];
            let len = self
                .0
                .readable()
                .first()
                .map_or(0, |s| s.read(0, &mut bytes));
            assert_ne!(&bytes[..len], b"panic", "the driver says so");
            let written = self
                .0
                .writable()
                .first()
                .map_or(0, |s| s.write(0, &bytes[..len]));
            queue.push(self.0.head(), written as u32);
        }
        Ok(())
    }
    fn complete(&mut self, _queue: Option<&mut Queue>) {}
    fn in_flight(&self) -> usize {
        0
    }
    fn has_room(&self) -> bool {
        true
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn acknowledge(&self) {}
}

vmm_plugin_api::plugin! {
    manifest: "echo.toml",
    devices: { "pci-virtio-echo" => Pci<Echo> },
    blocks: {},
    chars: {},
}

fn echo() -> (FakeHost, FakeDevice) {
    let host = FakeHost::new(1 << 20);
    let device = host.device(&VMM_PLUGIN, "pci-virtio-echo", &[]).unwrap();
    device.start().unwrap();
    (host, device)
}

/// Sends `text` through queue `index` and returns what comes back.
fn say(driver: &mut VirtioDriver<'_>, device: &FakeDevice, index: u16, text: &[u8]) -> Vec<u8> {
    let mut queue = driver.queue(index, 8, index).unwrap();
    if driver.status() & 4 == 0 {
        driver.ready().unwrap();
    }
    let out = driver.allocate(64, 1);
    let back = driver.allocate(64, 1);
    driver.memory().write(out, text).unwrap();
    queue.add(&[
        Buffer::readable(out, text.len() as u32),
        Buffer::writable(back, 64),
    ]);
    queue.kick(device);
    let (_, written) = queue.wait(WAIT).expect("an echo");
    let mut bytes = vec![0; written as usize];
    driver.memory().read(back, &mut bytes).unwrap();
    bytes
}

#[test]
fn both_layouts_reach_both_queues() {
    let (host, device) = echo();
    let mut modern = VirtioDriver::modern(&host, &device).unwrap();
    let ring = F_EVENT_IDX | F_INDIRECT_DESC;
    assert_eq!(modern.offered(), FEATURE | ring | F_VERSION_1);
    assert_eq!(modern.negotiate(FEATURE).unwrap(), FEATURE | F_VERSION_1);
    assert_eq!(
        (
            modern.queue_max(0),
            modern.queue_max(1),
            modern.queue_max(2)
        ),
        (16, 8, 0)
    );
    assert_eq!(say(&mut modern, &device, 1, b"one"), b"one");
    assert_eq!(
        say(&mut modern, &device, 0, b"two"),
        b"two",
        "enabled after DRIVER_OK"
    );
    let mut legacy = VirtioDriver::legacy(&host, &device).unwrap();
    assert_eq!(legacy.offered(), FEATURE | ring | F_ANY_LAYOUT);
    legacy.negotiate(0).unwrap();
    assert_eq!(say(&mut legacy, &device, 0, b"three"), b"three");
    assert_eq!(say(&mut legacy, &device, 1, b"four"), b"four");
}

#[test]
fn a_legacy_driver_may_use_a_queue_before_driver_ok() {
    let (host, device) = echo();
    let mut driver = VirtioDriver::legacy(&host, &device).unwrap();
    driver.negotiate(0).unwrap();
    let mut queue = driver.queue(0, 0, 0).unwrap();
    let at = driver.allocate(8, 1);
    queue.add(&[Buffer::readable(at, 4), Buffer::writable(at + 4, 4)]);
    queue.notify(&device);
    assert!(queue.wait(WAIT).is_some());
    assert_eq!(driver.status(), 3);
    // The queue's address reads back until it is taken away.
    assert_eq!(device.read(0, 8, 4), queue.descriptors / 4096);
    device.write(0, 8, 4, 0);
    assert_eq!(device.read(0, 8, 4), 0);
    queue.add(&[Buffer::readable(at, 4), Buffer::writable(at + 4, 4)]);
    queue.notify(&device);
    assert!(queue.wait(Duration::from_millis(20)).is_none());
}

#[test]
fn identity_and_capabilities() {
    let (_host, device) = echo();
    let pci = device.pci().unwrap();
    assert_eq!(
        (pci.vendor, pci.device, pci.subsystem_vendor, pci.subsystem),
        (0x1af4, 0x103f, 0x1af4, 63)
    );
    assert_eq!(
        (pci.revision, pci.msix_vectors, pci.msix_bar, pci.intx),
        (0, 3, 1, 1)
    );
    let caps = device.capabilities();
    let kinds: Vec<_> = caps
        .iter()
        .map(|(id, body)| (*id, body[0], body[1]))
        .collect();
    assert_eq!(
        kinds,
        [
            (9, 20, 5),
            (9, 20, 2),
            (9, 16, 1),
            (9, 20, 2),
            (9, 16, 3),
            (9, 16, 4)
        ]
    );
    let sizes: Vec<_> = device
        .regions()
        .iter()
        .map(|r| (r.id, r.bar, r.size))
        .collect();
    assert_eq!(sizes, [(2, 2, 0x4000), (0, 0, 0x200)]);
}

#[test]
fn registers_are_reached_through_configuration_space_alone() {
    let (host, device) = echo();
    // Body offsets of VIRTIO_PCI_CAP_PCI_CFG: bar 2, offset 6, length 10, data 14.
    let aim = |offset: u32, length: u32| {
        device.write_capability(0, 2, 1, 2);
        device.write_capability(0, 6, 4, offset);
        device.write_capability(0, 10, 4, length);
    };
    aim(0x1000, 4);
    assert_eq!(
        device.read_capability(0, 14, 4),
        0x0403_0201,
        "device configuration"
    );
    aim(20, 1);
    device.write_capability(0, 14, 1, 1);
    assert_eq!(device.read_capability(0, 14, 1), 1, "device status");
    aim(18, 2);
    assert_eq!(device.read_capability(0, 14, 2), 2, "number of queues");
    for (offset, length) in [
        (0x3fff, 4),
        (0xffff_fffc, 4),
        (1, 2),
        (0, 3),
        (0, 0),
        (0x4000, 1),
    ] {
        aim(offset, length);
        device.write_capability(0, 14, 4, 0x5555_5555);
        // No register is behind it, so the data is what was written.
        assert_eq!(device.read_capability(0, 14, 4), 0x5555_5555);
    }
    aim(0x1000, 4);
    device.write_capability(0, 2, 1, 1);
    assert_eq!(
        device.read_capability(0, 14, 4),
        0x5555_5555,
        "BAR 1 is the host's"
    );
    for (offset, length) in [(16, 4), (14, 2), (18, 1), (0, 4)] {
        aim(offset, length);
        device.write_capability(0, 2, 1, 0);
        device.write_capability(0, 14, 4, 0x5555_5555);
        assert_eq!(
            device.read_capability(0, 14, 4),
            0x5555_5555,
            "of BAR 0, only the notification register"
        );
    }
    device.write_capability(0, 0, 2, 0xffff);
    assert_eq!(
        device.read_capability(0, 0, 2),
        0x0514,
        "length and type stay"
    );
    assert_eq!(
        device.read_capability(2, 0, 4),
        u32::MAX,
        "not a live capability"
    );
    assert_eq!(VirtioDriver::modern(&host, &device).unwrap().status(), 3);
    assert_eq!(host.faults(), Vec::<String>::new());
}

/// Each place of a notification works: the port, where the modern driver of these tests finds it first, the memory behind it, and
/// the window.
#[test]
fn a_queue_is_notified_by_port_by_memory_and_by_window() {
    let (host, device) = echo();
    let mut driver = VirtioDriver::modern(&host, &device).unwrap();
    driver.negotiate(0).unwrap();
    let mut queue = driver.queue(1, 8, 1).unwrap();
    driver.ready().unwrap();
    let at = driver.allocate(8, 1);
    let window = || {
        device.write_capability(0, 2, 1, 0);
        device.write_capability(0, 6, 4, 16);
        device.write_capability(0, 10, 4, 2);
        device.write_capability(0, 14, 2, 1);
    };
    for way in ["port", "memory", "window"] {
        queue.add(&[Buffer::readable(at, 4), Buffer::writable(at + 4, 4)]);
        match way {
            "port" => device.write(0, 16, 2, 1),
            "memory" => device.write(2, 0x2004, 2, 1),
            _ => window(),
        }
        assert!(queue.wait(WAIT).is_some(), "{way}");
    }
}

#[test]
fn features_that_were_not_offered_and_old_drivers_are_refused() {
    let (host, device) = echo();
    let mut driver = VirtioDriver::modern(&host, &device).unwrap();
    assert!(driver.accept(F_VERSION_1 | 1 << 40).is_err());
    let mut driver = VirtioDriver::modern(&host, &device).unwrap();
    assert!(
        driver.accept(FEATURE).is_err(),
        "a modern driver takes VERSION_1"
    );
    assert!(driver.ready().is_err(), "and is not ready without features");
    let mut driver = VirtioDriver::modern(&host, &device).unwrap();
    driver.negotiate(FEATURE).unwrap();
    device.write(2, 8, 4, 0);
    device.write(2, 12, 4, 0);
    assert_eq!(device.read(2, 12, 4), FEATURE, "fixed once agreed");
}

#[test]
fn queue_set_up_is_checked_when_the_driver_is_ready() {
    for (offset, width, value) in [
        (24, 2, 3),
        (24, 2, 32),
        (24, 2, 0),
        (32, 8, 1 << 50),
        (48, 4, 2),
    ] {
        let (host, device) = echo();
        let mut driver = VirtioDriver::modern(&host, &device).unwrap();
        driver.negotiate(0).unwrap();
        assert_eq!(driver.config_vector(2), 2);
        device.write(2, 22, 2, 0);
        device.write(2, 32, 8, 0x1000);
        device.write(2, 40, 8, 0x2000);
        device.write(2, 48, 8, 0x3000);
        device.write(2, offset, width, value);
        device.write(2, 28, 2, 1);
        assert_eq!(driver.status() & 0x40, 0);
        driver.ready().unwrap();
        assert_eq!(driver.status() & 0x44, 0x44, "{value:#x} at {offset}");
        assert_eq!(device.interrupts(2), 1);
        driver.reset(WAIT).unwrap();
        assert_eq!(host.logs().len(), 1);
    }
}

#[test]
fn set_up_is_fixed_once_a_queue_is_enabled_and_forgotten_by_reset() {
    let (host, device) = echo();
    let mut driver = VirtioDriver::modern(&host, &device).unwrap();
    driver.negotiate(0).unwrap();
    let queue = driver.queue(0, 4, 1).unwrap();
    device.write(2, 24, 2, 16);
    device.write(2, 32, 8, 0);
    assert_eq!((device.read(2, 24, 2), device.read(2, 28, 2)), (4, 1));
    assert_eq!(
        device.read(2, 32, 4) | device.read(2, 36, 4) << 32,
        queue.descriptors
    );
    assert_eq!(device.read(2, 26, 2), 1);
    driver.reset(WAIT).unwrap();
    assert_eq!(driver.queue_max(0), 16);
    assert_eq!(
        (
            device.read(2, 26, 2),
            device.read(2, 28, 2),
            device.read(2, 32, 8)
        ),
        (0xffff, 0, 0)
    );
    assert_eq!(device.read(2, 16, 2), 0xffff);
}

#[test]
fn vectors_that_do_not_exist_read_back_as_none() {
    let (host, device) = echo();
    let driver = VirtioDriver::modern(&host, &device).unwrap();
    assert_eq!(
        (driver.config_vector(2), driver.config_vector(3)),
        (2, 0xffff)
    );
    for (vector, expected) in [(0, 0), (2, 2), (3, 0xffff), (0xffff, 0xffff)] {
        device.write(2, 22, 2, 0);
        device.write(2, 26, 2, vector);
        assert_eq!(device.read(2, 26, 2), expected);
        device.write(0, 14, 2, 1);
        device.write(0, 22, 2, vector);
        assert_eq!(device.read(0, 22, 2), expected);
    }
    // Without MSI-X these are the first bytes of the device configuration.
    device.enable_msix(false);
    assert_eq!(device.read(0, 20, 4), 0x0403_0201);
}

#[test]
fn a_panic_in_the_queue_thread_is_a_fault_and_stop_does_not_hang() {
    let (host, device) = echo();
    let mut driver = VirtioDriver::modern(&host, &device).unwrap();
    driver.negotiate(0).unwrap();
    let mut queue = driver.queue(0, 8, 0).unwrap();
    driver.ready().unwrap();
    let at = driver.allocate(8, 1);
    driver.memory().write(at, b"panic").unwrap();
    queue.add(&[Buffer::readable(at, 5)]);
    queue.kick(&device);
    let end = Instant::now() + WAIT;
    while host.faults().is_empty() {
        assert!(Instant::now() < end, "a fault is reported");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(
        host.faults()[0].contains("the driver says so"),
        "{:?}",
        host.faults()
    );
    assert_eq!(device.read(2, 20, 1), 0xff, "the device is gone");
    let _ = device.pause();
    drop(queue);
}

/// Requests that come one by one are tried now and then, and that ends with the next one.
#[test]
fn a_queue_lets_lone_requests_gather_for_one_turn_only() {
    let (host, device) = echo();
    let mut driver = VirtioDriver::modern(&host, &device).unwrap();
    driver.negotiate(0).unwrap();
    let mut queue = driver.queue(0, 8, 0).unwrap();
    driver.ready().unwrap();
    let at = driver.allocate(8, 1);
    let mut request = || {
        queue.add(&[Buffer::readable(at, 4), Buffer::writable(at + 4, 4)]);
        queue.kick(&device);
        assert!(queue.wait(WAIT).is_some());
    };
    // The thread decides after it has answered.
    let becomes = |gathers, limit| {
        let start = Instant::now();
        while device.gathers() != gathers && start.elapsed() < limit {
            std::thread::yield_now();
        }
        device.gathers() == gathers
    };
    let trial = (1..2000).find(|_| {
        request();
        becomes(true, Duration::from_millis(2))
    });
    assert!(trial.unwrap() >= 16, "{trial:?}");
    request();
    assert!(becomes(false, WAIT));
}

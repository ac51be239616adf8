//! A driver for virtio block disks (virtio 1.2 section 5.2), and the modes that only need one disk.

use crate::interrupts::QUEUE;
use crate::io::{read8, write8, write16, write32, write64};
use crate::memory::{self, Dma};
use crate::pci::{self, Function};
use crate::virtio::{self, Device};
use crate::virtqueue::{Buffer, Queue};
use crate::{check, clock, interrupts, println};

/// Feature bits (5.2.3).
pub const F_READ_ONLY: u64 = 1 << 5;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_QUEUES: u64 = 1 << 12;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// Request types (5.2.6).
pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

/// Values of the status byte.
pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPPORTED: u8 = 2;
/// What the status byte holds until the device writes it.
pub const UNTOUCHED: u8 = 0xee;

/// A request is given up after this many milliseconds.
pub const PATIENCE: u64 = 10_000;

/// A disk in operation.
pub struct Disk {
    /// Its transport.
    pub device: Device,
    /// The queues in use.
    pub queues: [Option<Queue>; 4],
    doorbells: [u64; 4],
    /// The agreed features.
    pub features: u64,
    /// Header at 0, status at 16, one cache line for each outstanding request.
    headers: Dma,
    /// 512-byte sectors.
    pub sectors: u64,
}

impl Disk {
    /// Brings a device into operation with what it offers of the wanted features, on MSI-X.
    pub fn start(device: Device, wanted: u64, size: u16) -> Result<Self, &'static str> {
        Disk::start_on(device, wanted, size, true)
    }

    fn start_on(
        device: Device,
        wanted: u64,
        size: u16,
        vectors: bool,
    ) -> Result<Self, &'static str> {
        let offered = device.features();
        let features = offered & (wanted | virtio::F_VERSION_1);
        if !device.negotiate(features) {
            return Err("FEATURES_OK does not stay set");
        }
        let count = if features & F_QUEUES != 0 {
            device.config16(34).min(4)
        } else {
            1
        };
        if device.queues() < count {
            return Err("the transport has fewer queues than the configuration says");
        }
        if vectors {
            device.route_interrupts(count);
            if !device.set_config_entry(0) {
                return Err("the configuration interrupt can't be assigned");
            }
        } else {
            device.msix.control(false, false);
        }
        let mut queues = [const { None }; 4];
        let mut doorbells = [0; 4];
        for index in 0..count {
            let queue = Queue::new(
                size.min(device.queue_size(index)),
                features & virtio::F_EVENT_INDEX != 0,
            );
            let entry = vectors.then_some(index + 1);
            if !device.enable_queue(index, &queue, entry) {
                return Err("a queue's registers don't keep their values");
            }
            doorbells[usize::from(index)] = device.doorbell(index);
            queues[usize::from(index)] = Some(queue);
        }
        device.set_status(
            virtio::ACKNOWLEDGE | virtio::DRIVER | virtio::FEATURES_OK | virtio::DRIVER_OK,
        );
        let sectors = u64::from(device.config32(0)) | u64::from(device.config32(4)) << 32;
        Ok(Disk {
            device,
            queues,
            doorbells,
            features,
            headers: memory::dma(64 * 256),
            sectors,
        })
    }

    /// Starts over with other features or another queue size.
    pub fn restart(self, wanted: u64, size: u16) -> Result<Self, &'static str> {
        Disk::start(self.device, wanted, size)
    }

    /// Starts over with the interrupt line in place of MSI-X.
    pub fn restart_on_line(self) -> Result<Self, &'static str> {
        Disk::start_on(self.device, F_FLUSH, 16, false)
    }

    pub fn queue(&mut self, index: usize) -> &mut Queue {
        match &mut self.queues[index] {
            Some(queue) => queue,
            None => unreachable!("queue {index} was not set up"),
        }
    }

    pub fn header(&self, slot: u64, kind: u32, sector: u64) -> (Buffer, Buffer) {
        let at = self.headers.address() + slot * 64;
        write32(at, kind);
        write32(at + 4, 0);
        write64(at + 8, sector);
        write8(at + 16, UNTOUCHED);
        (Buffer::out(at, 16), Buffer::into(at + 16, 1))
    }

    pub fn status_of(&self, slot: u64) -> u8 {
        read8(self.headers.address() + slot * 64 + 16)
    }

    /// Offers a request without waiting or notifying.
    pub fn submit(
        &mut self,
        queue: usize,
        slot: u64,
        kind: u32,
        sector: u64,
        data: &[Buffer],
    ) -> u16 {
        let (head, status) = self.header(slot, kind, sector);
        let mut buffers = [head; 18];
        buffers[1..=data.len()].copy_from_slice(data);
        buffers[data.len() + 1] = status;
        self.queue(queue).add(&buffers[..data.len() + 2])
    }

    pub fn notify(&self, queue: usize) {
        write16(self.doorbells[queue], queue as u16);
    }

    /// Waits for the interrupt of one returned request and takes it; the head and length.
    pub fn wait(&mut self, queue: usize, interrupts_before: u32) -> Option<(u32, u32)> {
        if !interrupts::wait(QUEUE + queue as u8, interrupts_before, PATIENCE) {
            return None;
        }
        // It may be the late one of a request that was taken without waiting for it.
        let returned = self.queue(queue);
        clock::wait_until(PATIENCE, || returned.has_used());
        returned.take_used()
    }

    /// One request on one queue, interrupt included; its status byte, or None when it is not returned.
    pub fn request_on(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        data: &[Buffer],
    ) -> Option<u8> {
        let before = interrupts::count(QUEUE + queue as u8);
        let head = self.submit(queue, 0, kind, sector, data);
        self.notify(queue);
        let (id, _) = self.wait(queue, before)?;
        (id == u32::from(head)).then(|| self.status_of(0))
    }

    /// The same on the first queue.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> Option<u8> {
        self.request_on(0, kind, sector, data)
    }

    /// Reads sectors into memory.
    pub fn read(&mut self, sector: u64, memory: Dma, bytes: u32) -> bool {
        self.request(IN, sector, &[Buffer::into(memory.address(), bytes)]) == Some(OK)
    }

    /// Writes memory to sectors.
    pub fn write(&mut self, sector: u64, memory: Dma, bytes: u32) -> bool {
        self.request(OUT, sector, &[Buffer::out(memory.address(), bytes)]) == Some(OK)
    }

    /// Makes what was written durable.
    pub fn flush(&mut self) -> bool {
        self.features & F_FLUSH == 0 || self.request(FLUSH, 0, &[]) == Some(OK)
    }
}

/// Calls `each` with every virtio block function.
pub fn functions(mut each: impl FnMut(Function)) {
    pci::functions(|it| {
        if matches!(it.identity(), (0x1af4, 0x1001 | 0x1042)) {
            each(it);
        }
    });
}

/// Brings the first disk that may be written into operation, for the modes that need one.
pub fn first_writable() -> Option<Disk> {
    let mut found = None;
    functions(|it| {
        if found.is_none() {
            it.enable();
            let disk =
                Device::find(it).and_then(|device| Disk::start(device, F_FLUSH | F_READ_ONLY, 64));
            found = disk.ok().filter(|disk| disk.features & F_READ_ONLY == 0);
        }
    });
    found
}

/// Writes one numbered sector after the other and says each number once a flush has made it
/// durable, for the test that kills the host meanwhile.
pub fn journal() -> ! {
    let Some(mut disk) = first_writable() else {
        check!(false, "block", "journal: no disk that can be written");
        crate::power::reset()
    };
    let data = memory::dma(512);
    for number in 1.. {
        data.set(0);
        write64(data.address(), number);
        let sector = number % disk.sectors;
        if !(disk.write(sector, data, 512) && disk.flush()) {
            println!("journal: error at {number}");
            crate::power::off();
        }
        println!("durable {number}");
    }
    crate::power::off()
}

/// Writes every sector of the disk, in pieces of 64 KiB, and says what came of it.
pub fn fill() -> ! {
    let Some(mut disk) = first_writable() else {
        check!(false, "block", "fill: no disk that can be written");
        crate::power::reset()
    };
    let data = memory::dma(65536);
    data.fill(9);
    let (mut written, mut errors, mut sector) = (0, 0, 0);
    while sector + 128 <= disk.sectors {
        match disk.request(OUT, sector, &[Buffer::out(data.address(), 65536)]) {
            Some(OK) => written += 1,
            _ => errors += 1,
        }
        sector += 128;
    }
    let flushed = disk.flush();
    println!(
        "fill: {written} written, {errors} errors, flush {}",
        if flushed { "done" } else { "failed" }
    );
    crate::power::off()
}

/// Reads the first sectors of the disk over and over, for tests that take it away meanwhile. Says so when a read fails, what a flush says
/// to that, and that it goes on.
pub fn watch() -> ! {
    let Some(mut disk) = first_writable() else {
        check!(false, "block", "watch: no disk that can be written");
        crate::power::reset()
    };
    let data = memory::dma(4096);
    let mut reads = 0;
    while disk.read(0, data, 4096) {
        reads += 1;
        if reads == 10 {
            println!("watching");
        }
    }
    println!(
        "watch: a read failed, then a flush {}",
        if disk.flush() { "was done" } else { "failed" }
    );
    crate::power::off()
}

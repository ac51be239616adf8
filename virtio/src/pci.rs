//! The PCI transport (section 4.1): a virtio device as a [`Device`] of the host.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, ensure};
use vmm_plugin_api::{
    Description, Device, Doorbell, GuestMemory, Host, Options, Pace, PciDescription, Queue,
    QueueError, Region, RegionKind, Result,
};

use crate::capability::{self, Window};
use crate::interrupt::Interrupts;
use crate::lane::{Lane, Ring, Thread};
use crate::registers::{DRIVER_OK, Effect, NEEDS_RESET, Registers};
use crate::{MAX_QUEUES, VirtioDevice, legacy, modern};

const VENDOR: u16 = 0x1af4;
/// Modern device ids are this plus the device type.
const MODERN_ID: u16 = 0x1040;
/// The host's.
const MSIX_BAR: u32 = 1;
/// At most one line about a misbehaving driver in this time, in nanoseconds.
const LOG_INTERVAL: u64 = 1_000_000_000;

/// A virtio device `D` on the PCI bus: what a plugin names in its `plugin!` call.
pub struct Pci<D: VirtioDevice> {
    device: D,
    shared: Arc<Shared>,
    window: Mutex<Window>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the queues' threads share with the device.
struct Shared {
    host: Host,
    memory: GuestMemory,
    registers: Mutex<Registers>,
    lanes: Vec<Lane>,
    interrupts: Interrupts,
    /// When the driver's last mistake was logged, on the host's clock.
    logged: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// What a read of the device status gives. After a reset it stays as it was until nothing of the device touches guest
    /// memory any more; drivers wait for 0 (section 4.1.4.3.2).
    fn status(&self, registers: &mut Registers) -> u8 {
        if let Some(before) = registers.resetting {
            if !self.lanes.iter().all(Lane::settled) {
                return before;
            }
            registers.resetting = None;
        }
        registers.status
    }

    fn apply(&self, registers: &mut Registers, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Reset => self.reset(registers),
            Effect::StartAll => {
                for index in 0..self.lanes.len() {
                    self.start_queue(registers, index as u16);
                }
            }
            Effect::Start(index) => self.start_queue(registers, index),
            Effect::Stop(index) => {
                if let Some(lane) = self.lanes.get(usize::from(index)) {
                    lane.serve(None);
                }
            }
            Effect::Vector(index) => {
                let queue = registers.queues.get(usize::from(index));
                if let (Some(queue), Some(lane)) = (queue, self.lanes.get(usize::from(index))) {
                    lane.vector.store(queue.vector, Ordering::Relaxed);
                }
            }
        }
    }

    fn start_queue(&self, registers: &mut Registers, index: u16) {
        let lane = self.lanes.get(usize::from(index));
        let (Some(lane), Some(config)) = (lane, registers.queue_config(index)) else {
            return;
        };
        if std::mem::replace(&mut registers.queues[usize::from(index)].served, true) {
            return;
        }
        match Queue::new(self.memory, config) {
            Ok(queue) => lane.serve(Some(Ring {
                queue,
                features: registers.accepted,
            })),
            Err(error) => self.needs_reset(registers, index, error),
        }
    }

    fn reset(&self, registers: &mut Registers) {
        registers.reset();
        for lane in &self.lanes {
            lane.vector
                .store(crate::interrupt::NO_VECTOR, Ordering::Relaxed);
            lane.serve(None);
        }
        self.interrupts.reset();
    }

    /// The driver has broken queue `index` (section 2.1.2).
    fn needs_reset(&self, registers: &mut Registers, index: u16, error: QueueError) {
        registers.status |= NEEDS_RESET;
        if registers.status & DRIVER_OK != 0 {
            self.interrupts.config();
        }
        let now = self.host.clock().max(1);
        let last = self.logged.load(Ordering::Relaxed);
        if last == 0 || now.saturating_sub(last) >= LOG_INTERVAL {
            self.logged.store(now, Ordering::Relaxed);
            self.host.log(
                log::Level::Warn,
                format_args!(
                    "the guest's driver broke queue {index}: {error}; the device waits for a reset"
                ),
            );
        }
    }

    /// A queue's thread has met an error in `epoch` of its lane.
    fn queue_broken(&self, index: u16, epoch: u64, error: QueueError) {
        let mut registers = lock(&self.registers);
        // Starts and resets happen under the same lock, so this is the driver's present queue or a forgotten one.
        if self.lanes[usize::from(index)].current(epoch) {
            self.needs_reset(&mut registers, index, error);
        }
    }
}

impl<D: VirtioDevice> Pci<D> {
    fn vectors(&self) -> u16 {
        // One for each queue and one for configuration changes.
        self.shared.lanes.len() as u16 + 1
    }

    fn read_modern(&self, offset: u64, width: u32) -> u64 {
        match offset {
            0..capability::DEVICE => {
                let mut registers = lock(&self.shared.registers);
                let status = self.shared.status(&mut registers);
                let vector = self.shared.interrupts.config_vector.load(Ordering::Relaxed);
                modern::read(&mut registers, offset, width, status, vector)
            }
            capability::DEVICE..capability::NOTIFY => {
                // Under the lock, so that generation and configuration change as one (section 4.1.4.3.1).
                let registers = lock(&self.shared.registers);
                modern::field(&registers.config, offset - capability::DEVICE, width)
            }
            capability::ISR => self.shared.interrupts.read_isr().into(),
            _ => 0,
        }
    }

    fn write_modern(&self, offset: u64, width: u32, value: u64) {
        match offset {
            16 if width == 2 => self.set_config_vector(value as u16),
            0..capability::DEVICE => {
                let mut registers = lock(&self.shared.registers);
                let effect = modern::write(&mut registers, offset, width, value);
                self.shared.apply(&mut registers, effect);
            }
            capability::NOTIFY..capability::ISR => {
                self.notify((offset - capability::NOTIFY) / capability::NOTIFY_STRIDE);
            }
            // The device configuration is read-only, as is the ISR byte.
            _ => {}
        }
    }

    fn read_legacy(&self, offset: u64, width: u32) -> u64 {
        let config = legacy::config_offset(self.shared.host.msix_enabled());
        if offset >= config {
            let registers = lock(&self.shared.registers);
            return modern::field(&registers.config, offset - config, width);
        }
        if offset == legacy::ISR {
            return self.shared.interrupts.read_isr().into();
        }
        let mut registers = lock(&self.shared.registers);
        let status = self.shared.status(&mut registers);
        let vector = self.shared.interrupts.config_vector.load(Ordering::Relaxed);
        legacy::read(&mut registers, offset, width, status, vector)
    }

    fn write_legacy(&self, offset: u64, width: u32, value: u64) {
        if offset >= legacy::config_offset(self.shared.host.msix_enabled()) {
            return;
        }
        match (offset, width) {
            (legacy::NOTIFY, _) => self.notify(value & 0xffff),
            (20, 2) => self.set_config_vector(value as u16),
            _ => {
                let mut registers = lock(&self.shared.registers);
                let effect = legacy::write(&mut registers, offset, width, value);
                self.shared.apply(&mut registers, effect);
            }
        }
    }

    fn set_config_vector(&self, vector: u16) {
        let vector = lock(&self.shared.registers).checked_vector(vector);
        let interrupts = &self.shared.interrupts;
        interrupts.config_vector.store(vector, Ordering::Relaxed);
    }

    fn notify(&self, queue: u64) {
        let queue = usize::try_from(queue).unwrap_or(usize::MAX);
        if let Some(lane) = self.shared.lanes.get(queue) {
            lane.ring();
        }
    }

    /// Binds each queue's notification addresses to its lane. A host that can't leaves them to [`Device::write`].
    fn bind_doorbells(&self, index: u16, lane: &Lane) {
        let modern = Doorbell {
            region: capability::BAR,
            offset: capability::NOTIFY + u64::from(index) * capability::NOTIFY_STRIDE,
            width: 0,
            value: None,
        };
        let legacy = Doorbell {
            region: legacy::BAR,
            offset: legacy::NOTIFY,
            width: 2,
            value: Some(index.into()),
        };
        let with_legacy = !self.device.modern_only();
        for bell in [Some(modern), with_legacy.then_some(legacy)]
            .into_iter()
            .flatten()
        {
            if let Err(error) = self.shared.host.doorbell(bell, lane.bell()) {
                let text = format_args!("queue {index} is notified through registers: {error:#}");
                self.shared.host.log(log::Level::Debug, text);
            }
        }
    }

    fn start_thread(&self, index: u16) -> Result<()> {
        let worker = self.device.worker(index)?;
        let shared = self.shared.clone();
        let lane = &self.shared.lanes[usize::from(index)];
        self.bind_doorbells(index, lane);
        lane.open();
        let name = format!("{}-q{index}", D::NAME);
        let thread = self.shared.host.spawn(&name, move || {
            let thread = Thread {
                lane: &shared.lanes[usize::from(index)],
                interrupts: &shared.interrupts,
                worker,
                queue: None,
                epoch: 0,
                pace: Pace::new(shared.host.clone()),
                counted: 0,
            };
            thread.run(|epoch, error| shared.queue_broken(index, epoch, error));
        });
        match thread {
            Ok(thread) => lock(&self.threads).push(thread),
            Err(error) => {
                lane.close();
                return Err(error)
                    .with_context(|| format!("can't start the thread of queue {index}"));
            }
        }
        Ok(())
    }
}

impl<D: VirtioDevice> Device for Pci<D> {
    const FOLLOWS_RESIZE: bool = D::FOLLOWS_RESIZE;

    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let device = D::create(options, host)?;
        let sizes = device.queue_sizes();
        ensure!(
            !sizes.is_empty() && sizes.len() <= MAX_QUEUES,
            "a virtio device has 1 to {MAX_QUEUES} queues, not {}",
            sizes.len()
        );
        let lanes = sizes
            .iter()
            .map(|_| Lane::new(host.counter("notifications")));
        let lanes = lanes
            .collect::<std::io::Result<Vec<_>>>()
            .context("can't make the queues' doorbells")?;
        let vectors = lanes.len() as u16 + 1;
        let registers = Registers::new(device.features(), &sizes, vectors, device.config());
        Ok(Self {
            device,
            shared: Arc::new(Shared {
                host: host.clone(),
                memory: host.memory()?,
                registers: Mutex::new(registers),
                lanes,
                interrupts: Interrupts::new(host.clone()),
                logged: AtomicU64::new(0),
            }),
            window: Mutex::new(Window::new()),
            threads: Mutex::default(),
        })
    }

    fn describe(&self) -> Description {
        let modern_only = self.device.modern_only();
        let mut regions = vec![Region {
            id: capability::BAR,
            kind: RegionKind::Bar32(capability::BAR),
            size: capability::BAR_SIZE,
        }];
        if !modern_only {
            regions.push(Region {
                id: legacy::BAR,
                kind: RegionKind::BarIo(legacy::BAR),
                size: legacy::BAR_SIZE,
            });
        }
        // Section 4.1.2: a transitional device has revision 0 and its type as subsystem id; a modern one neither.
        let (device, subsystem, revision) = if modern_only {
            (MODERN_ID + D::TYPE, MODERN_ID, 1)
        } else {
            (D::TRANSITIONAL_ID, D::TYPE, 0)
        };
        Description {
            regions,
            pci: Some(PciDescription {
                vendor: VENDOR,
                device,
                subsystem_vendor: VENDOR,
                subsystem,
                class: D::CLASS,
                revision,
                intx: true,
                msix_vectors: self.vectors(),
                msix_bar: MSIX_BAR,
                capabilities: capability::all(
                    self.shared.lanes.len(),
                    lock(&self.shared.registers).config.len(),
                    !modern_only,
                ),
            }),
            ..Description::default()
        }
    }

    fn read(&self, region: u32, offset: u64, width: u32) -> u64 {
        match region {
            capability::BAR => self.read_modern(offset, width),
            legacy::BAR => self.read_legacy(offset, width),
            _ => u64::MAX,
        }
    }

    fn write(&self, region: u32, offset: u64, width: u32, value: u64) {
        match region {
            capability::BAR => self.write_modern(offset, width, value),
            legacy::BAR => self.write_legacy(offset, width, value),
            _ => {}
        }
    }

    fn read_capability(&self, cap: u32, offset: u32, width: u32) -> u32 {
        if cap != capability::WINDOW {
            return u32::MAX;
        }
        let ports = !self.device.modern_only();
        let mut window = lock(&self.window);
        if let Some(access) = window.target(offset, width, ports) {
            let value = self.read(access.bar, access.offset, access.width);
            window.set_data(value as u32);
        }
        window.read(offset, width)
    }

    fn write_capability(&self, cap: u32, offset: u32, width: u32, value: u32) {
        if cap != capability::WINDOW {
            return;
        }
        let ports = !self.device.modern_only();
        let mut window = lock(&self.window);
        window.write(offset, width, value);
        if let Some(access) = window.target(offset, width, ports) {
            let data = window.data();
            drop(window);
            self.write(access.bar, access.offset, access.width, data.into());
        }
    }

    fn start(&self) -> Result<()> {
        self.shared.interrupts.open(self.vectors())?;
        for index in 0..self.shared.lanes.len() {
            self.start_thread(index as u16)?;
        }
        Ok(())
    }

    fn resized(&self) {
        self.device.resized();
        let config = self.device.config();
        // Under the lock, so that a reset leaves no interrupt behind.
        let mut registers = lock(&self.shared.registers);
        if registers.set_config(config) {
            self.shared.interrupts.config();
        }
    }

    fn pause(&self) -> Result<()> {
        for lane in &self.shared.lanes {
            lane.pause();
        }
        for lane in &self.shared.lanes {
            lane.wait_parked();
        }
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        for lane in &self.shared.lanes {
            lane.resume();
        }
        Ok(())
    }

    fn reset(&self) -> Result<()> {
        let mut registers = lock(&self.shared.registers);
        self.shared.reset(&mut registers);
        registers.resetting = None;
        *lock(&self.window) = Window::new();
        Ok(())
    }

    fn stop(&self) {
        for lane in &self.shared.lanes {
            lane.exit();
        }
        for thread in lock(&self.threads).drain(..) {
            // A panic in it has been reported as a fault by the thread itself.
            let _ = thread.join();
        }
    }
}

impl<D: VirtioDevice> Drop for Pci<D> {
    fn drop(&mut self) {
        self.stop();
    }
}

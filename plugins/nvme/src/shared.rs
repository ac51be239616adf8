//! What the controller's threads and the vCPU threads share.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use vmm_plugin_api::abi::block::BLOCK_VOLATILE_CACHE;
use vmm_plugin_api::{BlockDevice, BlockInfo, DiskSize, GuestMemory, Host, Result};

use crate::command::Command;
use crate::counters::Counters;
use crate::doorbells::{Doorbells, FIRST, Misuse, QUEUES, Rung};
use crate::engine::{Engine, Mode};
use crate::error_log::ErrorLog;
use crate::interrupts::Interrupts;
use crate::io::Namespace;
use crate::lane::Lane;
use crate::registers::{Effect, READY, Registers};
use crate::rings::Submission;
use crate::status::Status;

/// Bytes of the serial number (figure 251).
pub(crate) const SERIAL_BYTES: usize = 20;
/// At most one line about a misbehaving driver in this time, in nanoseconds.
const LOG_INTERVAL: u64 = 1_000_000_000;

/// A note to the admin thread.
pub(crate) enum AdminNote {
    /// Back to power-on state.
    PowerOn,
    /// Finish what is in flight and end.
    Exit,
}

/// A note to the thread of an I/O completion queue.
pub(crate) enum WorkNote {
    /// Serve this submission queue as well.
    Add(Submission),
    /// Finish what is in flight of this one, and serve it no more.
    Remove(u16),
    /// The guest has set up shadow doorbells.
    Shadow(crate::doorbells::Shadow),
    /// Finish what is in flight and end; the guest sees it done if `visible`.
    Exit { visible: bool },
}

/// Everything that more than one thread uses.
pub(crate) struct Shared {
    pub(crate) host: Host,
    pub(crate) memory: GuestMemory,
    pub(crate) backend: BlockDevice,
    /// The backend as it was at first.
    info: BlockInfo,
    /// How large it is by now.
    size: DiskSize,
    /// It has grown, and the admin thread has not seen it.
    resized: AtomicBool,
    pub(crate) serial: [u8; SERIAL_BYTES],
    pub(crate) counters: Counters,
    pub(crate) registers: Registers,
    pub(crate) doorbells: Doorbells,
    pub(crate) interrupts: Interrupts,
    pub(crate) admin: Lane<AdminNote>,
    /// By completion queue; made when one is first created.
    lanes: [OnceLock<Lane<WorkNote>>; QUEUES],
    /// The guest has disabled the volatile write cache.
    pub(crate) write_through: AtomicBool,
    /// Doorbell writes against the rules that the admin thread has not seen: bit 0 register, bit 1 value.
    misuse: AtomicU32,
    pub(crate) errors: Mutex<ErrorLog>,
    pub(crate) media_errors: AtomicU64,
    /// Those that serve no queue now.
    engines: Mutex<Vec<Engine>>,
    /// When the driver's last mistake was logged, on the host's clock.
    logged: AtomicU64,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(
        host: &Host,
        backend: BlockDevice,
        serial: [u8; SERIAL_BYTES],
    ) -> Result<Self> {
        let info = backend.info()?;
        Ok(Self {
            memory: host.memory()?,
            size: DiskSize::new(backend.bytes(info.bytes)),
            info,
            resized: AtomicBool::new(false),
            backend,
            serial,
            counters: Counters::new(host),
            registers: Registers::default(),
            doorbells: Doorbells::new(),
            interrupts: Interrupts::new(host.clone()),
            admin: Lane::new()?,
            lanes: [const { OnceLock::new() }; QUEUES],
            write_through: AtomicBool::new(false),
            misuse: AtomicU32::new(0),
            errors: Mutex::default(),
            media_errors: AtomicU64::new(0),
            engines: Mutex::default(),
            logged: AtomicU64::new(0),
            host: host.clone(),
        })
    }

    /// The lane of the thread that serves completion queue `queue`, if there ever was one.
    pub(crate) fn lane(&self, queue: u16) -> Option<&Lane<WorkNote>> {
        self.lanes.get(usize::from(queue))?.get()
    }

    /// The same; made if there is none.
    pub(crate) fn make_lane(&self, queue: u16) -> std::io::Result<&Lane<WorkNote>> {
        let cell = &self.lanes[usize::from(queue)];
        if cell.get().is_none() {
            // Only the admin thread makes lanes.
            let _ = cell.set(Lane::new()?);
        }
        cell.get().ok_or_else(|| std::io::ErrorKind::Other.into())
    }

    /// Every lane that has been made.
    pub(crate) fn all_lanes(&self) -> impl Iterator<Item = &Lane<WorkNote>> {
        self.lanes.iter().filter_map(OnceLock::get)
    }

    /// An engine for a queue; [`Shared::put_engine`] takes it back.
    pub(crate) fn take_engine(&self) -> Result<Engine> {
        if let Some(engine) = lock(&self.engines).pop() {
            return Ok(engine);
        }
        let namespace = self.namespace();
        let size = self.size.clone();
        Engine::new(&self.backend, self.memory, namespace, size, self.counters)
    }

    pub(crate) fn put_engine(&self, engine: Engine) {
        lock(&self.engines).push(engine);
    }

    /// The namespace as it is now.
    pub(crate) fn namespace(&self) -> Namespace {
        let info = BlockInfo {
            bytes: self.size.bytes(),
            ..self.info
        };
        Namespace { info }
    }

    /// The backend may have grown: the queues know at once, and the admin thread tells the guest, if it listens.
    pub(crate) fn look_at_size(&self) {
        if self.size.grow(self.backend.bytes(self.info.bytes)) {
            self.resized.store(true, Ordering::SeqCst);
            self.admin.poke();
        }
    }

    /// Whether the namespace has grown since the last call.
    pub(crate) fn take_resized(&self) -> bool {
        self.resized.swap(false, Ordering::SeqCst)
    }

    /// Whether the backend has a volatile write cache.
    pub(crate) fn cached(&self) -> bool {
        self.namespace().has(BLOCK_VOLATILE_CACHE)
    }

    /// How commands are started now.
    pub(crate) fn mode(&self) -> Mode {
        Mode {
            cached: self.cached(),
            write_through: self.write_through.load(Ordering::Relaxed),
        }
    }

    /// A guest read of BAR 0.
    pub(crate) fn read(&self, offset: u64, width: u32) -> u64 {
        if offset >= FIRST {
            // Section 3.1.24: what a read of a doorbell gives is up to the vendor.
            return 0;
        }
        self.registers.read(offset, width, &self.interrupts)
    }

    /// A guest write to BAR 0. On a vCPU thread.
    pub(crate) fn write(&self, offset: u64, width: u32, value: u64) {
        if offset < FIRST {
            let effect = self.registers.write(offset, width, value, &self.interrupts);
            if effect == Effect::Wake {
                self.admin.poke();
            }
            return;
        }
        if width != 4 || self.registers.read(0x1c, 4, &self.interrupts) & u64::from(READY) == 0 {
            return;
        }
        match self.doorbells.write(offset, value as u32) {
            Rung::Submission { server } => self.ring(server),
            Rung::Completion { queue, awaited } => {
                let bell = &self.doorbells.completion[usize::from(queue)];
                self.interrupts.taken(queue, || bell.unread());
                if awaited {
                    self.ring(queue);
                }
            }
            Rung::Misused(misuse) => self.misused(misuse),
        }
    }

    fn ring(&self, server: u16) {
        if server == 0 {
            self.admin.ring();
        } else if let Some(lane) = self.lane(server) {
            lane.ring();
        }
    }

    /// The guest has used a doorbell against the rules: the admin thread tells it, if it listens.
    pub(crate) fn misused(&self, misuse: Misuse) {
        let bit = match misuse {
            Misuse::Register => 1,
            Misuse::Value => 2,
        };
        if self.misuse.fetch_or(bit, Ordering::SeqCst) & bit == 0 {
            self.admin.poke();
        }
    }

    /// Misuse since the last call, as bits.
    pub(crate) fn take_misuse(&self) -> u32 {
        self.misuse.swap(0, Ordering::SeqCst)
    }

    /// Notes that a command has failed; its status then says that the log has more.
    pub(crate) fn failed(&self, queue: u16, command: &Command, status: Status) -> Status {
        if status.is_media_error() {
            self.media_errors.fetch_add(1, Ordering::Relaxed);
        }
        let status = status.logged();
        lock(&self.errors).add(queue, command, status);
        status
    }

    /// Says in the log, not too often, what the guest's driver did wrong.
    pub(crate) fn complain(&self, text: std::fmt::Arguments<'_>) {
        let now = self.host.clock().max(1);
        let last = self.logged.load(Ordering::Relaxed);
        if last == 0 || now.saturating_sub(last) >= LOG_INTERVAL {
            self.logged.store(now, Ordering::Relaxed);
            self.host.log(log::Level::Warn, text);
        }
    }
}

//! How the controller interrupts: MSI-X vectors as descriptors, or the INTx pin with its mask (section 7.5.1).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use vmm_plugin_api::{Host, Interrupt, Result};

use crate::doorbells::QUEUES;

/// MSI-X vectors: one for each completion queue.
pub(crate) const VECTORS: u16 = QUEUES as u16;

pub(crate) struct Interrupts {
    host: Host,
    vectors: [OnceLock<Interrupt>; VECTORS as usize],
    /// `INTMS`: only bit 0 means something, since the pin stands for vector 0.
    mask: AtomicU32,
    /// Whether the pin has been used since the last reset.
    pin_used: AtomicBool,
    pin: Mutex<Pin>,
}

#[derive(Default)]
struct Pin {
    /// Completion queues that have unread entries, one bit each.
    unread: u64,
    high: bool,
}

impl Interrupts {
    pub(crate) fn new(host: Host) -> Self {
        Self {
            host,
            vectors: [const { OnceLock::new() }; VECTORS as usize],
            mask: AtomicU32::new(0),
            pin_used: AtomicBool::new(false),
            pin: Mutex::default(),
        }
    }

    /// Fetches the descriptor of `vector`, below [`VECTORS`]. From start on.
    pub(crate) fn open(&self, vector: u16) -> Result<()> {
        let cell = &self.vectors[usize::from(vector)];
        if cell.get().is_none() {
            // Another thread that was faster has put the same descriptor there.
            let _ = cell.set(self.host.interrupt(vector.into())?);
        }
        Ok(())
    }

    /// Whether the guest has enabled MSI-X.
    pub(crate) fn msix(&self) -> bool {
        self.host.msix_enabled()
    }

    /// Completion queue `queue` with `vector` has new entries; `unread` says whether it still has some.
    pub(crate) fn raise(&self, queue: u16, vector: u16, unread: impl Fn() -> bool) {
        if self.msix() {
            let vector = self
                .vectors
                .get(usize::from(vector))
                .and_then(OnceLock::get);
            if let Some(vector) = vector {
                vector.raise();
            }
            return;
        }
        self.pin_used.store(true, Ordering::SeqCst);
        self.update(|pin| pin.set(queue, unread()));
    }

    /// The guest has taken entries of `queue`, or the queue is gone.
    pub(crate) fn taken(&self, queue: u16, unread: impl Fn() -> bool) {
        if self.pin_used.load(Ordering::SeqCst) {
            self.update(|pin| {
                // Only a queue that interrupts has its bit set.
                if pin.unread & 1 << queue != 0 {
                    pin.set(queue, unread());
                }
            });
        }
    }

    /// `INTMS`.
    pub(crate) fn mask(&self) -> u32 {
        self.mask.load(Ordering::SeqCst)
    }

    /// Sets or clears bits of the mask.
    pub(crate) fn set_mask(&self, bits: u32, masked: bool) {
        if masked {
            self.mask.fetch_or(bits, Ordering::SeqCst);
        } else {
            self.mask.fetch_and(!bits, Ordering::SeqCst);
        }
        self.update(|_| ());
    }

    fn update(&self, change: impl FnOnce(&mut Pin)) {
        let mut pin = self.pin.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut pin);
        let high = pin.unread != 0 && self.mask() & 1 == 0;
        if std::mem::replace(&mut pin.high, high) != high {
            self.host.set_pin(0, high);
        }
    }

    /// No queue interrupts, nothing is masked.
    pub(crate) fn reset(&self) {
        self.mask.store(0, Ordering::SeqCst);
        self.update(|pin| pin.unread = 0);
        self.pin_used.store(false, Ordering::SeqCst);
    }
}

impl Pin {
    fn set(&mut self, queue: u16, unread: bool) {
        self.unread &= !(1 << queue);
        self.unread |= u64::from(unread) << queue;
    }
}

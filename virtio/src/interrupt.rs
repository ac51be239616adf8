//! How the device interrupts: MSI-X vectors as descriptors, or the INTx pin and the ISR status byte (section 4.1.4.5).

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use vmm_plugin_api::{Host, Interrupt, Result};

/// `VIRTIO_MSI_NO_VECTOR`.
pub(crate) const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

pub(crate) struct Interrupts {
    host: Host,
    vectors: OnceLock<Vec<Interrupt>>,
    pub(crate) config_vector: AtomicU16,
    /// Bits and pin change together, so that a read that clears the bits never lowers the pin for a later one.
    isr: Mutex<u8>,
}

impl Interrupts {
    pub(crate) fn new(host: Host) -> Self {
        Self {
            host,
            vectors: OnceLock::new(),
            config_vector: AtomicU16::new(NO_VECTOR),
            isr: Mutex::new(0),
        }
    }

    /// Fetches the descriptors. In start.
    pub(crate) fn open(&self, vectors: u16) -> Result<()> {
        let open = (0..vectors).map(|v| self.host.interrupt(v.into()));
        let open = open.collect::<Result<Vec<_>>>()?;
        // A second start is not allowed; the descriptors would be the same.
        let _ = self.vectors.set(open);
        Ok(())
    }

    /// A queue with MSI-X vector `vector` has used buffers.
    pub(crate) fn queue(&self, vector: u16) {
        self.raise(vector, ISR_QUEUE);
    }

    /// The device configuration or `DEVICE_NEEDS_RESET` has changed.
    pub(crate) fn config(&self) {
        self.raise(self.config_vector.load(Ordering::Relaxed), ISR_CONFIG);
    }

    fn raise(&self, vector: u16, bit: u8) {
        if self.host.msix_enabled() {
            let vectors = self.vectors.get().map_or(&[][..], Vec::as_slice);
            if let Some(vector) = vectors.get(usize::from(vector)) {
                vector.raise();
            }
            return;
        }
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        if *isr == 0 {
            self.host.set_pin(0, true);
        }
        *isr |= bit;
    }

    /// The ISR status byte; reading it clears it and lowers the pin.
    pub(crate) fn read_isr(&self) -> u8 {
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        if *isr != 0 {
            self.host.set_pin(0, false);
        }
        std::mem::take(&mut *isr)
    }

    pub(crate) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        self.read_isr();
    }
}

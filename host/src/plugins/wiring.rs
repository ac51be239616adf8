//! How a device's interrupts and doorbells reach the machine: the same questions for an ISA device and a PCI function.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use crate::hypervisor::Vm;
use crate::machine::IsaHandle;
use crate::pci::Function;

/// A device's connection to the machine. Any thread.
pub trait Wiring: Send + Sync {
    /// The eventfd of an MSI-X vector, open as long as the device.
    ///
    /// # Errors
    /// No such vector.
    fn msix_fd(&self, vector: u32) -> Result<RawFd>;
    /// Raises an MSI-X vector once.
    ///
    /// # Errors
    /// No such vector.
    fn raise(&self, vector: u32) -> Result<()>;
    /// Drives an interrupt pin.
    ///
    /// # Errors
    /// No such pin.
    fn level(&self, pin: u32, high: bool) -> Result<()>;
    /// Whether the guest has enabled MSI-X.
    fn msix_enabled(&self) -> bool;
    /// Binds a doorbell; `Ok(false)`: not on this machine.
    ///
    /// # Errors
    /// Refused.
    fn doorbell(
        &self,
        region: u32,
        offset: u64,
        width: u8,
        value: Option<u64>,
        fd: BorrowedFd<'_>,
    ) -> Result<bool>;
    /// Ends a doorbell's binding.
    ///
    /// # Errors
    /// There is none.
    fn end_doorbell(&self, region: u32, offset: u64, width: u8, value: Option<u64>) -> Result<()>;
}

impl<V: Vm> Wiring for Function<V> {
    fn msix_fd(&self, vector: u32) -> Result<RawFd> {
        let vector = u16::try_from(vector).context("vectors end at 2047")?;
        Ok(Function::msix_fd(self, vector)?.as_raw_fd())
    }

    fn raise(&self, vector: u32) -> Result<()> {
        Function::raise(self, u16::try_from(vector).context("vectors end at 2047")?)
    }

    fn level(&self, pin: u32, high: bool) -> Result<()> {
        if pin != 0 {
            bail!("a PCI function has pin 0 alone");
        }
        Function::level(self, high)
    }

    fn msix_enabled(&self) -> bool {
        Function::msix_enabled(self)
    }

    fn doorbell(
        &self,
        region: u32,
        offset: u64,
        width: u8,
        value: Option<u64>,
        fd: BorrowedFd<'_>,
    ) -> Result<bool> {
        Function::doorbell(self, region, offset, width, value, fd)
    }

    fn end_doorbell(&self, region: u32, offset: u64, width: u8, value: Option<u64>) -> Result<()> {
        Function::end_doorbell(self, region, offset, width, value)
    }
}

/// An ISA device: pins only.
pub struct Isa<V: Vm>(pub IsaHandle<V>);

impl<V: Vm> Wiring for Isa<V> {
    fn msix_fd(&self, _vector: u32) -> Result<RawFd> {
        bail!("an ISA device has no MSI-X vectors")
    }

    fn raise(&self, _vector: u32) -> Result<()> {
        bail!("an ISA device has no MSI-X vectors")
    }

    fn level(&self, pin: u32, high: bool) -> Result<()> {
        self.0.level(pin as usize, high)
    }

    fn msix_enabled(&self) -> bool {
        false
    }

    fn doorbell(&self, _: u32, _: u64, _: u8, _: Option<u64>, _: BorrowedFd<'_>) -> Result<bool> {
        Ok(false)
    }

    fn end_doorbell(&self, _: u32, offset: u64, _: u8, _: Option<u64>) -> Result<()> {
        bail!("an ISA device has no doorbell at offset {offset:#x}")
    }
}

/// Shared by every connection of a device.
pub type SharedWiring = Arc<dyn Wiring>;

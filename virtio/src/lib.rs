//! What every virtio device plugin shares: the PCI transport and one thread for each queue.
//!
//! A plugin implements [`VirtioDevice`] for the device proper (features, configuration space) and [`QueueWorker`] for what
//! is done with requests; [`Pci`] makes of them a [`vmm_plugin_api::Device`] with the interface of virtio 1.2 section 4.1,
//! legacy included. Register accesses on vCPU threads never wait for a queue thread, and a notification never
//! reaches the plugin's registers at all: it is an eventfd that the queue's thread sleeps on.
//!
//! Section numbers refer to virtio 1.2.

mod capability;
mod interrupt;
mod lane;
mod legacy;
mod modern;
mod pci;
mod registers;

use std::os::fd::BorrowedFd;

use vmm_plugin_api::{Host, Options, Queue, QueueError, Result};

pub use pci::Pci;

/// `VIRTIO_F_ANY_LAYOUT`, offered to legacy drivers only (section 6.3).
pub const F_ANY_LAYOUT: u64 = 1 << 27;
/// `VIRTIO_F_INDIRECT_DESC` (section 6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX` (section 6).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1` (section 6).
pub const F_VERSION_1: u64 = 1 << 32;

/// The most queues that the transport has notification addresses for.
pub const MAX_QUEUES: usize = 1024;

/// A kind of virtio device, without its transport.
pub trait VirtioDevice: Sized + Send + Sync + 'static {
    /// Device type (section 5), for example 2 for a block device.
    const TYPE: u16;
    /// PCI device id of the transitional device (section 4.1.2.1).
    const TRANSITIONAL_ID: u16;
    /// PCI class, subclass and programming interface, class highest.
    const CLASS: u32;
    /// Short name for threads and log lines.
    const NAME: &'static str;
    /// What serves its queues.
    type Worker: QueueWorker;

    /// Makes the device from validated options. Control thread.
    ///
    /// # Errors
    /// What the operator can mend.
    fn create(options: &Options<'_>, host: &Host) -> Result<Self>;

    /// Whether the device hides the legacy interface and takes the modern device id.
    fn modern_only(&self) -> bool;

    /// Feature bits of the device type. The transport adds the ring's and `VIRTIO_F_VERSION_1`.
    fn features(&self) -> u64;

    /// Largest size of each queue: powers of two up to 32768.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Device configuration space as it is now; read-only to the driver. Asked for at create and after
    /// [`VirtioDevice::resized`]; its length never changes.
    fn config(&self) -> Vec<u8>;

    /// Whether the configuration space follows a disk that grows.
    const FOLLOWS_RESIZE: bool = false;

    /// A block backend that the device was created with has become larger. Control thread; afterwards the transport shows the
    /// driver the new configuration space and tells it of the change.
    fn resized(&self) {}

    /// Makes what serves queue `index`. Control thread, in start; it then moves to its thread.
    ///
    /// # Errors
    /// The VM does not start.
    fn worker(&self, index: u16) -> Result<Self::Worker>;
}

/// Serves one queue on that queue's own thread. No method sleeps, except that a backend may do short I/O in its submit.
pub trait QueueWorker: Send + 'static {
    /// The driver has set the queue up with these negotiated features. Nothing is in flight.
    fn activate(&mut self, features: u64);

    /// Pops what there is room for and starts it.
    ///
    /// # Errors
    /// The driver has broken a rule: what was popped before is started all the same, and the queue is not used again.
    fn take(&mut self, queue: &mut Queue) -> Result<(), QueueError>;

    /// Finishes what has completed, and pushes it to `queue`; `None`: the driver has reset the device, so drop it.
    fn complete(&mut self, queue: Option<&mut Queue>);

    /// Requests that were popped and are not complete.
    fn in_flight(&self) -> usize;

    /// Whether [`QueueWorker::take`] would take something if there was something.
    fn has_room(&self) -> bool;

    /// Readable when [`QueueWorker::complete`] has something to do. `None`: with requests in flight, it has at once.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// Takes the readiness from [`QueueWorker::fd`].
    fn acknowledge(&self);
}

//! Write a vmm-host device or backend in safe Rust.
//!
//! A plugin crate is a `cdylib` that implements [`Device`], [`BlockBackend`] or [`CharBackend`] for its types and names
//! them in one [`plugin!`] call next to a manifest (`plugin.toml`), which lists the names a VM file may use and the
//! options they take. The macro makes the C side: it converts arguments, catches panics, reports them to the host
//! with plugin, device and method, and answers with a neutral value from then on.
//!
//! ```
//! use vmm_plugin_api::{Description, Device, Host, Options, Region, Result};
//!
//! /// One scratch register at a port of the operator's choice.
//! pub struct Scratch {
//!     port: u64,
//!     value: std::sync::atomic::AtomicU64,
//! }
//!
//! impl Device for Scratch {
//!     fn create(options: &Options<'_>, _host: &Host) -> Result<Self> {
//!         Ok(Self { port: options.u64("port")?, value: Default::default() })
//!     }
//!     fn describe(&self) -> Description {
//!         Description { regions: vec![Region::pio(0, self.port, 4)], ..Description::default() }
//!     }
//!     fn read(&self, _region: u32, _offset: u64, _width: u32) -> u64 {
//!         self.value.load(std::sync::atomic::Ordering::Relaxed)
//!     }
//!     fn write(&self, _region: u32, _offset: u64, _width: u32, value: u64) {
//!         self.value.store(value, std::sync::atomic::Ordering::Relaxed);
//!     }
//!     fn reset(&self) -> Result<()> {
//!         self.value.store(0, std::sync::atomic::Ordering::Relaxed);
//!         Ok(())
//!     }
//! }
//! # fn main() {}
//! ```
//!
//! Threads, states and ownership are those of the [ABI](vmm_abi). What the guard can't contain, because it ends or
//! freezes the process: a segmentation fault, stack overflow, `abort`, a panic while panicking, `panic = "abort"`, deadlock.

mod block;
mod bounce;
mod buffer;
mod chardev;
mod device;
mod disk_size;
mod eventfd;
mod export;
mod guard;
mod host;
mod iface;
mod immediate;
mod layer;
mod log_bridge;
mod memory;
mod options;
mod pace;
mod probes;
mod queue;
#[cfg(feature = "testing")]
pub mod testing;

pub use anyhow::{Error, Result};
pub use block::{
    Batch, BlockBackend, BlockDevice, BlockDone, BlockInfo, BlockOp, BlockQueue, BlockQueueHandle,
    BlockRequest,
};
pub use bounce::{Bounce, Piece, Progress};
pub use chardev::{CharBackend, CharDevice};
pub use device::{
    Capability, Description, Device, PciDescription, Pin, Region, RegionKind, Trigger,
};
pub use disk_size::DiskSize;
pub use eventfd::EventFd;
pub use host::{Counter, Doorbell, Events, Host, Interrupt};
pub use immediate::{Immediate, ImmediateQueue};
pub use layer::{Alarm, JoinedFd, Lower, LowerQueue};
pub use memory::{GuestMemory, GuestSlice, MemoryError};
pub use options::Options;
pub use pace::Pace;
pub use queue::{Chain, Queue, QueueConfig, QueueError};
pub use vmm_abi as abi;

#[doc(hidden)]
pub mod private {
    //! What the expansion of [`plugin!`](crate::plugin) names.
    pub use crate::export::{CreateCall, create_block, create_char, create_device, root, text};
}

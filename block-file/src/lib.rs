//! Disk images in files, for the backends that keep data in one: opening, locking, and queues of requests on them.
//!
//! A request reaches the file in one of three ways. Where the file lives in memory (tmpfs) nothing ever waits, so submit
//! does the transfer itself, and reads go through a mapping. Elsewhere on Linux it goes through io_uring, a whole batch with one system call; only what is in the
//! page cache already, or goes there, is copied at once. Where there is no io_uring, each queue has threads,
//! which other formats use as well.

mod image;
mod lock;
mod open;
mod pinned;
mod pool;
mod queue;
mod size;
mod transfer;
mod vanished;

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
mod uring;
#[cfg(target_os = "linux")]
use linux as system;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod guarded;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod mapped;

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
mod unmapped;
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
use unmapped as mapped;

#[cfg(any(target_os = "illumos", test))]
mod dkio;
#[cfg(target_os = "illumos")]
mod illumos;
#[cfg(target_os = "illumos")]
use illumos as system;

pub use image::{Image, MAX_DISCARD, MAX_SEGMENTS, Settings};
pub use lock::take_lock;
pub use mapped::Mapped;
pub use open::open_locked;
pub use pinned::Pinned;
pub use pool::{Perform, Pool, Threads};
pub use queue::{FileQueue, Job};
pub use size::Extent;
pub use system::{can_punch, flush, in_memory, punch};
pub use transfer::{Direction, read_cached, transfer};
pub use vanished::{cut_short, tell_if_deleted};

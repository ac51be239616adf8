//! What disks keep when the process that serves them is killed: the disks and devices that are tried, the log that a guest
//! writes to them, and its check.
//!
//! A new backend is one line in [`disks::DISKS`], a new device one in [`devices::DEVICES`].

pub mod devices;
pub mod disks;
pub mod sector;

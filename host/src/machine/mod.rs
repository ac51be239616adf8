//! The board: what every PC guest needs around its CPUs, and nothing that a VM file names as a device.

pub mod power;

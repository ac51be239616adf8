//! Runs virtual machines whose every device and backend is a plugin: the pieces of the `vmm-host` binary.
//!
//! [`config`] turns a VM file into a checked description, [`plugins`] finds and loads what it names, [`vm`] builds and runs it on
//! the [`hypervisor`], with the board of [`machine`] around the CPUs and a kernel that [`boot`] puts into guest [`memory`].

pub mod boot;
pub mod bus;
pub mod cli;
pub mod config;
pub mod diagnose;
pub mod hypervisor;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod plugins;
pub mod probes;
pub mod thread;
pub mod vcpu;
pub mod vm;

//! vmm-host.
pub mod bus;
pub mod hypervisor;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod cli;
pub mod config;
pub mod plugins;
pub mod diagnose;
pub mod vcpu;
pub mod boot;

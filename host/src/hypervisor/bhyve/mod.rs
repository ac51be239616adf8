//! illumos bhyve: a VM of the vmm driver, with its interrupt controllers, timers and clock in the kernel.

pub mod abi;
#[cfg(target_os = "illumos")]
pub mod dev_vmm;
pub mod driver;

//! vmm-host.
pub mod bus;
pub mod machine;

//! vmm-host.

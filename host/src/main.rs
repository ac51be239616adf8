//! vmm-host.
fn main() {}

//! The host's probes for DTrace, perf and bpftrace: provider `vmm_host`, as `docs/tracing.md` describes it. One that nobody watches costs
//! a load and a branch.

#![allow(unsafe_code)] // what `usdt` makes of the provider is assembly

#[usdt::provider(provider = "vmm_host")]
mod firing {
    fn pio_read(port: u16, bytes: u8, value: u32) {}
    fn pio_write(port: u16, bytes: u8, value: u32) {}
    fn mmio_read(address: u64, bytes: u8, value: u64) {}
    fn mmio_write(address: u64, bytes: u8, value: u64) {}
    fn vcpu_exit(cpu: u32, why: &str) {}
    fn reset(vm: &str, why: &str) {}
    fn reset_done(vm: &str) {}
}

/// Tells DTrace of the probes. perf and bpftrace find them in the binary.
pub fn register() {
    if let Err(error) = usdt::register_probes() {
        log::debug!("DTrace can't see the probes: {error}");
    }
}

/// The guest has read from an I/O port, on the thread of the vCPU that did.
#[inline(always)]
pub(crate) fn pio_read(port: u16, bytes: u8, value: u32) {
    firing::pio_read!(|| (port, bytes, value));
}

/// The guest has written to one.
#[inline(always)]
pub(crate) fn pio_write(port: u16, bytes: u8, value: u32) {
    firing::pio_write!(|| (port, bytes, value));
}

/// The guest has read a device's memory.
#[inline(always)]
pub(crate) fn mmio_read(address: u64, bytes: u8, value: u64) {
    firing::mmio_read!(|| (address, bytes, value));
}

/// The guest has written to it.
#[inline(always)]
pub(crate) fn mmio_write(address: u64, bytes: u8, value: u64) {
    firing::mmio_write!(|| (address, bytes, value));
}

/// vCPU `cpu` has left the guest for something else.
#[inline(always)]
pub(crate) fn vcpu_exit(cpu: u32, why: &str) {
    firing::vcpu_exit!(|| (cpu, why));
}

/// The machine is about to be reset.
#[inline(always)]
pub(crate) fn reset(vm: &str, why: &str) {
    firing::reset!(|| (vm, why));
}

/// It has been, and goes on.
#[inline(always)]
pub(crate) fn reset_done(vm: &str) {
    firing::reset_done!(|| vm);
}

//! illumos' vmm driver over Linux KVM, for tests: [`Emulated`] answers the requests of `vmm_host::hypervisor::bhyve::abi` as that
//! kernel does, errnos included, and writes down what a host did that the driver refuses or silently suffers.
//!
//! With `VMM_DRIVER_STRICT=1` in the environment the first such violation ends the process.
//!
//! Requests that no host of ours makes are refused with ENOTTY, and noted.
#![cfg(target_os = "linux")]

mod access;
mod argument;
mod clocks;
mod control;
mod cpuid;
mod data;
mod data_chips;
mod dirty;
mod exits;
mod lines;
mod machine;
mod node;
mod power_on;
mod registers;
mod requests;
mod rom_write;
mod rtc_interrupt;
mod run;
mod segments;
mod statistics;
mod suspend;
mod vcpu;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use control::{Emulated, Settings, configure};
pub use node::Node;

static VIOLATIONS: Mutex<Vec<String>> = Mutex::new(Vec::new());

impl Emulated {
    /// What hosts of this process did wrong so far: the VM's name, a colon, and what it was.
    #[must_use]
    pub fn violations() -> Vec<String> {
        lock(&VIOLATIONS).clone()
    }
}

fn violation(vm: &str, what: &str) {
    if std::env::var_os("VMM_DRIVER_STRICT").is_some_and(|value| value == "1") {
        eprintln!("vmm driver: {vm}: {what}");
        std::process::abort();
    }
    lock(&VIOLATIONS).push(format!("{vm}: {what}"));
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn errno(number: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(number)
}

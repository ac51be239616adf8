//! Runs virtual machines whose every device and backend is a plugin.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm_host::cli::main::<vmm_host::hypervisor::Backend>()
}

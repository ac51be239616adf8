//! The host as it is on illumos, with the vmm driver's emulation in the place of the real one.
//!
//! `VMM_DRIVER` in the environment says how the emulated system differs from one on which everything works, such as
//! `VMM_DRIVER=version=15,privileged=false`; the keys are the fields of `vmm_driver::Settings`.

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use vmm_driver::{Emulated, Settings, configure};
    use vmm_host::hypervisor::bhyve::BhyveVm;

    let text = std::env::var("VMM_DRIVER").unwrap_or_default();
    match Settings::parse(&text) {
        Ok(settings) => configure(settings),
        Err(error) => {
            eprintln!("VMM_DRIVER: {error}");
            return ExitCode::from(2);
        }
    }
    vmm_host::cli::main::<BhyveVm<Emulated>>()
}

/// There the real driver is.
#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    vmm_host::cli::main::<vmm_host::hypervisor::Backend>()
}

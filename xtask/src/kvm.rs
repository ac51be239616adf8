//! What /dev/kvm on this machine can run.

use std::fs::OpenOptions;

/// Whether /dev/kvm can be opened, or why not.
pub fn usable() -> Result<(), String> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("/dev/kvm cannot be opened: {error}")),
    }
}

/// Whether it runs an operating system kernel, or why not. KVM modules that work without the
/// processor's virtualisation (PVM and the like) interpret ring 0, which is enough for the
/// self-test guest only; there the processor shows neither VMX nor SVM.
pub fn runs_kernels() -> Result<(), String> {
    usable()?;
    let text = std::fs::read_to_string("/proc/cpuinfo")
        .map_err(|error| format!("/proc/cpuinfo: {error}"))?;
    let flags = text
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    if flags
        .split_ascii_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm")
    {
        Ok(())
    } else {
        Err("/dev/kvm works without VMX or SVM, so it runs no operating system kernel".to_owned())
    }
}

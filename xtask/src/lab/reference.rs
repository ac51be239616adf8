//! The guest's own checks under QEMU's devices, without vmm-host.

use super::Lab;
use crate::{packages, process};
use anyhow::{Context, Result, bail};
use std::process::Command;
use std::time::Duration;

/// Boots the guest's jobs under QEMU's own devices: shows the kernel's warnings there, and that
/// the checks themselves are right.
pub fn run(lab: &Lab, show: bool) -> Result<()> {
    for job in ["check", "disks"] {
        let disk = lab.directory.join("reference.img");
        std::fs::copy(&lab.root, &disk).context("cannot copy the root disk")?;
        let scratch = lab.directory.join("reference-scratch.img");
        std::fs::File::create(&scratch)?.set_len(16 << 20)?;
        let mut command = Command::new(packages::program("qemu-system-x86_64", "qemu-system-x86")?);
        command
            .args([
                "-accel",
                "tcg",
                "-machine",
                "pc",
                "-m",
                "256",
                "-smp",
                "1",
                "-no-reboot",
            ])
            .args([
                "-nic", "none", "-display", "none", "-serial", "stdio", "-monitor", "none",
            ])
            .args(["-vga", "none", "-kernel"])
            .arg(&lab.vmlinuz)
            .arg("-initrd")
            .arg(&lab.initrd)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 root=/dev/vda rw panic=-1 lab.do={job} lab.cpus=1"
            ));
        for (slot, file, more) in [
            (4, &disk, ""),
            (5, &lab.vmlinuz, ",readonly=on"),
            (6, &scratch, ",discard=unmap"),
        ] {
            let file = file.display();
            command
                .arg("-drive")
                .arg(format!("if=none,id=d{slot},format=raw,file={file}{more}"));
            command
                .arg("-device")
                .arg(format!("virtio-blk-pci,drive=d{slot},addr={slot}"));
        }
        let outcome = process::bounded(&mut command, Duration::from_secs(120), show)?;
        if !outcome.output.contains("GUEST-DONE 0") {
            bail!(
                "{job}: {}; the end of its console:
{}",
                outcome.ending(),
                outcome.tail(40)
            );
        }
    }
    Ok(())
}

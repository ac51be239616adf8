//! Where firmware should look for a system: devices as Open Firmware names them (IEEE 1275, PCI bus binding), in the
//! form that firmware for QEMU's machines reads from fw_cfg's `bootorder`.

use crate::hypervisor::Vm;
use crate::pci::{Bdf, Root};

/// Offset of revision and class code in configuration space.
const CLASS: u16 = 8;

/// The path of what can be booted at `bdf`, by its class code.
#[must_use]
pub fn path<V: Vm>(root: &Root<V>, bdf: Bdf) -> String {
    let devfn = u32::from(bdf.device()) << 3 | u32::from(bdf.function());
    let class = root.config_read(0, devfn, CLASS, 4) >> 8;
    let place = format!("{:x},{:x}", bdf.device(), bdf.function());
    match class {
        // Mass storage: SCSI, which virtio disks say that they are, and NVM Express.
        0x01_00_00..=0x01_00_ff => format!("/pci@i0cf8/scsi@{place}/disk@0,0"),
        0x01_08_00..=0x01_08_ff => format!("/pci@i0cf8/pci8086,5845@{place}/namespace@1,0"),
        0x02_00_00 => format!("/pci@i0cf8/ethernet@{place}/ethernet-phy@0"),
        _ => format!("/pci@i0cf8/device@{place}"),
    }
}

/// The file: a path on each line, nothing else to be tried after them.
#[must_use]
pub fn list(paths: &[String]) -> String {
    if paths.is_empty() {
        return String::new();
    }
    let mut text = paths.join("\n");
    text.push_str("\nHALT\0");
    text
}

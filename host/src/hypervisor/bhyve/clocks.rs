//! The CMOS clock and the ACPI PM timer, which the driver has.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use super::abi::*;
use super::node::{self, Node};

/// Puts the PM timer at a port. `VM_REINIT` takes it away.
pub(super) fn place_pm_timer(node: &Node, port: u16) -> Result<()> {
    node.number(node::PMTMR_LOCATE, usize::from(port))
        .with_context(|| format!("bhyve refused the ACPI PM timer at port {port:#x}"))?;
    Ok(())
}

/// Writes battery-backed memory. The clock's own registers (0 to 9, the century, A to D) are not memory, and refused.
pub(super) fn write_cmos(node: &Node, cmos: &[(u8, u8)]) -> Result<()> {
    for &(offset, value) in cmos {
        let mut request = VmRtcData {
            offset: i32::from(offset),
            value,
        };
        node.request(&node::RTC_WRITE, &mut request)
            .with_context(|| format!("bhyve refused {value:#x} for CMOS address {offset:#x}"))?;
    }
    Ok(())
}

/// Sets the CMOS clock to this machine's, in UTC.
pub(super) fn set_clock(node: &Node) -> Result<()> {
    // A host before 1970 has no clock to go by.
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut request = Timespec {
        sec: i64::try_from(now.as_secs())?,
        nsec: i64::from(now.subsec_nanos()),
    };
    node.request(&node::RTC_SETTIME, &mut request)
        .context("bhyve refused to set the CMOS clock")?;
    Ok(())
}

//! A VM's time: its TSC, and when it was booted.
//!
//! All times of in-kernel devices count from the boot, so a VM that is restored gets its time before its devices.

use std::time::Duration;

use anyhow::{Context, Result};

use super::abi::data::VdiTimeInfo;
use super::node::Node;
use super::state::{self, WHOLE_VM};

const SECOND: i128 = 1_000_000_000;

/// The time of the VM.
pub(super) fn read(node: &Node) -> Result<VdiTimeInfo> {
    state::read(node, WHOLE_VM).context("bhyve does not tell the VM's time")
}

/// Sets it, as `saved` was, on this machine and now.
pub(super) fn write(node: &Node, saved: &VdiTimeInfo) -> Result<()> {
    let moved = moved(saved, &read(node)?)?;
    state::write(node, WHOLE_VM, &moved).with_context(|| {
        format!(
            "bhyve refused the VM's time: its TSC counts at {} Hz, which a machine of another frequency can only do if its \
             processor scales",
            saved.guest_freq
        )
    })
}

/// What to write for a VM that was `saved`, on a machine whose own time is `here`: its boot lies as long ago as it did, and the time on
/// the wall that has passed since longer, if that clock went forward.
fn moved(saved: &VdiTimeInfo, here: &VdiTimeInfo) -> Result<VdiTimeInfo> {
    let passed = (wall(here) - wall(saved)).max(0);
    let age = i128::from(saved.hrtime) - i128::from(saved.boot_hrtime) + passed;
    let ticks = passed * i128::from(saved.guest_freq) / SECOND;
    let too_long = || {
        let since = Duration::from_secs((passed / SECOND) as u64);
        format!("A VM that was saved {since:?} ago can't go on")
    };
    Ok(VdiTimeInfo {
        guest_freq: saved.guest_freq,
        guest_tsc: saved.guest_tsc.wrapping_add(ticks as u64),
        boot_hrtime: i64::try_from(i128::from(here.hrtime) - age).with_context(too_long)?,
        hrtime: here.hrtime,
        hres_sec: here.hres_sec,
        hres_ns: here.hres_ns,
    })
}

/// Nanoseconds since 1970.
fn wall(time: &VdiTimeInfo) -> i128 {
    i128::from(time.hres_sec) * SECOND + i128::from(time.hres_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: VdiTimeInfo = VdiTimeInfo {
        guest_freq: 2_000_000_000,
        guest_tsc: 1000,
        boot_hrtime: 70_000_000_000,
        hrtime: 100_000_000_000,
        hres_sec: 1_000_000,
        hres_ns: 500_000_000,
    };

    #[test]
    fn a_vm_is_as_old_as_it_was_and_the_time_since() {
        let here = VdiTimeInfo {
            guest_freq: 3_000_000_000,
            guest_tsc: 9,
            boot_hrtime: 5,
            hrtime: 10_000_000_000,
            hres_sec: 1_000_002,
            hres_ns: 0,
        };
        let moved = moved(&SAVED, &here).unwrap();
        assert_eq!(moved.guest_freq, 2_000_000_000);
        assert_eq!(moved.guest_tsc, 1000 + 3_000_000_000);
        // 30 s and 1.5 s before now, which is before this machine's own start.
        assert_eq!(moved.boot_hrtime, 10_000_000_000 - 31_500_000_000);
        assert_eq!((moved.hrtime, moved.hres_sec), (here.hrtime, here.hres_sec));
    }

    #[test]
    fn a_clock_that_went_back_counts_as_one_that_stood() {
        let here = VdiTimeInfo {
            hres_sec: 999_999,
            ..SAVED
        };
        let moved = moved(&SAVED, &here).unwrap();
        assert_eq!(
            (moved.guest_tsc, moved.boot_hrtime),
            (SAVED.guest_tsc, SAVED.boot_hrtime)
        );
    }

    #[test]
    fn times_out_of_range_are_refused() {
        let here = VdiTimeInfo {
            hres_sec: u64::MAX,
            ..SAVED
        };
        let error = moved(&SAVED, &here).map(drop).unwrap_err().to_string();
        assert!(error.contains("can't go on"), "{error}");
    }
}

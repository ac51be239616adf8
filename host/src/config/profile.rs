//! Profiles: sets of devices that a VM has without naming them, as data.

use super::devices::Device;
use crate::machine::Board;

/// A profile by name, with its TOML text.
pub type Profile = (&'static str, &'static str);

/// What `[main] profile` accepts. The first is the default.
pub const PROFILES: [Profile; 4] = [
    (
        "propolis",
        include_str!("../../../configs/profiles/propolis.toml"),
    ),
    (
        "minimal",
        include_str!("../../../configs/profiles/minimal.toml"),
    ),
    (
        MICROVM,
        include_str!("../../../configs/profiles/microvm.toml"),
    ),
    ("none", ""),
];

/// The profile whose board has no more than its devices need.
const MICROVM: &str = "microvm";

/// Whether the board of a VM with this profile has all that firmware for a PC looks for.
pub fn is_pc(profile: &str) -> bool {
    profile != MICROVM
}

/// What the board of a VM with this profile and these devices has.
pub fn board(profile: &str, devices: &[Device]) -> Board {
    if is_pc(profile) {
        return Board::default();
    }
    Board {
        legacy: false,
        ps2: false,
        pci: devices.iter().any(|device| device.config.pci.is_some()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::document::{self, Table};
    use super::super::source::Problems;
    use super::*;

    fn parse(text: &str) -> Table {
        let mut problems = Problems::default();
        let table = document::parse(text, 0, &mut problems);
        assert!(problems.list.is_empty(), "{:?}", problems.list);
        table
    }

    #[test]
    fn profiles_hold_devices_and_backends_only() {
        for (name, text) in PROFILES {
            for group in parse(text).keys() {
                assert!(
                    ["dev", "block_dev", "char_dev"].contains(&group.as_str()),
                    "{name}: {group}"
                );
            }
        }
    }
}

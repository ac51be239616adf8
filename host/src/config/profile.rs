//! Profiles: sets of devices that a VM has without naming them, as data.

use super::devices::Device;
use super::document::{Entry, Table, Value};
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

/// The tables that hold devices and backends, each with the key that says what its sub-tables are.
pub const SELECTORS: [(&str, &str); 3] = [
    ("dev", "driver"),
    ("block_dev", "type"),
    ("char_dev", "type"),
];

/// The user's tables over the profile's. A sub-table of both is merged key by key, unless the user's chooses another
/// driver or type: the profile's options would mean nothing to that.
pub fn merge(profile: Table, mut user: Table) -> Table {
    for (group, base) in profile {
        let Some((_, selector)) = SELECTORS.iter().find(|(name, _)| *name == group) else {
            continue;
        };
        match user.get_mut(&group).map(|entry| &mut entry.value) {
            None => {
                user.insert(group, base);
            }
            Some(Value::Table(over)) => {
                if let Value::Table(base) = base.value {
                    merge_group(base, over, selector);
                }
            }
            // Not a table: reported where the group is read.
            Some(_) => {}
        }
    }
    user
}

fn merge_group(base: Table, over: &mut Table, selector: &str) {
    for (name, entry) in base {
        match over.get_mut(&name).map(|entry| &mut entry.value) {
            None => {
                over.insert(name, entry);
            }
            Some(Value::Table(table)) => {
                if let Value::Table(base) = entry.value
                    && !replaces(table, &base, selector)
                {
                    for (key, value) in base {
                        table.entry(key).or_insert(value);
                    }
                }
            }
            Some(_) => {}
        }
    }
}

/// Whether `over` names another driver or type than `base`.
fn replaces(over: &Table, base: &Table, selector: &str) -> bool {
    let text = |entry: Option<&Entry>| match entry.map(|entry| &entry.value) {
        Some(Value::Text(text)) => Some(text.clone()),
        _ => None,
    };
    over.contains_key(selector) && text(over.get(selector)) != text(base.get(selector))
}

#[cfg(test)]
mod tests {
    use super::super::document;
    use super::super::source::Problems;
    use super::*;

    fn parse(text: &str) -> Table {
        let mut problems = Problems::default();
        let table = document::parse(text, 0, &mut problems);
        assert!(problems.list.is_empty(), "{:?}", problems.list);
        table
    }

    fn keys(table: &Table, group: &str, name: &str) -> Vec<String> {
        match table.get(group).map(|entry| &entry.value) {
            Some(Value::Table(table)) => match table.get(name).map(|entry| &entry.value) {
                Some(Value::Table(table)) => table.keys().cloned().collect(),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn profiles_hold_devices_and_backends_only() {
        for (name, text) in PROFILES {
            for group in parse(text).keys() {
                assert!(
                    SELECTORS.iter().any(|(known, _)| known == group),
                    "{name}: {group}"
                );
            }
        }
    }

    #[test]
    fn a_key_is_merged_and_another_type_replaces() {
        let profile =
            || parse("[char_dev.a]\ntype = \"one\"\npath = \"p\"\n[dev.d]\ndriver = \"x\"");
        let merged = merge(profile(), parse("[char_dev.a]\nwait = false"));
        assert_eq!(keys(&merged, "char_dev", "a"), ["path", "type", "wait"]);
        assert_eq!(keys(&merged, "dev", "d"), ["driver"]);
        let merged = merge(profile(), parse("[char_dev.a]\ntype = \"one\""));
        assert_eq!(keys(&merged, "char_dev", "a"), ["path", "type"]);
        let merged = merge(profile(), parse("[char_dev.a]\ntype = \"two\""));
        assert_eq!(keys(&merged, "char_dev", "a"), ["type"]);
    }
}

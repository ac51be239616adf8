//! Top-level tables that give options to all backends of one type, such as propolis's `[cloudinit]`.

use std::collections::BTreeMap;

use super::backends::{BackendId, BackendTable};
use super::document::{Table, Value};
use super::options::{self, OptionTable};
use super::source::{Problems, Span};
use super::spelling::misspelt;
use crate::plugins::manifest::Backend;
use crate::plugins::registry::BackendEntry;
use crate::plugins::schema::OptionValue;

/// Reads those tables of `root` that belong to a type in `sharing`, and adds what they give to `backends`. Reports backends
/// whose table is missing.
pub fn read(
    root: &Table,
    sharing: &[BackendEntry],
    backends: &mut BTreeMap<BackendId, BackendTable>,
    problems: &mut Problems,
) {
    for (_, schema, at) in users(backends) {
        let name = &schema.name;
        let known = std::iter::once(name.as_str());
        if !schema.shared.is_empty()
            && !root.contains_key(name)
            && !misspelt(name, root.keys(), known)
        {
            let text = format!("a backend of type \"{name}\" needs a table [{name}]");
            problems.error(at, text).absent();
        }
    }
    for entry in sharing {
        let schema = entry.backend();
        let name = schema.name.as_str();
        let Some(at) = root.get(name) else { continue };
        let Value::Table(table) = &at.value else {
            let found = at.value.describe();
            problems.error(at.at, format!("expected a table [{name}], found {found}"));
            continue;
        };
        let place = OptionTable {
            name,
            table,
            entry: at,
        };
        let values = options::read(place, name, &schema.shared, &[], problems);
        let mut used = false;
        for (config, other, _) in users(backends) {
            if (other.kind, &other.name) == (schema.kind, &schema.name) {
                config.extend(values.iter().cloned());
                used = true;
            }
        }
        if !used {
            let kind = schema.kind.table();
            let text = format!("[{name}] has no effect: no {kind} is of type \"{name}\"");
            problems.warning(at.key, text);
        }
    }
}

/// The options of each backend, its type, and where its table is.
fn users(
    backends: &mut BTreeMap<BackendId, BackendTable>,
) -> impl Iterator<Item = (&mut Vec<(String, OptionValue)>, &Backend, Span)> {
    backends.values_mut().filter_map(|table| {
        let config = table.config.as_mut()?;
        Some((&mut config.options, config.backend.backend(), table.at))
    })
}

//! The `[block_dev.NAME]` and `[char_dev.NAME]` tables.

use std::collections::BTreeMap;

use super::document::Table;
use super::options::{self, OptionTable};
use super::source::{Problems, Source, Span};
use super::values::Field;
use super::vm_config::{BackendConfig, Place};
use crate::plugins::registry::{BackendEntry, Registry};
use crate::plugins::schema::{BackendKind, OptionValue};

/// A backend's identity in a VM file.
pub type BackendId = (BackendKind, String);

/// A backend with the places that problems found later point to.
#[derive(Debug)]
pub struct BackendTable {
    /// The result; `None` if its type is unknown, which has been reported.
    pub config: Option<BackendConfig>,
    /// Where NAME is.
    pub at: Span,
    /// Where each key's value is.
    pub values: BTreeMap<String, Span>,
}

impl BackendTable {
    /// Whether several users may share it: nothing that one of them does changes what another sees.
    pub fn read_only(&self) -> bool {
        self.read_only_is(true)
    }

    /// Whether it is a disk whose `read_only` has this value; what has no such option is neither.
    pub fn read_only_is(&self, value: bool) -> bool {
        self.config.as_ref().is_some_and(|config| {
            config.kind == BackendKind::Block
                && config
                    .options
                    .contains(&("read_only".to_string(), OptionValue::Bool(value)))
        })
    }
}

/// Reads all backends of one kind.
pub fn read(
    kind: BackendKind,
    group: &Table,
    sources: &[Source],
    registry: &Registry,
    problems: &mut Problems,
) -> BTreeMap<BackendId, BackendTable> {
    let mut out = BTreeMap::new();
    for (name, entry) in group {
        options::check_name(kind.table(), name, entry, problems);
        let field = Field {
            table: kind.table(),
            name,
            entry,
        };
        let Some(table) = field.table(problems) else {
            continue;
        };
        let label = format!("{}.{name}", kind.table());
        let place = OptionTable {
            name: &label,
            table,
            entry,
        };
        let config = backend(kind, place, group, registry, problems).map(|backend| {
            let schema = backend.backend();
            let options = options::read(place, &schema.name, &schema.options, &["type"], problems);
            BackendConfig {
                kind,
                name: name.clone(),
                options,
                place: Place::of(entry.key, sources),
                backend,
            }
        });
        let table = BackendTable {
            config,
            at: entry.key,
            values: place.places(),
        };
        out.insert((kind, name.clone()), table);
    }
    out
}

fn backend(
    kind: BackendKind,
    place: OptionTable<'_>,
    others: &Table,
    registry: &Registry,
    problems: &mut Problems,
) -> Option<BackendEntry> {
    let Some(field) = place.field("type") else {
        place
            .lacks("type", others, problems)
            .help("`vmm-host plugins` lists the types");
        return None;
    };
    let name = field.name(problems)?;
    place.found(registry.backend(kind, name), field, problems)
}

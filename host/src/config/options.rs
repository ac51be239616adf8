//! Checks the options of one device or backend against its schema.

use std::collections::BTreeMap;

use super::document::{Entry, Table};
use super::source::{Problem, Problems, Span};
use super::spelling::{listed, misspelt, nearest, suggestion};
use super::values::Field;
use crate::plugins::registry::LookupError;
use crate::plugins::schema::{OptionSpec, OptionValue};

/// The table of a device or backend.
#[derive(Clone, Copy)]
pub struct OptionTable<'a> {
    /// As its header spells it: `dev.block0`.
    pub name: &'a str,
    /// The keys.
    pub table: &'a Table,
    /// The entry that holds the table.
    pub entry: &'a Entry,
}

impl<'a> OptionTable<'a> {
    /// The key `name`, if the table has it.
    pub fn field(&self, name: &'a str) -> Option<Field<'a>> {
        self.table.get(name).map(|entry| Field {
            table: self.name,
            name,
            entry,
        })
    }

    /// What a name in `field` stands for. If nothing can run it, that is reported, and it is known at best what its options
    /// are.
    pub fn found<E>(
        &self,
        entry: Result<E, LookupError<E>>,
        field: Field<'_>,
        problems: &mut Problems,
    ) -> Option<E> {
        let error = match entry {
            Ok(entry) => return Some(entry),
            Err(error) => error,
        };
        if error.searched {
            problems.lookup(field.entry.at, error.text, error.help);
        } else {
            let text = format!("[{}]: {}", self.name, error.text);
            problems.error(field.entry.at, text).help = error.help;
        }
        error.known
    }

    /// Reports that the table lacks the key that says what it is. One of the `others` beside it may be meant: a file that is
    /// laid over another changes a table by its name.
    pub fn lacks<'p>(
        &self,
        key: &str,
        others: &Table,
        problems: &'p mut Problems,
    ) -> &'p mut Problem {
        let text = format!("[{}] lacks the key `{key}`", self.name);
        let problem = problems.error(self.entry.key, text).absent();
        let (group, own) = self.name.split_once('.').unwrap_or_default();
        let known = others.keys().map(String::as_str);
        if let Some(other) = nearest(own, known.filter(|name| *name != own)) {
            problem.help(format!("did you mean [{group}.{other}]?"));
        }
        problem
    }

    /// Where each key's value is.
    pub fn places(&self) -> BTreeMap<String, Span> {
        self.table
            .iter()
            .map(|(key, entry)| (key.clone(), entry.at))
            .collect()
    }
}

/// Reads all options that `specs` declares, with defaults filled in, in the schema's order. Keys that are neither an
/// option of `owner` nor in `host_keys` are refused.
pub fn read<'a>(
    place: OptionTable<'a>,
    owner: &str,
    specs: &'a [OptionSpec],
    host_keys: &[&str],
    problems: &mut Problems,
) -> Vec<(String, OptionValue)> {
    let known = || {
        host_keys
            .iter()
            .copied()
            .chain(specs.iter().map(|spec| spec.name.as_str()))
    };
    for (key, entry) in place.table {
        if known().any(|name| name == key) {
            continue;
        }
        let problem = problems.error(entry.key, format!("[{}] has no key `{key}`", place.name));
        if let Some(help) = suggestion(key, known()) {
            problem.help(help);
        }
        problem.help(format!("{owner} accepts: {}", listed(known())));
    }
    let mut out = Vec::with_capacity(specs.len());
    for spec in specs {
        let value = match place.field(&spec.name) {
            Some(field) => spec.check(&field, problems),
            None if spec.required && misspelt(&spec.name, place.table.keys(), known()) => None,
            None if spec.required => {
                problems
                    .error(
                        place.entry.key,
                        format!("[{}] lacks the key `{}`", place.name, spec.name),
                    )
                    .help(format!("{owner} needs {}: {}", spec.accepted(), spec.about))
                    .absent();
                None
            }
            None => spec.default.clone(),
        };
        out.extend(value.map(|value| (spec.name.clone(), value)));
    }
    refuse_both(place, specs, problems);
    out
}

fn refuse_both(place: OptionTable<'_>, specs: &[OptionSpec], problems: &mut Problems) {
    for spec in specs {
        if let Some(other) = &spec.not_with
            && let Some(field) = place.field(&spec.name)
            && place.table.contains_key(other)
        {
            problems.error(
                field.entry.key,
                format!(
                    "[{}] has both `{}` and `{other}`: give one of them",
                    place.name, spec.name
                ),
            );
        }
    }
}

/// Whether a name of a table can be shown and typed: not empty, without control characters.
pub fn check_name(group: &str, name: &str, entry: &Entry, problems: &mut Problems) {
    if name.is_empty() || name.chars().any(char::is_control) {
        problems.error(
            entry.key,
            format!("a name in [{group}] must not be empty or hold control characters"),
        );
    }
}

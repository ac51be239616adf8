//! Which backend is used by whom: every name exists, nothing is used twice that can't be, nothing goes round in circles.

use std::collections::{BTreeMap, BTreeSet};

use super::backends::{BackendId, BackendTable};
use super::devices::Device;
use super::images;
use super::source::{Problems, Source, Span};
use super::spelling::{listed, suggestion};
use super::vm_config::{BackendConfig, Place};
use crate::plugins::schema::{OptionSpec, OptionValue};

type Backends = BTreeMap<BackendId, BackendTable>;

/// One option of type `ref:`.
struct Reference {
    /// The table that it is in.
    from: String,
    /// The option.
    key: String,
    /// Its value's place.
    at: Span,
    /// What it names.
    to: BackendId,
    /// What it names may not be written to.
    read_only: bool,
}

/// Checks all references and returns the backends in use, each after those that it refers to.
pub fn resolve(
    devices: &[Device],
    mut backends: Backends,
    sources: &[Source],
    problems: &mut Problems,
) -> Vec<BackendConfig> {
    let from_devices: Vec<Reference> = devices
        .iter()
        .flat_map(|device| {
            references(
                &device.config.label(),
                &device.config.driver.driver().options,
                &device.config.options,
                &device.values,
            )
        })
        .collect();
    let between: BTreeMap<BackendId, Vec<Reference>> = backends
        .iter()
        .map(|(id, table)| {
            let all = table.config.as_ref().map_or(Vec::new(), |config| {
                let specs = &config.backend.backend().options;
                references(&label(id), specs, &config.options, &table.values)
            });
            (id.clone(), all)
        })
        .collect();
    let all = || from_devices.iter().chain(between.values().flatten());
    for reference in all() {
        check_exists(reference, &backends, problems);
    }
    let mut walk = Walk {
        between: &between,
        state: BTreeMap::new(),
        order: Vec::new(),
        circles: BTreeSet::new(),
    };
    for reference in &from_devices {
        walk.visit(&reference.to, problems);
    }
    let used: BTreeSet<BackendId> = walk.order.iter().cloned().collect();
    let order = walk.order.clone();
    // Those that no device leads to are only looked at for circles.
    for id in between.keys() {
        walk.visit(id, problems);
    }
    let writable = writable(&walk.order, &between, &backends);
    let circles = walk.circles;
    let straight = all().filter(|reference| !circles.contains(&reference.at));
    check_shared(straight, &backends, &writable, sources, problems);
    images::check(&order, &backends, sources, problems);
    // A device that was refused may be the one that uses it.
    if !problems.any_error() {
        warn_of_unused(&backends, &used, problems);
    }
    order
        .iter()
        .filter_map(|id| backends.remove(id).and_then(|table| table.config))
        .collect()
}

fn label((kind, name): &BackendId) -> String {
    format!("{}.{name}", kind.table())
}

fn references(
    from: &str,
    specs: &[OptionSpec],
    options: &[(String, OptionValue)],
    places: &BTreeMap<String, Span>,
) -> Vec<Reference> {
    options
        .iter()
        .filter_map(|(key, value)| match value {
            OptionValue::Ref(kind, name) => Some(Reference {
                from: from.to_string(),
                key: key.clone(),
                at: places.get(key).copied().unwrap_or_default(),
                to: (*kind, name.clone()),
                read_only: specs.iter().any(|spec| spec.read_only && spec.name == *key),
            }),
            _ => None,
        })
        .collect()
}

fn check_exists(reference: &Reference, backends: &Backends, problems: &mut Problems) {
    if backends.contains_key(&reference.to) {
        return;
    }
    let (kind, name) = &reference.to;
    let known = || {
        backends
            .keys()
            .filter(|(other, _)| other == kind)
            .map(|(_, name)| name.as_str())
    };
    let problem = problems
        .error(
            reference.at,
            format!(
                "`{}` in [{}]: there is no [{}.{name}]",
                reference.key,
                reference.from,
                kind.table()
            ),
        )
        .absent();
    if let Some(help) = suggestion(name, known()) {
        problem.help(help);
    }
    problem.help(format!("[{}] has: {}", kind.table(), listed(known())));
}

/// The disks that can certainly be written to: those that say so, but for layers over one that can't be, which pass that on.
fn writable(
    order: &[BackendId],
    between: &BTreeMap<BackendId, Vec<Reference>>,
    backends: &Backends,
) -> BTreeSet<BackendId> {
    let mut writable = BTreeSet::new();
    for id in order {
        let itself = backends
            .get(id)
            .is_some_and(|table| table.read_only_is(false));
        let mut below = between.get(id).into_iter().flatten();
        // What must not be written to is not where this one's writes go.
        if itself && below.all(|reference| reference.read_only || writable.contains(&reference.to))
        {
            writable.insert(id.clone());
        }
    }
    writable
}

/// A second writer would corrupt a disk, a second reader would steal a console's input, and a base that is written to shows through.
fn check_shared<'a>(
    references: impl Iterator<Item = &'a Reference>,
    backends: &Backends,
    writable: &BTreeSet<BackendId>,
    sources: &[Source],
    problems: &mut Problems,
) {
    let mut users: BTreeMap<&BackendId, &Reference> = BTreeMap::new();
    for reference in references {
        let shareable = backends
            .get(&reference.to)
            .is_none_or(BackendTable::read_only);
        let Some(first) = users.get(&reference.to) else {
            users.insert(&reference.to, reference);
            if reference.read_only && writable.contains(&reference.to) {
                check_read_only(reference, problems);
            }
            continue;
        };
        if !shareable {
            problems
                .error(
                    reference.at,
                    format!(
                        "`{}` in [{}]: [{}] is already used by [{}]",
                        reference.key,
                        reference.from,
                        label(&reference.to),
                        first.from
                    ),
                )
                .help(format!("there: {}", Place::of(first.at, sources)))
                .help("only a block_dev with read_only = true can be shared");
        }
    }
}

fn check_read_only(reference: &Reference, problems: &mut Problems) {
    let (from, to) = (&reference.from, label(&reference.to));
    problems
        .error(
            reference.at,
            format!(
                "`{}` in [{from}]: [{to}] can be written to, and what is written there would show through",
                reference.key
            ),
        )
        .help(format!("set `read_only = true` in [{to}]"));
}

fn warn_of_unused(backends: &Backends, used: &BTreeSet<BackendId>, problems: &mut Problems) {
    for (id, table) in backends {
        // A profile's backend goes unused when the user's device takes another: as intended. It is source 1 or later.
        if !used.contains(id) && table.at.source == 0 {
            problems.warning(
                table.at,
                format!("[{}] is not used by any device", label(id)),
            );
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Visit {
    Open,
    Done,
}

/// A depth-first walk over references, which yields leaves first.
struct Walk<'a> {
    between: &'a BTreeMap<BackendId, Vec<Reference>>,
    state: BTreeMap<BackendId, Visit>,
    order: Vec<BackendId>,
    /// Where the references are that close a circle.
    circles: BTreeSet<Span>,
}

impl Walk<'_> {
    /// Visits what `start` leads to, then `start`. Keeps its own stack: the length of a chain is the user's choice.
    fn visit(&mut self, start: &BackendId, problems: &mut Problems) {
        if self.state.contains_key(start) || !self.between.contains_key(start) {
            return;
        }
        self.state.insert(start.clone(), Visit::Open);
        let mut stack = vec![(start.clone(), 0)];
        while let Some((id, next)) = stack.pop() {
            let between = self.between;
            let Some(reference) = between.get(&id).and_then(|all| all.get(next)) else {
                self.state.insert(id.clone(), Visit::Done);
                self.order.push(id);
                continue;
            };
            stack.push((id, next + 1));
            match self.state.get(&reference.to) {
                Some(Visit::Done) => {}
                Some(Visit::Open) => {
                    self.circles.insert(reference.at);
                    report_circle(reference, &stack, problems);
                }
                None if between.contains_key(&reference.to) => {
                    self.state.insert(reference.to.clone(), Visit::Open);
                    stack.push((reference.to.clone(), 0));
                }
                None => {}
            }
        }
    }
}

fn report_circle(closing: &Reference, stack: &[(BackendId, usize)], problems: &mut Problems) {
    let circle: Vec<String> = stack
        .iter()
        .map(|(id, _)| id)
        .skip_while(|id| **id != closing.to)
        .chain([&closing.to])
        .map(label)
        .collect();
    problems.error(
        closing.at,
        format!(
            "`{}` in [{}] closes a circle: {}",
            closing.key,
            closing.from,
            circle.join(" -> ")
        ),
    );
}

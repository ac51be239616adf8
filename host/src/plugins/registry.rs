//! Which plugin provides a name.
//!
//! Where two plugins claim one name, the one in the earlier directory of the search path has it, so that a user can put a
//! plugin of their own before ours. Within one directory there is no order to decide by, and the name is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use log::{debug, info, warn};

use super::known_names;
use super::manifest::{Backend, Driver, ManifestError};
use super::schema::BackendKind;
use super::search::{Directory, Found, Plugin, Skipped, Unsearchable};
use super::section::SectionError;
use crate::config::spelling::{listed, suggestion};
use crate::config::values::listed_or;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// After `driver =`.
    Driver,
    /// After `type =` in a table of this kind.
    Backend(BackendKind),
}

impl fmt::Display for Role {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Driver => write!(out, "driver"),
            Role::Backend(kind) => write!(out, "{} type", kind.table()),
        }
    }
}

/// A driver and the plugin that it is in.
#[derive(Clone, Debug)]
pub struct DriverEntry {
    /// The plugin to load.
    pub plugin: Arc<Plugin>,
    index: usize,
}

impl DriverEntry {
    /// What the plugin's manifest says about it.
    pub fn driver(&self) -> &Driver {
        &self.plugin.manifest.drivers[self.index]
    }
}

/// A backend type and the plugin that it is in.
#[derive(Clone, Debug)]
pub struct BackendEntry {
    /// The plugin to load.
    pub plugin: Arc<Plugin>,
    index: usize,
}

impl BackendEntry {
    /// What the plugin's manifest says about it.
    pub fn backend(&self) -> &Backend {
        &self.plugin.manifest.backends[self.index]
    }
}

/// The holders of one name: the plugin and its index there. More than one: all in one directory, nobody has the name.
type Holders = Vec<Holder>;
type Holder = (Arc<Plugin>, usize);

/// Why a name leads to no plugin: one line, and further lines that help.
#[derive(Debug)]
pub struct LookupError<E> {
    /// What is wrong.
    pub text: String,
    /// What was searched, what is there, the nearest name.
    pub help: Vec<String>,
    /// Whether another plugin might help.
    pub searched: bool,
    /// What the options are checked against all the same, if that is known. It is not to be loaded.
    pub known: Option<E>,
}

impl<E> LookupError<E> {
    fn map<F>(self, entry: impl FnOnce(E) -> F) -> LookupError<F> {
        LookupError {
            text: self.text,
            help: self.help,
            searched: self.searched,
            known: self.known.map(entry),
        }
    }
}

/// All names that the plugins found provide.
#[derive(Debug)]
pub struct Registry {
    found: Found,
    names: BTreeMap<Role, BTreeMap<String, Holders>>,
}

impl Registry {
    /// Gives each name to a plugin. Logs where the search order decided.
    pub fn new(found: Found) -> Registry {
        let mut registry = Registry {
            found,
            names: BTreeMap::new(),
        };
        for plugin in registry.found.plugins.clone() {
            for (index, driver) in plugin.manifest.drivers.iter().enumerate() {
                registry.claim(Role::Driver, &driver.name, &plugin, index);
            }
            for (index, backend) in plugin.manifest.backends.iter().enumerate() {
                registry.claim(Role::Backend(backend.kind), &backend.name, &plugin, index);
            }
        }
        registry
    }

    fn claim(&mut self, role: Role, name: &str, plugin: &Arc<Plugin>, index: usize) {
        let holders = self
            .names
            .entry(role)
            .or_default()
            .entry(name.to_string())
            .or_default();
        match holders.first() {
            Some((first, _)) if first.directory != plugin.directory => info!(
                "{role} {name} comes from {}, which is searched before {}",
                first.path.display(),
                plugin.path.display()
            ),
            _ => holders.push((plugin.clone(), index)),
        }
    }

    /// The plugin that provides a driver.
    pub fn driver(&self, name: &str) -> Result<DriverEntry, LookupError<DriverEntry>> {
        let entry = |(plugin, index)| DriverEntry { plugin, index };
        match self.holder(Role::Driver, name) {
            Ok(holder) => Ok(entry(holder)),
            Err(error) => Err(error.map(entry)),
        }
    }

    /// The plugin that provides a backend type.
    pub fn backend(
        &self,
        kind: BackendKind,
        name: &str,
    ) -> Result<BackendEntry, LookupError<BackendEntry>> {
        let entry = |(plugin, index)| BackendEntry { plugin, index };
        match self.holder(Role::Backend(kind), name) {
            Ok(holder) => Ok(entry(holder)),
            Err(error) => Err(error.map(entry)),
        }
    }

    /// The backend types with [`Backend::shared`] options: what plugins provide, and what is known besides.
    pub fn sharing(&self) -> Vec<BackendEntry> {
        let mut out = Vec::new();
        for kind in BackendKind::ALL {
            let role = Role::Backend(kind);
            let names: BTreeSet<&str> = self.names(role).chain(known_names::names(role)).collect();
            let entries = names.into_iter().filter_map(|name| {
                let entry = self.backend(kind, name);
                entry.map_or_else(|error| error.known, Some)
            });
            out.extend(entries.filter(|entry| !entry.backend().shared.is_empty()));
        }
        out
    }

    fn holder(&self, role: Role, name: &str) -> Result<Holder, LookupError<Holder>> {
        let holders = self.names.get(&role).and_then(|names| names.get(name));
        match holders.map(Vec::as_slice) {
            Some([one]) if runs_here(role, one) => Ok(one.clone()),
            Some([one]) => Err(elsewhere(role, name, one.clone())),
            Some([_, ..]) => Err(LookupError {
                text: format!("{role} \"{name}\" is claimed by two plugins in one directory"),
                help: holders
                    .into_iter()
                    .flatten()
                    .map(|(plugin, _)| format!("claimed by {}", plugin.path.display()))
                    .chain([
                        "remove one, or move it to a directory that is searched earlier or later"
                            .to_string(),
                    ])
                    .collect(),
                searched: true,
                known: None,
            }),
            _ => Err(match known_names::find(role, name) {
                Some(known) if !runs_here(role, &known) => elsewhere(role, name, known),
                known => self.unknown(role, name, known),
            }),
        }
    }

    fn unknown(&self, role: Role, name: &str, known: Option<Holder>) -> LookupError<Holder> {
        let provided: Vec<&str> = self.names(role).collect();
        let mut help = Vec::new();
        if let Some(holder) = &known {
            let about = described(role, holder).1;
            help.push(format!(
                "{about}: its options are checked, but this version has no plugin for it"
            ));
        } else {
            let names = provided.iter().copied().chain(known_names::names(role));
            help.extend(suggestion(name, names));
            // A disk type after `driver =` is a common confusion, and the other way round.
            let roles = [Role::Driver]
                .into_iter()
                .chain(BackendKind::ALL.map(Role::Backend));
            for other in roles.filter(|other| *other != role) {
                if self
                    .names(other)
                    .chain(known_names::names(other))
                    .any(|held| held == name)
                {
                    help.push(format!("\"{name}\" is a {other}"));
                }
            }
        }
        if help.is_empty() && !provided.is_empty() {
            help.push(format!("provided: {}", listed(provided)));
        }
        LookupError {
            text: format!("no plugin provides the {role} \"{name}\""),
            help,
            searched: true,
            known,
        }
    }

    /// Which directories were searched, what they provide, and which files were skipped: what to print once below
    /// lookup errors.
    pub fn search_notes(&self) -> Vec<String> {
        let mut out = Vec::new();
        for (index, directory) in self.found.directories.iter().enumerate() {
            let provided: Vec<String> = self
                .names
                .iter()
                .map(|(role, names)| {
                    let here = names.iter().filter(|(_, holders)| {
                        holders.iter().any(|(plugin, _)| plugin.directory == index)
                    });
                    (
                        role,
                        here.map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
                    )
                })
                .filter(|(_, names)| !names.is_empty())
                .map(|(role, names)| format!("{role} {}", names.join(", ")))
                .collect();
            let provided = match provided.join("; ") {
                none if none.is_empty() => "nothing".to_string(),
                some => some,
            };
            out.push(format!(
                "searched {} ({}): {}",
                directory.path.display(),
                directory.origin,
                provided
            ));
        }
        if self.found.plugins.is_empty() {
            out.push(
                "no plugin was found at all: name their directory with --plugin-path".to_string(),
            );
        }
        out.extend(
            self.found
                .skipped
                .iter()
                .map(|skipped| format!("skipped {skipped}")),
        );
        out
    }

    /// The names known for a role, in alphabetical order.
    pub fn names(&self, role: Role) -> impl Iterator<Item = &str> {
        self.names
            .get(&role)
            .into_iter()
            .flatten()
            .map(|(name, _)| name.as_str())
    }

    /// Names that several plugins of one directory claim, with those plugins.
    pub fn conflicts(&self) -> impl Iterator<Item = (Role, &str, Vec<&Plugin>)> {
        self.names.iter().flat_map(|(role, names)| {
            names
                .iter()
                .filter(|(_, holders)| holders.len() > 1)
                .map(|(name, holders)| {
                    let plugins = holders.iter().map(|(plugin, _)| plugin.as_ref()).collect();
                    (*role, name.as_str(), plugins)
                })
        })
    }

    /// All plugins found, in search order.
    pub fn plugins(&self) -> &[Arc<Plugin>] {
        &self.found.plugins
    }

    /// The directories that were searched.
    pub fn directories(&self) -> &[Directory] {
        &self.found.directories
    }

    /// Files that look like plugins and are not usable, with why.
    pub fn skipped(&self) -> &[Skipped] {
        &self.found.skipped
    }

    /// Logs the skipped files: a broken plugin is a warning, while other libraries may well live beside plugins.
    pub fn log_skipped(&self) {
        for skipped in &self.found.skipped {
            match skipped.why {
                ManifestError::Section(SectionError::NotPlugin) => debug!("skipped {skipped}"),
                _ => warn!("skipped {skipped}"),
            }
        }
    }

    /// Directories that a user named and that can't be searched.
    pub fn unsearchable(&self) -> &[Unsearchable] {
        &self.found.unsearchable
    }
}

/// The operating systems that a holder's name works on, and what it is.
fn described(role: Role, (plugin, index): &Holder) -> (&[String], &str) {
    match role {
        Role::Driver => {
            let driver = &plugin.manifest.drivers[*index];
            (&driver.os, &driver.about)
        }
        Role::Backend(_) => {
            let backend = &plugin.manifest.backends[*index];
            (&backend.os, &backend.about)
        }
    }
}

fn runs_here(role: Role, holder: &Holder) -> bool {
    let (os, _) = described(role, holder);
    os.is_empty() || os.iter().any(|os| os == std::env::consts::OS)
}

fn elsewhere(role: Role, name: &str, holder: Holder) -> LookupError<Holder> {
    let (os, about) = described(role, &holder);
    LookupError {
        text: format!(
            "the {role} \"{name}\" needs {}, and this is {}",
            listed_or(os),
            std::env::consts::OS
        ),
        help: vec![about.to_string()],
        searched: false,
        known: Some(holder),
    }
}

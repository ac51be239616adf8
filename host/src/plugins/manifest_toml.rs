//! Manifest text to [`Manifest`].

use std::collections::BTreeSet;

use super::manifest::{AbiVersion, Backend, BusKind, Driver, HOST_ABI, Manifest, ManifestError};
use super::schema::{BackendKind, OptionSpec, OptionType};
use crate::config::document::{self, Entry, Table, Value};
use crate::config::source::{Problems, Source, Span};
use crate::config::values::{Field, listed_or, refuse_unknown};

/// Keys that the host itself takes in the tables of devices and backends; no option may have such a name.
const HOST_KEYS: [&str; 4] = ["driver", "type", "pci-path", "on_fault"];

/// What a `type` may be. The second part is for names without a plugin: no value of such a type can be handed to one.
const OPTION_TYPES: ([&str; 10], [&str; 4]) = (
    [
        "bool",
        "u32",
        "u64",
        "size",
        "string",
        "path",
        "readable",
        "enum",
        "ref:block",
        "ref:char",
    ],
    ["seconds", "address", "addresses", "tables"],
);

/// Checks the manifest text of a plugin.
pub fn parse(text: impl Into<String>) -> Result<Manifest, ManifestError> {
    read(text.into(), false)
}

/// Checks text in the form of a manifest about drivers and backends that need not have a plugin.
pub fn parse_names(text: impl Into<String>) -> Result<Manifest, ManifestError> {
    read(text.into(), true)
}

fn read(text: String, names_only: bool) -> Result<Manifest, ManifestError> {
    let mut problems = Problems::default();
    let root = document::parse(&text, 0, &mut problems);
    let mut reader = Reader {
        problems,
        strict: true,
        names_only,
    };
    let abi = reader.abi(&root);
    // The version comes first: text for another ABI may well look malformed here.
    if let Some(plugin) = abi
        && plugin.major != HOST_ABI.major
    {
        return Err(ManifestError::Abi {
            plugin,
            host: HOST_ABI,
        });
    }
    // A plugin for a later minor version may say things about itself that this host need not understand.
    reader.strict = abi.is_none_or(|abi| abi <= HOST_ABI);
    let mut manifest = reader.manifest(abi.unwrap_or(HOST_ABI), &root);
    let mut errors = reader.problems.list;
    errors.sort_by_key(|problem| problem.at);
    match errors.first() {
        None => {
            manifest.source = text;
            Ok(manifest)
        }
        Some(first) => {
            let source = Source {
                name: String::new(),
                text,
            };
            Err(ManifestError::Malformed {
                line: source.line(first.at.map_or(0, |at| at.start)),
                text: first.text.clone(),
                more: errors.len() - 1,
            })
        }
    }
}

struct Reader {
    problems: Problems,
    /// Whether a key that this host does not know is an error.
    strict: bool,
    /// Whether no plugin is behind the text.
    names_only: bool,
}

/// A table of the manifest with its name for messages and its place.
#[derive(Clone, Copy)]
struct Place<'a> {
    name: &'a str,
    table: &'a Table,
    at: Span,
}

impl<'a> Place<'a> {
    fn field(&self, name: &'a str) -> Option<Field<'a>> {
        self.table.get(name).map(|entry| Field {
            table: self.name,
            name,
            entry,
        })
    }
}

impl Reader {
    fn abi(&mut self, root: &Table) -> Option<AbiVersion> {
        let field = Place {
            name: "manifest",
            table: root,
            at: Span::default(),
        }
        .field("abi");
        let Some(field) = field else {
            self.problems
                .error(Span::default(), "no `abi`, the version of the plugin ABI");
            return None;
        };
        let version = field
            .text(&mut self.problems)?
            .split_once('.')
            .and_then(|(major, minor)| {
                Some(AbiVersion {
                    major: major.parse().ok()?,
                    minor: minor.parse().ok()?,
                })
            });
        if version.is_none() {
            field.expected("a version such as \"1.0\"", &mut self.problems);
        }
        version
    }

    fn manifest(&mut self, abi: AbiVersion, root: &Table) -> Manifest {
        let place = Place {
            name: "manifest",
            table: root,
            at: Span::default(),
        };
        self.known(
            place,
            &[
                "abi", "name", "version", "license", "about", "driver", "block", "char",
            ],
        );
        let drivers = self.each(place, "driver", Reader::driver);
        let mut backends = Vec::new();
        for kind in BackendKind::ALL {
            backends.extend(self.each(place, kind.word(), |reader, place| {
                reader.backend(place, kind)
            }));
        }
        self.unique(place, "driver", drivers.iter().map(|driver| &driver.name));
        for kind in BackendKind::ALL {
            let names = backends
                .iter()
                .filter(|backend: &&Backend| backend.kind == kind)
                .map(|backend| &backend.name);
            self.unique(place, kind.word(), names);
        }
        Manifest {
            abi,
            name: self.name(place),
            version: self.text(place, "version"),
            license: self.text(place, "license"),
            about: self.text(place, "about"),
            drivers,
            backends,
            source: String::new(),
        }
    }

    fn driver(&mut self, place: Place<'_>) -> Driver {
        self.known(
            place,
            &["name", "about", "bus", "os", "state", "state_min", "option"],
        );
        let bus = match place.field("bus") {
            Some(field) => match field.word(&["isa", "pci"], &mut self.problems) {
                Some("pci") => BusKind::Pci,
                _ => BusKind::Isa,
            },
            None => {
                self.problems.error(place.at, "a driver without `bus`");
                BusKind::Isa
            }
        };
        let options = self.options(place);
        if options.iter().any(|option| option.shared) {
            self.problems
                .error(place.at, "an option of a driver can't be `shared`");
        }
        Driver {
            name: self.name(place),
            about: self.text(place, "about"),
            bus,
            os: self.os(place),
            options,
            state: self.state(place),
        }
    }

    fn state(&mut self, place: Place<'_>) -> Option<(u32, u32)> {
        let current = self.u32(place, "state", u32::MAX);
        let oldest = self.u32(place, "state_min", current.unwrap_or(0));
        current.map(|current| (oldest.unwrap_or(current), current))
    }

    fn u32(&mut self, place: Place<'_>, key: &str, max: u32) -> Option<u32> {
        let number = place
            .field(key)?
            .integer(1, u64::from(max), &mut self.problems)?;
        u32::try_from(number).ok()
    }

    fn backend(&mut self, place: Place<'_>, kind: BackendKind) -> Backend {
        self.known(place, &["name", "about", "os", "option"]);
        let (shared, options) = self
            .options(place)
            .into_iter()
            .partition(|option| option.shared);
        Backend {
            name: self.name(place),
            about: self.text(place, "about"),
            kind,
            os: self.os(place),
            options,
            shared,
        }
    }

    fn flag(&mut self, place: Place<'_>, key: &str) -> bool {
        place
            .field(key)
            .and_then(|field| field.boolean(&mut self.problems))
            .unwrap_or(false)
    }

    fn os(&mut self, place: Place<'_>) -> Vec<String> {
        let Some(field) = place.field("os") else {
            return Vec::new();
        };
        let words = field.texts(&mut self.problems).unwrap_or_default();
        words.iter().map(|(_, word)| word.to_string()).collect()
    }

    fn options(&mut self, place: Place<'_>) -> Vec<OptionSpec> {
        let specs: Vec<OptionSpec> = self
            .each(place, "option", Reader::option)
            .into_iter()
            .flatten()
            .collect();
        self.unique(place, "option", specs.iter().map(|spec| &spec.name));
        for other in specs.iter().filter_map(|spec| spec.not_with.as_ref()) {
            if !specs.iter().any(|spec| spec.name == *other) {
                self.problems
                    .error(place.at, format!("`not_with` names no option: `{other}`"));
            }
        }
        specs
    }

    fn unique<'n>(
        &mut self,
        place: Place<'_>,
        what: &str,
        names: impl Iterator<Item = &'n String>,
    ) {
        let mut seen = BTreeSet::new();
        for name in names {
            if !seen.insert(name) {
                self.problems
                    .error(place.at, format!("two [[{what}]] are named `{name}`"));
            }
        }
    }

    fn option(&mut self, place: Place<'_>) -> Option<OptionSpec> {
        self.known(
            place,
            &[
                "name",
                "type",
                "required",
                "default",
                "range",
                "values",
                "about",
                "shared",
                "not_with",
                "read_only",
                "image",
                "option",
            ],
        );
        let name = self.name(place);
        if HOST_KEYS.contains(&name.as_str()) {
            self.problems.error(
                place.at,
                format!("an option can't be named `{name}`: the host takes that key"),
            );
        }
        let Some(kind) = place.field("type") else {
            self.problems.error(place.at, "an option without `type`");
            return None;
        };
        let mut spec = OptionSpec {
            name,
            about: self.text(place, "about"),
            kind: self.option_type(place, kind)?,
            required: self.flag(place, "required"),
            default: None,
            range: None,
            shared: self.flag(place, "shared"),
            not_with: place
                .field("not_with")
                .map(|_| self.text(place, "not_with")),
            read_only: self.flag(place, "read_only"),
            image: self.flag(place, "image"),
        };
        for (key, given, fits) in [
            (
                "read_only",
                spec.read_only,
                spec.kind == OptionType::Ref(BackendKind::Block),
            ),
            ("image", spec.image, spec.kind == OptionType::Path),
        ] {
            if given && !fits {
                let text = format!("`{key}` on an option of type {}", spec.kind);
                self.problems.error(place.at, text);
            }
        }
        spec.range = self.range(place, &spec.kind);
        if let Some(field) = place.field("default") {
            if spec.required {
                field.expected("no default for a required option", &mut self.problems);
            } else if matches!(spec.kind, OptionType::Ref(_) | OptionType::Readable) {
                field.expected("no default for such a type", &mut self.problems);
            } else {
                spec.default = spec.check(&field, &mut self.problems);
            }
        }
        Some(spec)
    }

    fn option_type(&mut self, place: Place<'_>, field: Field<'_>) -> Option<OptionType> {
        let values = place.field("values");
        let (any, unplugged) = OPTION_TYPES;
        let unplugged = unplugged.into_iter().filter(|_| self.names_only);
        let types: Vec<&str> = any.into_iter().chain(unplugged).collect();
        let word = field.word(&types, &mut self.problems)?;
        if word == "enum" {
            let Some(values) = values else {
                self.problems.error(place.at, "an enum without `values`");
                return None;
            };
            let words = values.texts(&mut self.problems)?;
            return Some(OptionType::Enum(
                words
                    .into_iter()
                    .map(|(_, word)| word.to_string())
                    .collect(),
            ));
        }
        if let Some(values) = values {
            values.expected("`values` for the type enum only", &mut self.problems);
        }
        Some(match word {
            "bool" => OptionType::Bool,
            "u32" => OptionType::U32,
            "u64" => OptionType::U64,
            "size" => OptionType::Size,
            "string" => OptionType::Text,
            "path" => OptionType::Path,
            "readable" => OptionType::Readable,
            "seconds" => OptionType::Seconds,
            "address" => OptionType::Address,
            "addresses" => OptionType::Addresses,
            "tables" => OptionType::Tables(self.options(place)),
            "ref:block" => OptionType::Ref(BackendKind::Block),
            _ => OptionType::Ref(BackendKind::Char),
        })
    }

    fn range(&mut self, place: Place<'_>, kind: &OptionType) -> Option<(u64, u64)> {
        let field = place.field("range")?;
        let bound = |value: &Value| match value {
            Value::Int(number) => u64::try_from(*number).ok(),
            Value::Text(text) => crate::config::values::parse_size(text),
            _ => None,
        };
        let numeric = matches!(
            kind,
            OptionType::U32 | OptionType::U64 | OptionType::Size | OptionType::Addresses
        );
        if numeric
            && let Value::Array(items) = &field.entry.value
            && let [(_, min), (_, max)] = items.as_slice()
            && let (Some(min), Some(max)) = (bound(min), bound(max))
            && min <= max
        {
            return Some((min, max));
        }
        let what = "[min, max] on an option of type u32, u64 or size";
        field.expected(what, &mut self.problems);
        None
    }

    /// Reads each table of the array `key`.
    fn each<T>(
        &mut self,
        place: Place<'_>,
        key: &str,
        mut read: impl FnMut(&mut Reader, Place<'_>) -> T,
    ) -> Vec<T> {
        let Some(Entry { value, at, .. }) = place.table.get(key) else {
            return Vec::new();
        };
        let Value::Array(items) = value else {
            self.problems
                .error(*at, format!("`{key}` must be written as [[{key}]]"));
            return Vec::new();
        };
        let mut out = Vec::with_capacity(items.len());
        for (at, item) in items {
            match item {
                Value::Table(table) => out.push(read(
                    self,
                    Place {
                        name: key,
                        table,
                        at: *at,
                    },
                )),
                other => {
                    let found = other.describe();
                    self.problems
                        .error(*at, format!("expected a table in `{key}`, found {found}"));
                }
            }
        }
        out
    }

    fn known(&mut self, place: Place<'_>, keys: &[&str]) {
        if self.strict {
            refuse_unknown(place.name, place.table, keys, &mut self.problems);
        }
    }

    /// The table's `name`: letters, digits, `-`, `_` and `.`, so that it can be typed in a VM file and shown anywhere.
    fn name(&mut self, place: Place<'_>) -> String {
        let Some(field) = place.field("name") else {
            self.problems
                .error(place.at, format!("[{}] without `name`", place.name));
            return String::new();
        };
        let text = field.name(&mut self.problems).unwrap_or("");
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if !text.chars().all(plain) {
            let what = ["letters", "digits", "`-`", "`_`", "`.`"].map(String::from);
            field.expected(&format!("only {}", listed_or(&what)), &mut self.problems);
        }
        text.to_string()
    }

    /// A text shown to users: one line, without control characters. Empty if absent.
    fn text(&mut self, place: Place<'_>, key: &str) -> String {
        let Some(field) = place.field(key) else {
            return String::new();
        };
        let text = field.text(&mut self.problems).unwrap_or("");
        let mut line = String::with_capacity(text.len());
        for word in text.split_whitespace() {
            if !line.is_empty() {
                line.push(' ');
            }
            match word.contains(char::is_control) {
                true => line += &word.replace(char::is_control, "\u{fffd}"),
                false => line += word,
            }
        }
        line
    }
}

#[cfg(test)]
mod tests;

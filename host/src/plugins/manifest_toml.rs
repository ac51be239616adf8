//! Manifest text to [`Manifest`].

use std::collections::BTreeSet;

use super::manifest::{AbiVersion, Backend, BusKind, Driver, HOST_ABI, Manifest, ManifestError};
use super::schema::{BackendKind, OptionSpec, OptionType};
use crate::config::document::{self, Entry, Table, Value};
use crate::config::source::{Problems, Source, Span};
use crate::config::values::{Field, listed_or, refuse_unknown};

/// Keys that the host itself takes in the tables of devices and backends; no option may have such a name.
const HOST_KEYS: [&str; 4] = ["driver", "type", "pci-path", "on_fault"];

const OPTION_TYPES: [&str; 9] = [
    "bool",
    "u32",
    "u64",
    "size",
    "string",
    "path",
    "enum",
    "ref:block",
    "ref:char",
];

/// Checks manifest text.
pub fn parse(text: impl Into<String>) -> Result<Manifest, ManifestError> {
    let text = text.into();
    let mut problems = Problems::default();
    let root = document::parse(&text, 0, &mut problems);
    let mut reader = Reader {
        problems,
        strict: true,
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
            &["name", "about", "bus", "state", "state_min", "option"],
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
        Driver {
            name: self.name(place),
            about: self.text(place, "about"),
            bus,
            options: self.options(place),
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
        self.known(place, &["name", "about", "option"]);
        Backend {
            name: self.name(place),
            about: self.text(place, "about"),
            kind,
            options: self.options(place),
        }
    }

    fn options(&mut self, place: Place<'_>) -> Vec<OptionSpec> {
        let specs: Vec<OptionSpec> = self
            .each(place, "option", Reader::option)
            .into_iter()
            .flatten()
            .collect();
        self.unique(place, "option", specs.iter().map(|spec| &spec.name));
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
                "name", "type", "required", "default", "range", "values", "about",
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
            required: place
                .field("required")
                .and_then(|field| field.boolean(&mut self.problems))
                .unwrap_or(false),
            default: None,
            range: None,
        };
        spec.range = self.range(place, &spec.kind);
        if let Some(field) = place.field("default") {
            if spec.required {
                field.expected("no default for a required option", &mut self.problems);
            } else if matches!(spec.kind, OptionType::Ref(_)) {
                field.expected("no default for a reference", &mut self.problems);
            } else {
                spec.default = spec.check(&field, &mut self.problems);
            }
        }
        Some(spec)
    }

    fn option_type(&mut self, place: Place<'_>, field: Field<'_>) -> Option<OptionType> {
        let values = place.field("values");
        let word = field.word(&OPTION_TYPES, &mut self.problems)?;
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
        let numeric = matches!(kind, OptionType::U32 | OptionType::U64 | OptionType::Size);
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
        text.split_whitespace()
            .map(|word| word.replace(char::is_control, "\u{fffd}"))
            .collect::<Vec<_>>()
            .join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::schema::OptionValue;

    const GOOD: &str = r#"
abi = "1.0"
name = "store"
version = "0.3.1"
license = "MIT"
[[driver]]
name = "pci-store"
bus = "pci"
state = 3
state_min = 2
[[driver.option]]
name = "queues"
type = "u32"
range = [1, 64]
default = 8
[[driver.option]]
name = "block_dev"
type = "ref:block"
required = true
[[block]]
name = "ram"
[[block.option]]
name = "size"
type = "size"
default = "16M"
"#;

    fn refusal(text: &str) -> String {
        parse(text).map_or_else(|error| error.to_string(), |_| panic!("accepted: {text}"))
    }

    #[test]
    fn a_manifest_is_read_with_its_schema() {
        let manifest = parse(GOOD).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(manifest.drivers[0].bus, BusKind::Pci);
        assert_eq!(manifest.drivers[0].state, Some((2, 3)));
        assert_eq!(
            manifest.drivers[0].options[0].default,
            Some(OptionValue::Int(8))
        );
        assert_eq!(manifest.drivers[0].options[0].range, Some((1, 64)));
        assert_eq!(
            manifest.backends[0].options[0].default,
            Some(OptionValue::Int(16 << 20))
        );
    }

    #[test]
    fn each_slip_is_refused_with_its_line() {
        for (old, new, expected) in [
            (
                "range = [1, 64]",
                "range = [64, 1]",
                "line 14: `range` in [option]: expected [min, max]",
            ),
            (
                "default = 8",
                "default = 99",
                "line 15: `default` in [option]: expected an integer from 1 to 64",
            ),
            (
                "type = \"u32\"",
                "type = \"u31\"",
                "line 13: `type` in [option]: expected",
            ),
            (
                "bus = \"pci\"",
                "bsu = \"pci\"",
                "line 6: a driver without `bus` (and 1 more)",
            ),
            (
                "name = \"queues\"",
                "name = \"driver\"",
                "can't be named `driver`",
            ),
            (
                "required = true",
                "required = true\ndefault = \"x\"",
                "no default for a required option",
            ),
            (
                "state_min = 2",
                "state_min = 4",
                "expected an integer from 1 to 3",
            ),
            ("name = \"ram\"", "name = \"r am\"", "expected only letters"),
            ("[[block]]", "[[block", "malformed, line 20"),
            (
                "name = \"block_dev\"",
                "name = \"queues\"",
                "two [[option]] are named `queues`",
            ),
        ] {
            assert!(GOOD.contains(old), "{old}");
            let text = refusal(&GOOD.replace(old, new));
            assert!(text.contains(expected), "{new}: {text}");
            assert_eq!(text.lines().count(), 1, "{text}");
        }
    }

    #[test]
    fn another_major_version_is_refused_before_anything_else() {
        let text = refusal("abi = \"2.0\"\nwhatever = 1");
        assert_eq!(
            text,
            "built for plugin ABI 2.0, this host has ABI 1.0: it needs a newer vmm-host"
        );
        assert!(refusal("abi = \"0.9\"").contains("build it against a newer vmm-plugin-api"));
    }

    #[test]
    fn a_later_minor_version_may_say_more() {
        let text = GOOD.replace("abi = \"1.0\"", "abi = \"1.7\"\nsandbox = \"net\"");
        assert!(parse(&text).is_ok());
        assert!(refusal(&text.replace("1.7", "1.0")).contains("has no key `sandbox`"));
    }
}

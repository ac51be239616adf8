//! The options that a driver or backend takes, as its manifest declares them, and the check of a value against them.

use std::fmt;
use std::net::SocketAddr;

use crate::config::boot::readable;
use crate::config::document::{Entry, Value};
use crate::config::options;
use crate::config::source::{Problems, Span};
use crate::config::values::{Field, listed_or, range_text, size_text};

/// What kind of backend a table describes or an option refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackendKind {
    /// `[block_dev.X]`, `ref:block`.
    Block,
    /// `[char_dev.X]`, `ref:char`.
    Char,
}

impl BackendKind {
    /// All of them.
    pub const ALL: [BackendKind; 2] = [BackendKind::Block, BackendKind::Char];

    /// The table of a VM file whose sub-tables are backends of this kind.
    pub fn table(self) -> &'static str {
        match self {
            BackendKind::Block => "block_dev",
            BackendKind::Char => "char_dev",
        }
    }

    /// The word in a manifest: `[[block]]`, `ref:block`.
    pub fn word(self) -> &'static str {
        match self {
            BackendKind::Block => "block",
            BackendKind::Char => "char",
        }
    }
}

const EXAMPLE: &str = "such as \"127.0.0.1:3810\"";

/// The type of an option's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionType {
    /// `true` or `false`.
    Bool,
    /// An integer below 2^32.
    U32,
    /// An integer below 2^64 (TOML itself ends at 2^63 - 1).
    U64,
    /// A number of bytes: an integer, or a string such as "512M".
    Size,
    /// Any string.
    Text,
    /// A file name, relative to the working directory of the host.
    Path,
    /// Likewise, of a file that can be read when the VM file is checked.
    Readable,
    /// One of these words.
    Enum(Vec<String>),
    /// The name of a backend's table.
    Ref(BackendKind),
    /// A number of seconds. This and what follows is checked and then has no [`OptionValue`].
    Seconds,
    /// An IP address and a port.
    Address,
    /// An array of those, whose length is in the range.
    Addresses,
    /// An array of tables with these keys.
    Tables(Vec<OptionSpec>),
}

impl fmt::Display for OptionType {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OptionType::Bool => write!(out, "bool"),
            OptionType::U32 => write!(out, "u32"),
            OptionType::U64 => write!(out, "u64"),
            OptionType::Size => write!(out, "size"),
            OptionType::Text => write!(out, "string"),
            OptionType::Path => write!(out, "path"),
            OptionType::Readable => write!(out, "readable"),
            OptionType::Enum(_) => write!(out, "enum"),
            OptionType::Ref(kind) => write!(out, "ref:{}", kind.word()),
            OptionType::Seconds => write!(out, "seconds"),
            OptionType::Address => write!(out, "address"),
            OptionType::Addresses => write!(out, "addresses"),
            OptionType::Tables(_) => write!(out, "tables"),
        }
    }
}

/// A checked value of an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionValue {
    /// Of type bool.
    Bool(bool),
    /// Of type u32, u64 or size (bytes).
    Int(u64),
    /// Of type string, path, readable or enum.
    Text(String),
    /// The backend's kind and the name of its table.
    Ref(BackendKind, String),
}

impl fmt::Display for OptionValue {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OptionValue::Bool(value) => write!(out, "{value}"),
            OptionValue::Int(value) => write!(out, "{value}"),
            OptionValue::Text(text) => write!(out, "{text:?}"),
            OptionValue::Ref(kind, name) => write!(out, "{}.{name}", kind.table()),
        }
    }
}

/// One option of a driver or backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionSpec {
    /// The key, as in the VM file.
    pub name: String,
    /// What it does, in a sentence.
    pub about: String,
    /// The type of its value.
    pub kind: OptionType,
    /// Whether a VM file must give it.
    pub required: bool,
    /// What the plugin gets when the VM file does not give it. Without a default it then gets nothing.
    pub default: Option<OptionValue>,
    /// The smallest and largest value, for integers and sizes; for an array, its length.
    pub range: Option<(u64, u64)>,
    /// Whether a top-level table gives it, for all backends of the type.
    pub shared: bool,
    /// Another option that can't be given as well.
    pub not_with: Option<String>,
    /// What the reference names may not be written to: the backend relies on it.
    pub read_only: bool,
    /// The path is a disk image that belongs to one backend, or to several that only read it.
    pub image: bool,
}

impl OptionSpec {
    /// Checks a value against type, range and words; `None` if a problem was reported, or if the type has no values for
    /// plugins.
    pub fn check(&self, field: &Field<'_>, problems: &mut Problems) -> Option<OptionValue> {
        let (min, max) = self.range.unwrap_or((0, u64::MAX));
        match &self.kind {
            OptionType::Bool => field.boolean(problems).map(OptionValue::Bool),
            OptionType::U32 => field
                .integer(min, max.min(u64::from(u32::MAX)), problems)
                .map(OptionValue::Int),
            OptionType::U64 => field.integer(min, max, problems).map(OptionValue::Int),
            OptionType::Size => field.size(1, min, max, problems).map(OptionValue::Int),
            OptionType::Text => field
                .text(problems)
                .map(|text| OptionValue::Text(text.to_string())),
            OptionType::Path => field
                .name(problems)
                .map(|text| OptionValue::Text(text.to_string())),
            OptionType::Readable => readable(field, problems).and_then(|path| {
                path.to_str()
                    .map(|path| OptionValue::Text(path.to_string()))
            }),
            OptionType::Enum(words) => {
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                field
                    .word(&words, problems)
                    .map(|word| OptionValue::Text(word.to_string()))
            }
            OptionType::Ref(kind) => match &field.entry.value {
                Value::Text(name) if !name.is_empty() => {
                    Some(OptionValue::Ref(*kind, name.clone()))
                }
                _ => {
                    field.expected(&self.accepted(), problems);
                    None
                }
            },
            OptionType::Seconds | OptionType::Address => {
                if !self.fits(&field.entry.value) {
                    field.expected(&self.accepted(), problems);
                }
                None
            }
            OptionType::Addresses => {
                self.check_addresses(field, problems);
                None
            }
            OptionType::Tables(specs) => {
                self.check_tables(specs, field, problems);
                None
            }
        }
    }

    fn fits(&self, value: &Value) -> bool {
        match (&self.kind, value) {
            (OptionType::Seconds, Value::Int(number)) => *number >= 0,
            (OptionType::Seconds, Value::Float(number)) => number.is_finite() && *number >= 0.0,
            (OptionType::Seconds, _) => false,
            (_, Value::Text(text)) => text.parse::<SocketAddr>().is_ok(),
            _ => false,
        }
    }

    fn check_addresses(&self, field: &Field<'_>, problems: &mut Problems) {
        let (min, max) = self.range.unwrap_or((0, u64::MAX));
        let Value::Array(items) = &field.entry.value else {
            field.expected(&self.accepted(), problems);
            return;
        };
        for (at, item) in items.iter().filter(|(_, item)| !self.fits(item)) {
            self.refuse_item(field, &format!("an address {EXAMPLE}"), *at, item, problems);
        }
        if !(min..=max).contains(&(items.len() as u64)) {
            let found = format!("the array has {}", items.len());
            field.expected(&self.accepted(), problems).help(found);
        }
    }

    fn refuse_item(
        &self,
        field: &Field<'_>,
        what: &str,
        at: Span,
        item: &Value,
        problems: &mut Problems,
    ) {
        let (key, table, found) = (&self.name, field.table, item.describe());
        problems.error(
            at,
            format!("`{key}` in [{table}]: expected {what}, found {found}"),
        );
    }

    fn check_tables(&self, specs: &[OptionSpec], field: &Field<'_>, problems: &mut Problems) {
        let Value::Array(items) = &field.entry.value else {
            field.expected(&self.accepted(), problems);
            return;
        };
        let name = format!("{}.{}", field.table, self.name);
        for (at, item) in items {
            let entry = Entry {
                key: *at,
                at: *at,
                value: item.clone(),
            };
            let Value::Table(table) = &entry.value else {
                self.refuse_item(field, "a table", *at, item, problems);
                continue;
            };
            let place = options::OptionTable {
                name: &name,
                table,
                entry: &entry,
            };
            options::read(place, &self.name, specs, &[], problems);
        }
    }

    /// What values are accepted, in words.
    pub fn accepted(&self) -> String {
        let (min, max) = self.range.unwrap_or((0, u64::MAX));
        match &self.kind {
            OptionType::Bool => "`true` or `false`".to_string(),
            OptionType::U32 => range_text(min, max.min(u64::from(u32::MAX))),
            OptionType::U64 => range_text(min, max),
            OptionType::Size if self.range.is_some() => {
                format!("a size from {} to {}", size_text(min), size_text(max))
            }
            OptionType::Size => "a size".to_string(),
            OptionType::Text => "a string".to_string(),
            OptionType::Path | OptionType::Readable => "a file name".to_string(),
            OptionType::Enum(words) => {
                let quoted: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
                listed_or(&quoted)
            }
            OptionType::Ref(kind) => format!("the name of a [{}] table", kind.table()),
            OptionType::Seconds => "a number of seconds".to_string(),
            OptionType::Address => format!("an address {EXAMPLE}"),
            OptionType::Addresses if min == max => {
                format!("an array of {min} addresses {EXAMPLE}")
            }
            OptionType::Addresses => format!("an array of addresses {EXAMPLE}"),
            OptionType::Tables(_) => "an array of tables".to_string(),
        }
    }

    /// The default as it would be written in a VM file; empty if there is none.
    pub fn default_text(&self) -> String {
        match (&self.kind, &self.default) {
            (OptionType::Size, Some(OptionValue::Int(bytes)))
                if bytes % 1024 == 0 && *bytes != 0 =>
            {
                format!("{:?}", size_text(*bytes))
            }
            (_, Some(value)) => value.to_string(),
            (_, None) => String::new(),
        }
    }
}

//! TOML text as a tree of values that know where they were written.

use std::collections::BTreeMap;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::source::{Problems, Span};

/// A table: its keys in alphabetical order.
pub type Table = BTreeMap<String, Entry>;

/// A key with its value.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where the key is: for a `[table]`, its name in the header.
    pub key: Span,
    /// Where the value is.
    pub at: Span,
    /// The value.
    pub value: Value,
}

/// A TOML value, reduced to what configuration uses.
#[derive(Clone, Debug)]
pub enum Value {
    /// A string.
    Text(String),
    /// An integer. Wider than TOML's, so that a value out of range is reported as such.
    Int(i128),
    /// A float.
    Float(f64),
    /// `true` or `false`.
    Bool(bool),
    /// An array.
    Array(Vec<(Span, Value)>),
    /// A table, inline or not.
    Table(Table),
    /// What no key takes: a date.
    Other(&'static str),
}

impl Value {
    /// What to call it in "expected X, found Y".
    pub fn describe(&self) -> String {
        match self {
            Value::Text(text) if text.len() <= 60 => format!("the string {text:?}"),
            Value::Text(_) => "a long string".to_string(),
            Value::Int(number) => format!("the integer {number}"),
            Value::Float(number) => format!("the float {number}"),
            Value::Bool(value) => format!("`{value}`"),
            Value::Array(_) => "an array".to_string(),
            Value::Table(_) => "a table".to_string(),
            Value::Other(what) => (*what).to_string(),
        }
    }
}

/// Parses a whole text. Each syntax error becomes a problem; what could be read in spite of them is returned.
pub fn parse(text: &str, source: usize, problems: &mut Problems) -> Table {
    let (tree, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let range = error.span().unwrap_or(0..0);
        let at = Span {
            source,
            start: range.start.min(text.len()),
            end: range.end.min(text.len()),
        };
        let mut lines = error.message().lines();
        let first = lines.next().unwrap_or("malformed").trim();
        let problem = problems.error(at, format!("TOML syntax: {first}"));
        for line in lines {
            problem.help(line.trim());
        }
    }
    table(tree.into_inner(), source)
}

fn table(tree: DeTable<'_>, source: usize) -> Table {
    tree.into_iter()
        .map(|(key, value)| {
            let entry = Entry {
                key: span(&key, source),
                at: span(&value, source),
                value: convert(value.into_inner(), source),
            };
            (key.into_inner().into_owned(), entry)
        })
        .collect()
}

fn convert(value: DeValue<'_>, source: usize) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.into_owned()),
        DeValue::Integer(digits) => i128::from_str_radix(digits.as_str(), digits.radix())
            .map_or(Value::Other("an integer that is too large"), Value::Int),
        DeValue::Float(digits) => digits
            .as_str()
            .parse()
            .map_or(Value::Other("a float that is not understood"), Value::Float),
        DeValue::Boolean(value) => Value::Bool(value),
        DeValue::Datetime(_) => Value::Other("a date"),
        DeValue::Array(items) => Value::Array(
            items
                .into_iter()
                .map(|item| (span(&item, source), convert(item.into_inner(), source)))
                .collect(),
        ),
        DeValue::Table(tree) => Value::Table(table(tree, source)),
    }
}

fn span<T>(spanned: &Spanned<T>, source: usize) -> Span {
    let range = spanned.span();
    Span {
        source,
        start: range.start,
        end: range.end,
    }
}

//! Files over files: how the tables of one are laid over those of another, and how it takes something away.
//!
//! A profile lies below all files, and of files given together each lies over those before it. Keys that a table doesn't
//! repeat stay; a table that chooses another `driver` or `type` replaces the one below, whose options would mean nothing to it.

use std::collections::btree_map::Entry as Slot;

use super::document::{self, Entry, Table, Value};
use super::source::{Problems, Span};
use super::spelling::suggestion;

/// The key at the top of a file that names what it takes away.
pub const REMOVE: &str = "remove";

/// The keys that say what the other keys of their table mean.
const SELECTORS: [&str; 2] = ["driver", "type"];

/// Lays a file over what lies `below`: first what its `remove` names goes, then its own keys come.
pub fn lay(below: &mut Table, mut file: Table, problems: &mut Problems) {
    if let Some(entry) = file.remove(REMOVE) {
        remove(below, &entry, problems);
    }
    merge(below, file);
}

/// The tables of `over` over those of `below`. Where both have a key, its place is from then on that of `over`.
fn merge(below: &mut Table, over: Table) {
    for (key, entry) in over {
        let mut slot = match below.entry(key) {
            Slot::Vacant(slot) => {
                slot.insert(entry);
                continue;
            }
            Slot::Occupied(slot) => slot,
        };
        let old = slot.get_mut();
        match (&mut old.value, entry.value) {
            (Value::Table(table), Value::Table(new)) if !replaces(&new, table) => {
                merge(table, new);
                (old.key, old.at) = (entry.key, entry.at);
            }
            (_, value) => *old = Entry { value, ..entry },
        }
    }
}

/// Whether `over` chooses another driver or type than `below`.
fn replaces(over: &Table, below: &Table) -> bool {
    let text = |entry: Option<&Entry>| match entry.map(|entry| &entry.value) {
        Some(Value::Text(text)) => Some(text.clone()),
        _ => None,
    };
    SELECTORS
        .iter()
        .any(|key| over.contains_key(*key) && text(over.get(*key)) != text(below.get(*key)))
}

/// Takes away what the array `names` names. What is not there is an error: the file was made for another one.
fn remove(below: &mut Table, names: &Entry, problems: &mut Problems) {
    let Value::Array(items) = &names.value else {
        let found = names.value.describe();
        let text = format!("expected an array of names for `{REMOVE}`, found {found}");
        problems.error(names.at, text).help(EXAMPLE);
        return;
    };
    for (at, item) in items {
        let path = match item {
            Value::Text(text) => path(text),
            _ => None,
        };
        match path {
            Some(path) => take(below, &path, *at, problems),
            None => {
                let text = format!("`{REMOVE}`: {} names no table or key", item.describe());
                problems.error(*at, text).help(EXAMPLE);
            }
        }
    }
}

const EXAMPLE: &str = "as in remove = [\"dev.block1\", \"main.kernel\"]";

/// The parts of a name, which is written as TOML writes keys: parts with other characters are in quotes.
fn path(name: &str) -> Option<Vec<String>> {
    let mut problems = Problems::default();
    let mut table = document::parse(&format!("{name} = 0"), 0, &mut problems);
    let mut parts = Vec::new();
    while problems.list.is_empty() && table.len() == 1 {
        let (key, entry) = table.pop_first()?;
        parts.push(key);
        match entry.value {
            Value::Int(0) => return Some(parts),
            Value::Table(deeper) => table = deeper,
            _ => return None,
        }
    }
    None
}

fn take(below: &mut Table, path: &[String], at: Span, problems: &mut Problems) {
    let mut table = below;
    for (depth, part) in path.iter().enumerate() {
        if !table.contains_key(part) {
            let table_name = match depth {
                0 => "the files below and the profile have".to_owned(),
                _ => format!("[{}] has", path[..depth].join(".")),
            };
            let text = format!("`{REMOVE}`: {table_name} no {part:?}");
            let problem = problems.error(at, text).absent();
            if let Some(help) = suggestion(part, table.keys().map(String::as_str)) {
                problem.help(help);
            }
            return;
        }
        if depth + 1 == path.len() {
            table.remove(part);
            return;
        }
        match table.get_mut(part).map(|entry| &mut entry.value) {
            Some(Value::Table(deeper)) => table = deeper,
            _ => {
                let text = format!("`{REMOVE}`: {} is no table", path[..=depth].join("."));
                problems.error(at, text);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Table {
        let mut problems = Problems::default();
        let table = document::parse(text, 0, &mut problems);
        assert!(problems.list.is_empty(), "{:?}", problems.list);
        table
    }

    /// As TOML, tables in braces.
    fn show(table: &Table) -> String {
        let one = |(key, entry): (&String, &Entry)| match &entry.value {
            Value::Table(table) => format!("{key}={{{}}}", show(table)),
            Value::Text(text) => format!("{key}={text}"),
            Value::Int(number) => format!("{key}={number}"),
            other => panic!("{other:?}"),
        };
        table.iter().map(one).collect::<Vec<_>>().join(" ")
    }

    fn laid(below: &str, file: &str) -> Result<String, Vec<String>> {
        let (mut table, mut problems) = (parse(below), Problems::default());
        lay(&mut table, parse(file), &mut problems);
        match problems.list.is_empty() {
            true => Ok(show(&table)),
            false => Err(problems.list.into_iter().map(|p| p.text).collect()),
        }
    }

    const BELOW: &str =
        "[main]\na = 1\n[dev.d]\ndriver = \"x\"\nq = 2\n[block_dev.b]\ntype = \"one\"\np = 3\n";

    #[test]
    fn keys_are_merged_and_another_kind_replaces() {
        for (file, expected) in [
            (
                "[main]\na = 5\nb = 6",
                "block_dev={b={p=3 type=one}} dev={d={driver=x q=2}} main={a=5 b=6}",
            ),
            (
                "[block_dev.b]\ntype = \"one\"\nr = 7",
                "block_dev={b={p=3 r=7 type=one}} dev={d={driver=x q=2}} main={a=1}",
            ),
            (
                "[block_dev.b]\ntype = \"two\"",
                "block_dev={b={type=two}} dev={d={driver=x q=2}} main={a=1}",
            ),
            (
                "[dev.d]\ndriver = \"y\"\n[dev.e]\ndriver = \"z\"",
                "block_dev={b={p=3 type=one}} dev={d={driver=y} e={driver=z}} main={a=1}",
            ),
            (
                "main = 1",
                "block_dev={b={p=3 type=one}} dev={d={driver=x q=2}} main=1",
            ),
        ] {
            assert_eq!(laid(BELOW, file).as_deref(), Ok(expected), "{file}");
        }
    }

    #[test]
    fn what_is_removed_goes_before_the_file_comes() {
        for (file, expected) in [
            (
                "remove = [\"dev\", \"block_dev.b.p\"]",
                "block_dev={b={type=one}} main={a=1}",
            ),
            (
                "remove = [\"main\", \"dev.d\"]\n[dev.d]\nq = 4",
                "block_dev={b={p=3 type=one}} dev={d={q=4}}",
            ),
            (
                "remove = []",
                "block_dev={b={p=3 type=one}} dev={d={driver=x q=2}} main={a=1}",
            ),
        ] {
            assert_eq!(laid(BELOW, file).as_deref(), Ok(expected), "{file}");
        }
        let quoted = laid("[f.\"a/b.c\"]\nx = 1\ny = 2", "remove = ['f.\"a/b.c\".x']");
        assert_eq!(quoted.as_deref(), Ok("f={a/b.c={y=2}}"));
    }

    #[test]
    fn what_cannot_be_removed_is_an_error() {
        for (names, expected) in [
            ("[\"dev.e\"]", "`remove`: [dev] has no \"e\""),
            (
                "[\"cpu\"]",
                "`remove`: the files below and the profile have no \"cpu\"",
            ),
            ("[\"main.a.b\"]", "`remove`: main.a is no table"),
            ("[1]", "`remove`: the integer 1 names no table or key"),
            ("[\"\"]", "`remove`: the string \"\" names no table or key"),
            (
                "[\"dev.\"]",
                "`remove`: the string \"dev.\" names no table or key",
            ),
            (
                "[\"a = 0\\nb\"]",
                "`remove`: the string \"a = 0\\nb\" names no table or key",
            ),
            (
                "[\"a = 1 #\"]",
                "`remove`: the string \"a = 1 #\" names no table or key",
            ),
            (
                "\"dev\"",
                "expected an array of names for `remove`, found the string \"dev\"",
            ),
        ] {
            let found = laid(BELOW, &format!("remove = {names}"));
            assert_eq!(found, Err(vec![expected.to_owned()]), "{names}");
        }
    }
}

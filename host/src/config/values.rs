//! Reads typed values out of a table, and says what was expected where one is of another type.

use super::document::{Entry, Table, Value};
use super::source::{Problem, Problems, Span};
use super::spelling::{listed, suggestion};

/// A key of a table, with what a report needs to name it.
#[derive(Clone, Copy, Debug)]
pub struct Field<'a> {
    /// The table as its header spells it: `main`, `dev.block0`.
    pub table: &'a str,
    /// The key.
    pub name: &'a str,
    /// The value and its place.
    pub entry: &'a Entry,
}

impl<'a> Field<'a> {
    /// Reports a value of a wrong type or out of range.
    pub fn expected<'p>(&self, what: &str, problems: &'p mut Problems) -> &'p mut Problem {
        let found = self.entry.value.describe();
        problems.error(
            self.entry.at,
            format!(
                "`{}` in [{}]: expected {what}, found {found}",
                self.name, self.table
            ),
        )
    }

    /// A string that is not empty and holds no NUL (it may end up in a C string).
    pub fn text(&self, problems: &mut Problems) -> Option<&'a str> {
        match &self.entry.value {
            Value::Text(text) if text.contains('\0') => {
                self.expected("a string without NUL", problems);
                None
            }
            Value::Text(text) => Some(text),
            _ => {
                self.expected("a string", problems);
                None
            }
        }
    }

    /// A string that is not empty.
    pub fn name(&self, problems: &mut Problems) -> Option<&'a str> {
        let text = self.text(problems)?;
        if text.is_empty() {
            self.expected("a string that is not empty", problems);
            return None;
        }
        Some(text)
    }

    /// One of a few words.
    pub fn word(&self, known: &[&str], problems: &mut Problems) -> Option<&'a str> {
        let text = self.text(problems)?;
        if known.contains(&text) {
            return Some(text);
        }
        let quoted: Vec<String> = known.iter().map(|word| format!("{word:?}")).collect();
        let problem = self.expected(&listed_or(&quoted), problems);
        if let Some(help) = suggestion(text, known.iter().copied()) {
            problem.help(help);
        }
        None
    }

    /// `true` or `false`.
    pub fn boolean(&self, problems: &mut Problems) -> Option<bool> {
        match self.entry.value {
            Value::Bool(value) => Some(value),
            _ => {
                self.expected("`true` or `false`", problems);
                None
            }
        }
    }

    /// An integer from `min` to `max`.
    pub fn integer(&self, min: u64, max: u64, problems: &mut Problems) -> Option<u64> {
        if let Value::Int(number) = self.entry.value
            && let Ok(number) = u64::try_from(number)
            && (min..=max).contains(&number)
        {
            return Some(number);
        }
        self.expected(&range_text(min, max), problems);
        None
    }

    /// A number of bytes from `min` to `max`: an integer counts `unit` bytes, a string names its unit ("512M").
    pub fn size(&self, unit: u64, min: u64, max: u64, problems: &mut Problems) -> Option<u64> {
        let bytes = match &self.entry.value {
            Value::Int(number) => u64::try_from(*number)
                .ok()
                .and_then(|number| number.checked_mul(unit)),
            Value::Text(text) => parse_size(text),
            _ => None,
        };
        if let Some(bytes) = bytes
            && (min..=max).contains(&bytes)
        {
            return Some(bytes);
        }
        let of = if unit == 1 << 20 { "MiB" } else { "bytes" };
        let mut what = format!("a number of {of} or a size such as \"512M\" or \"2G\"");
        if max < u64::MAX {
            what = format!("{what}, from {} to {}", size_text(min), size_text(max));
        } else if min > 0 {
            what = format!("{what}, at least {}", size_text(min));
        }
        self.expected(&what, problems);
        None
    }

    /// A string, or an array of strings; each with its place.
    pub fn texts(&self, problems: &mut Problems) -> Option<Vec<(Span, &'a str)>> {
        match &self.entry.value {
            Value::Text(text) => Some(vec![(self.entry.at, text)]),
            Value::Array(items) => {
                let texts: Option<Vec<_>> = items
                    .iter()
                    .map(|(at, item)| match item {
                        Value::Text(text) => Some((*at, text.as_str())),
                        _ => None,
                    })
                    .collect();
                if texts.is_none() {
                    self.expected("a string or an array of strings only", problems);
                }
                texts
            }
            _ => {
                self.expected("a string or an array of strings", problems);
                None
            }
        }
    }

    /// The table that this key holds.
    pub fn table(&self, problems: &mut Problems) -> Option<&'a Table> {
        match &self.entry.value {
            Value::Table(table) => Some(table),
            _ => {
                problems.error(
                    self.entry.key,
                    format!("expected a table [{}.{}]", self.table, self.name),
                );
                None
            }
        }
    }
}

/// Reports every key of `table` that is not in `known`.
pub fn refuse_unknown(name: &str, table: &Table, known: &[&str], problems: &mut Problems) {
    for (key, entry) in table {
        if !known.contains(&key.as_str()) {
            let problem = problems.error(entry.key, format!("[{name}] has no key `{key}`"));
            if let Some(help) = suggestion(key, known.iter().copied()) {
                problem.help(help);
            }
            problem.help(format!("accepted: {}", listed(known.iter().copied())));
        }
    }
}

/// "an integer from 1 to 4", or in words where a bound is the type's own.
pub fn range_text(min: u64, max: u64) -> String {
    match (min, max) {
        (0, u64::MAX) => "an integer that is not negative".to_string(),
        (min, u64::MAX) => format!("an integer of at least {min}"),
        (min, max) => format!("an integer from {min} to {max}"),
    }
}

/// "a, b or c".
pub fn listed_or(words: &[String]) -> String {
    match words {
        [] => "nothing".to_string(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} or {last}", most.join(", ")),
    }
}

/// Bytes from "512M": an integer and one of K, M, G, T (powers of 1024). `None` if malformed or too large.
pub fn parse_size(text: &str) -> Option<u64> {
    let shift = match text.chars().last()? {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => return None,
    };
    let digits = &text[..text.len() - 1];
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The shortest exact way to write a number of bytes.
pub fn size_text(bytes: u64) -> String {
    [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')]
        .into_iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift)
        .map_or(format!("{bytes}"), |(shift, letter)| {
            format!("{}{letter}", bytes >> shift)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_exactly_or_not_at_all() {
        assert_eq!(parse_size("512M"), Some(512 << 20));
        assert_eq!(parse_size("1T"), Some(1 << 40));
        for bad in [
            "",
            "M",
            "512",
            "1.5G",
            "-1M",
            "+1M",
            "1 M",
            "99999999999999T",
            "1g",
        ] {
            assert_eq!(parse_size(bad), None, "{bad:?}");
        }
        assert_eq!(size_text(512 << 20), "512M");
        assert_eq!(size_text(513), "513");
        assert_eq!(size_text(0), "0");
    }
}

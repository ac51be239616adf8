//! The language of rules: what is to go wrong, and when.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use vmm_plugin_api::BlockOp;

/// Which requests a rule is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    Zero,
    Any,
}

impl Kind {
    fn covers(self, op: BlockOp) -> bool {
        match self {
            Self::Any => true,
            Self::Read => op == BlockOp::Read,
            Self::Write => matches!(op, BlockOp::Write { .. }),
            Self::Flush => op == BlockOp::Flush,
            Self::Discard => op == BlockOp::Discard,
            Self::Zero => matches!(op, BlockOp::WriteZeroes { .. }),
        }
    }
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is answered with this errno and nothing is done.
    Error(i32),
    /// It is done this much later.
    Delay(Duration),
    /// Of a write only the first bytes are stored; it is answered with `EIO`.
    Torn(u64),
}

/// One rule.
#[derive(Debug)]
pub struct Rule {
    kind: Kind,
    start: u64,
    end: u64,
    action: Action,
    /// Requests that are spared first.
    after: u64,
    /// Of those that come then, each of this number.
    every: u64,
    /// How often in all.
    times: u64,
    /// Requests that the rule was for.
    seen: AtomicU64,
}

impl Rule {
    /// What the rule does to this request. Counts it.
    pub fn apply(&self, op: BlockOp, offset: u64, len: u64) -> Option<Action> {
        let touches = op == BlockOp::Flush
            || (offset < self.end && offset.saturating_add(len.max(1)) > self.start);
        let torn = matches!(self.action, Action::Torn(_));
        if !self.kind.covers(op) || !touches || (torn && !matches!(op, BlockOp::Write { .. })) {
            return None;
        }
        let turn = (self.seen.fetch_add(1, Ordering::Relaxed) + 1).saturating_sub(self.after);
        let hit = turn > 0 && turn.is_multiple_of(self.every) && turn / self.every <= self.times;
        hit.then_some(self.action)
    }
}

/// The errors that can be asked for.
const ERRORS: [(&str, i32); 6] = [
    ("EIO", libc::EIO),
    ("ENOSPC", libc::ENOSPC),
    ("EINVAL", libc::EINVAL),
    ("EROFS", libc::EROFS),
    ("ENOTSUP", libc::ENOTSUP),
    ("ETIMEDOUT", libc::ETIMEDOUT),
];

/// Reads rules for a disk with blocks of `block` bytes.
///
/// # Errors
/// What was found where something else was expected, and its column, counted in characters from 1.
pub fn parse(text: &str, block: u32) -> Result<Vec<Rule>> {
    let mut words = Words::new(text);
    let mut rules = Vec::new();
    loop {
        if words.take(";") {
            continue;
        }
        if words.peek().is_none() {
            break;
        }
        rules.push(rule(&mut words, block)?);
        if !words.take(";") && words.peek().is_some() {
            return words.expected("`after`, `every`, `times`, or `;` before the next rule");
        }
    }
    ensure!(!rules.is_empty(), "`rules` has no rule");
    Ok(rules)
}

fn rule(words: &mut Words<'_>, block: u32) -> Result<Rule> {
    const KINDS: [(&str, Kind); 6] = [
        ("read", Kind::Read),
        ("write", Kind::Write),
        ("flush", Kind::Flush),
        ("discard", Kind::Discard),
        ("zero", Kind::Zero),
        ("any", Kind::Any),
    ];
    let Some((_, kind)) = KINDS.into_iter().find(|(name, _)| words.take(name)) else {
        return words.expected("`read`, `write`, `flush`, `discard`, `zero` or `any`");
    };
    let (start, end) = range(words)?;
    let action = if words.take("error") {
        let Some((_, code)) = ERRORS.into_iter().find(|(name, _)| words.take(name)) else {
            return words.expected("`EIO`, `ENOSPC`, `EINVAL`, `EROFS`, `ENOTSUP` or `ETIMEDOUT`");
        };
        Action::Error(code)
    } else if words.take("delay") {
        Action::Delay(words.parsed("a time such as `500us`, `10ms` or `2s`", time)?)
    } else if words.peek() == Some("torn") && !matches!(kind, Kind::Write | Kind::Any) {
        return words.expected("`error` or `delay`: only a `write` can be torn; found");
    } else if words.take("torn") {
        let whole = |word: &str| size(word).filter(|n| n.is_multiple_of(block.into()));
        let what = format!("a number of bytes in whole blocks of {block}");
        Action::Torn(words.parsed(&what, whole)?)
    } else {
        return words.expected(
            "a range such as `4096..8192`, `1M..` or `*`, or one of `error`, `delay` and `torn`",
        );
    };
    let (mut after, mut every, mut times) = (0, 1, u64::MAX);
    loop {
        let count = "a count of 1 or more";
        if words.take("after") {
            after = words.parsed(count, number)?;
        } else if words.take("every") {
            every = words.parsed(count, number)?;
        } else if words.take("times") {
            times = words.parsed(count, number)?;
        } else {
            break;
        }
    }
    Ok(Rule {
        kind,
        start,
        end,
        action,
        after,
        every,
        times,
        seen: AtomicU64::new(0),
    })
}

/// All of the disk if none is given.
fn range(words: &mut Words<'_>) -> Result<(u64, u64)> {
    let all = (0, u64::MAX);
    let given = words.peek().is_some_and(|word| word.contains(".."));
    if words.take("*") || !given {
        return Ok(all);
    }
    words.parsed("a range such as `4096..8192` or `1M..`", |word| {
        let (start, end) = word.split_once("..")?;
        let start = if start.is_empty() { 0 } else { size(start)? };
        let end = if end.is_empty() { u64::MAX } else { size(end)? };
        (start < end).then_some((start, end))
    })
}

fn number(word: &str) -> Option<u64> {
    word.parse().ok().filter(|n| *n > 0)
}

/// Bytes, with K, M, G or T for the powers of 1024.
fn size(word: &str) -> Option<u64> {
    let unit = |letter| match letter {
        'K' => Some(10),
        'M' => Some(20),
        'G' => Some(30),
        'T' => Some(40),
        _ => None,
    };
    match word.chars().last().and_then(unit) {
        Some(shift) => {
            let number: u64 = word.get(..word.len() - 1)?.parse().ok()?;
            number.checked_mul(1 << shift)
        }
        None => word.parse().ok(),
    }
}

fn time(word: &str) -> Option<Duration> {
    let (digits, unit) = word.split_at(word.find(|c: char| !c.is_ascii_digit())?);
    let number: u64 = digits.parse().ok()?;
    let time = match unit {
        "us" => Duration::from_micros(number),
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        _ => return None,
    };
    // An hour is longer than any guest waits.
    (time <= Duration::from_secs(3600)).then_some(time)
}

/// Words and semicolons, with their columns.
struct Words<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Words<'a> {
    fn new(text: &'a str) -> Self {
        let mut words = Self { text, at: 0 };
        words.skip_space();
        words
    }

    fn skip_space(&mut self) {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
    }

    fn peek(&self) -> Option<&'a str> {
        let rest = &self.text[self.at..];
        let first = rest.chars().next()?;
        if first == ';' {
            return Some(&rest[..1]);
        }
        let end = rest.find(|c: char| c == ';' || c.is_whitespace());
        Some(&rest[..end.unwrap_or(rest.len())])
    }

    fn advance(&mut self) {
        self.at += self.peek().map_or(0, str::len);
        self.skip_space();
    }

    fn take(&mut self, word: &str) -> bool {
        let there = self.peek() == Some(word);
        if there {
            self.advance();
        }
        there
    }

    fn parsed<T>(&mut self, what: &str, parse: impl Fn(&str) -> Option<T>) -> Result<T> {
        let Some(value) = self.peek().and_then(parse) else {
            return self.expected(what);
        };
        self.advance();
        Ok(value)
    }

    fn expected<T>(&self, what: &str) -> Result<T> {
        let column = self.text[..self.at].chars().count() + 1;
        match self.peek() {
            Some(found) => bail!("`rules`, column {column}: expected {what}, found `{found}`"),
            None => bail!("`rules`, column {column}: expected {what}, found the end"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const WRITE: BlockOp = BlockOp::Write { fua: false };

    #[test]
    fn rules_hit_what_they_say() {
        let text = "write 4096..8192 error EIO after 3; read * delay 10ms;\n write 1M.. torn 512 ; flush error ENOSPC every 5 times 2;";
        let rules = parse(text, 512).unwrap();
        assert_eq!(rules.len(), 4);
        let hits = |rule: &Rule, op, offset, n| -> Vec<bool> {
            (0..n)
                .map(|_| rule.apply(op, offset, 4096).is_some())
                .collect()
        };
        assert_eq!(
            hits(&rules[0], WRITE, 0, 5),
            [false; 5],
            "it ends where the range starts"
        );
        assert_eq!(
            hits(&rules[0], WRITE, 512, 5),
            [false, false, false, true, true]
        );
        assert_eq!(hits(&rules[0], BlockOp::Read, 4096, 1), [false]);
        assert_eq!(hits(&rules[0], WRITE, 8192, 1), [false]);
        let delay = Action::Delay(Duration::from_millis(10));
        assert_eq!(rules[1].apply(BlockOp::Read, 1 << 40, 1), Some(delay));
        assert_eq!(
            rules[2].apply(WRITE, 1 << 20, 4096),
            Some(Action::Torn(512))
        );
        let flushes = hits(&rules[3], BlockOp::Flush, 0, 16);
        let hit: Vec<usize> = (1..)
            .zip(flushes)
            .filter(|(_, hit)| *hit)
            .map(|(i, _)| i)
            .collect();
        assert_eq!(hit, [5, 10]);
    }

    #[test]
    fn mistakes_are_named_by_column() {
        for (text, column, expected) in [
            ("", 0, "no rule"),
            (" ; ", 0, "no rule"),
            ("wirte error EIO", 1, "found `wirte`"),
            ("write", 6, "found the end"),
            ("write error", 12, "found the end"),
            ("write error EWHAT", 13, "found `EWHAT`"),
            ("write 8192..4096 error EIO", 7, "found `8192..4096`"),
            ("write 1Q.. error EIO", 7, "found `1Q..`"),
            ("read delay 10", 12, "found `10`"),
            ("read delay 2h", 12, "found `2h`"),
            ("read delay 7200s", 12, "found `7200s`"),
            ("read torn 512", 6, "only a `write`"),
            ("write torn 100", 12, "blocks of 512"),
            ("read error EIO every 0", 22, "count of 1"),
            ("read error EIO; ö error EIO", 17, "found `ö`"),
            ("read error EIO read", 16, "before the next rule"),
            ("write 99999999999999999999.. error EIO", 7, "a range"),
        ] {
            let error = parse(text, 512).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
            assert!(
                column == 0 || error.contains(&format!("column {column}:")),
                "{text}: {error}"
            );
        }
    }
}

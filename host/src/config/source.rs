//! Where a piece of configuration was written, and reports that point there.
//!
//! Every key and value keeps its [`Span`], so that whatever is wrong with it, however late that is found, is shown with
//! the file, the line and a caret. Problems are collected, never thrown one at a time: a user sees all of them at once.

use std::fmt;

/// The longest stretch of a line that a report shows, in characters.
const SHOWN_COLUMNS: usize = 160;

/// A byte range in one of the texts of a [`Report`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// Index of the text in [`Report::sources`].
    pub source: usize,
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

/// One text that configuration came from: the VM file, or an embedded profile.
#[derive(Clone, Debug)]
pub struct Source {
    /// What a report calls it: the path as the user gave it.
    pub name: String,
    /// The whole text.
    pub text: String,
}

impl Source {
    /// The line (from 1) and the byte offset at which that line starts.
    fn line_at(&self, offset: usize) -> (usize, usize) {
        let before = self.text.get(..offset).unwrap_or(&self.text);
        let line = before.matches('\n').count() + 1;
        let start = before.rfind('\n').map_or(0, |newline| newline + 1);
        (line, start)
    }

    /// The line number, from 1, of a byte offset.
    pub fn line(&self, offset: usize) -> u32 {
        u32::try_from(self.line_at(offset).0).unwrap_or(u32::MAX)
    }
}

/// Whether a problem keeps the VM from running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The configuration is refused.
    Error,
    /// The VM runs, but probably not as its author expects.
    Warning,
}

/// One thing that is wrong, where, and what to do about it.
#[derive(Clone, Debug)]
pub struct Problem {
    /// Error or warning.
    pub severity: Severity,
    /// The place; absent for what has none, such as a file that can't be read.
    pub at: Option<Span>,
    /// What is wrong, naming the key.
    pub text: String,
    /// What is accepted, and the nearest spelling; a line each.
    pub help: Vec<String>,
    /// Whether this says that something is absent. Such a problem is dropped when the text did not parse, since the
    /// thing may be there, in the part that could not be read.
    pub absence: bool,
    /// Whether no plugin provides a name, so that a report should say where plugins were looked for.
    pub lookup: bool,
}

impl Problem {
    /// Adds a line below the caret.
    pub fn help(&mut self, text: impl Into<String>) -> &mut Problem {
        self.help.push(text.into());
        self
    }

    /// Marks the problem as one of absence.
    pub fn absent(&mut self) -> &mut Problem {
        self.absence = true;
        self
    }
}

/// Problems as they are found.
#[derive(Clone, Debug, Default)]
pub struct Problems {
    /// In the order in which they were found.
    pub list: Vec<Problem>,
}

impl Problems {
    /// Records an error at a place.
    pub fn error(&mut self, at: Span, text: impl Into<String>) -> &mut Problem {
        self.push(Severity::Error, Some(at), text.into())
    }

    /// Records that a name leads to no plugin.
    pub fn lookup(&mut self, at: Span, text: String, help: Vec<String>) {
        let problem = self.error(at, text);
        problem.help = help;
        problem.lookup = true;
    }

    /// Records a warning at a place.
    pub fn warning(&mut self, at: Span, text: impl Into<String>) -> &mut Problem {
        self.push(Severity::Warning, Some(at), text.into())
    }

    /// Records an error that no place in a text belongs to.
    pub fn error_nowhere(&mut self, text: impl Into<String>) -> &mut Problem {
        self.push(Severity::Error, None, text.into())
    }

    fn push(&mut self, severity: Severity, at: Option<Span>, text: String) -> &mut Problem {
        let index = self.list.len();
        self.list.push(Problem {
            severity,
            at,
            text,
            help: Vec::new(),
            absence: false,
            lookup: false,
        });
        &mut self.list[index]
    }

    /// Whether any of them is an error.
    pub fn any_error(&self) -> bool {
        self.list
            .iter()
            .any(|problem| problem.severity == Severity::Error)
    }
}

/// All problems of one VM, printable.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What its files are called together; empty if not all of them could be read.
    pub title: String,
    /// The texts that spans point into.
    pub sources: Vec<Source>,
    /// In the order in which they are printed.
    pub problems: Vec<Problem>,
    /// Lines that several problems share, printed once below them.
    pub notes: Vec<String>,
}

impl Report {
    /// Orders problems by place, those without a place first. A name that no plugin provides is shown once, with the
    /// other lines that want it: one missing plugin is one problem to its user.
    pub fn new(
        title: String,
        sources: Vec<Source>,
        mut found: Problems,
        notes: Vec<String>,
    ) -> Report {
        found.list.sort_by_key(|problem| problem.at);
        let mut problems: Vec<Problem> = Vec::with_capacity(found.list.len());
        let mut again: Vec<Vec<String>> = Vec::new();
        for problem in found.list {
            let place = |at: Span| {
                let source = sources.get(at.source)?;
                Some((at.source, &source.name, source.line(at.start)))
            };
            let same = problems.iter().position(|earlier| {
                earlier.lookup && problem.lookup && earlier.text == problem.text
            });
            match (same, problem.at.and_then(place)) {
                (Some(index), Some((source, name, line))) => {
                    let here = problems[index].at.is_some_and(|at| at.source == source);
                    again[index].push(match here {
                        true => format!("line {line}"),
                        false => format!("{name}:{line}"),
                    });
                }
                _ => {
                    problems.push(problem);
                    again.push(Vec::new());
                }
            }
        }
        for (problem, places) in problems.iter_mut().zip(again) {
            if !places.is_empty() {
                let places = places.join(", ").replace(", line ", ", ");
                problem.help(format!("likewise in {places}"));
            }
        }
        Report {
            title,
            sources,
            problems,
            notes,
        }
    }

    /// How many problems are of this severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.problems
            .iter()
            .filter(|problem| problem.severity == severity)
            .count()
    }
}

impl std::error::Error for Report {}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.problems {
            write_problem(out, problem, &self.sources)?;
        }
        for note in &self.notes {
            writeln!(out, "{note}")?;
        }
        if !self.notes.is_empty() {
            writeln!(out)?;
        }
        let counted: Vec<String> = [(Severity::Error, "error"), (Severity::Warning, "warning")]
            .into_iter()
            .map(|(severity, word)| (self.count(severity), word))
            .filter(|(count, _)| *count > 0)
            .map(|(count, word)| format!("{count} {word}{}", if count == 1 { "" } else { "s" }))
            .collect();
        match self.title.is_empty() {
            true => Ok(()),
            false => writeln!(out, "{}: {}", self.title, counted.join(", ")),
        }
    }
}

fn write_problem(
    out: &mut fmt::Formatter<'_>,
    problem: &Problem,
    sources: &[Source],
) -> fmt::Result {
    let word = match problem.severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
    };
    let place = problem
        .at
        .and_then(|at| sources.get(at.source).map(|source| (at, source)));
    match place {
        Some((at, source)) => {
            let (line, start) = source.line_at(at.start);
            let column = source
                .text
                .get(start..at.start)
                .map_or(0, |text| text.chars().count());
            writeln!(
                out,
                "{}:{line}:{}: {word}: {}",
                source.name,
                column + 1,
                problem.text
            )?;
            write_line(out, source, at, line, start, column)?;
        }
        None => writeln!(out, "{word}: {}", problem.text)?,
    }
    for help in &problem.help {
        writeln!(out, "      {help}")?;
    }
    writeln!(out)
}

/// Prints the line with carets under the span's part of it. Control characters are not passed on to the terminal.
fn write_line(
    out: &mut fmt::Formatter<'_>,
    source: &Source,
    at: Span,
    line: usize,
    start: usize,
    column: usize,
) -> fmt::Result {
    let rest = source.text.get(start..).unwrap_or("");
    let text = rest.split(['\n', '\r']).next().unwrap_or("");
    let end = at.end.saturating_sub(start).min(text.len());
    let width = text
        .get(at.start.saturating_sub(start)..end)
        .map_or(0, |part| part.chars().count())
        .max(1);
    // A very long line is shown from a little before the place on.
    let skipped = if column > SHOWN_COLUMNS / 2 {
        column - 20
    } else {
        0
    };
    let shown: String = text
        .chars()
        .skip(skipped)
        .take(SHOWN_COLUMNS)
        .map(|c| match c {
            '\t' => ' ',
            c if c.is_control() => char::REPLACEMENT_CHARACTER,
            c => c,
        })
        .collect();
    let caret = column - skipped;
    let width = width.min(SHOWN_COLUMNS.saturating_sub(caret).max(1));
    writeln!(out, "{line:>5} | {shown}")?;
    writeln!(out, "      | {}{}", " ".repeat(caret), "^".repeat(width))
}

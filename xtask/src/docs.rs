//! Checks of the documents: what they point to is there, what they show is true.

use crate::report::Report;
use crate::{process, workspace};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn markdown(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?
    {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" {
                markdown(&path, found)?;
            }
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
    Ok(())
}

/// The targets of a document's links to other files.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for part in text.split("](").skip(1) {
        let target = part.split([')', '#', ' ']).next().unwrap_or_default();
        if !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:") {
            found.push(target.to_owned());
        }
    }
    found
}

fn links_lead_somewhere() -> Result<()> {
    let mut files = Vec::new();
    markdown(&workspace::root(), &mut files)?;
    let mut broken = Vec::new();
    for file in &files {
        let text =
            fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let base = file.parent().unwrap_or(file);
        for link in links(&text) {
            if !base.join(&link).exists() {
                broken.push(format!(
                    "{} points to {link}",
                    file.strip_prefix(workspace::root())?.display()
                ));
            }
        }
    }
    ensure!(broken.is_empty(), "{}", broken.join("; "));
    Ok(())
}

/// The host's code names no driver and no backend type: those come from manifests.
fn host_knows_no_device() -> Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(workspace::root().join("plugins"))? {
        let manifest = entry?.path().join("src/plugin.toml");
        let Ok(text) = fs::read_to_string(&manifest) else {
            continue;
        };
        let mut in_driver = false;
        for line in text.lines() {
            if line.starts_with('[') {
                in_driver = line.trim() == "[[driver]]";
            } else if in_driver && let Some(name) = line.strip_prefix("name = \"") {
                names.push(name.trim_end_matches('"').to_owned());
            }
        }
    }
    ensure!(
        !names.is_empty(),
        "no plugins/*/src/plugin.toml names a driver"
    );
    let mut found = Vec::new();
    sources(&workspace::root().join("host/src"), &mut found)?;
    let mut wrong = Vec::new();
    for file in found {
        let text = fs::read_to_string(&file)?;
        for name in names.iter().filter(|name| text.contains(name.as_str())) {
            wrong.push(format!(
                "{} names {name}",
                file.strip_prefix(workspace::root())?.display()
            ));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

/// Source files that are no tests; tests may name drivers in the files they check.
fn sources(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() {
            if name != "tests" {
                sources(&path, found)?;
            }
        } else if name.ends_with(".rs") && !name.contains("tests") {
            found.push(path);
        }
    }
    Ok(())
}

fn rustdoc_builds() -> Result<process::Outcome> {
    let mut command = workspace::cargo(&[
        "doc",
        "--workspace",
        "--no-deps",
        "--quiet",
        "--document-private-items",
    ]);
    command.env(
        "RUSTDOCFLAGS",
        "-D warnings -A rustdoc::private-intra-doc-links",
    );
    process::bounded(&mut command, Duration::from_secs(1800), false)
}

/// Runs the checks.
pub fn test(report: &mut Report) {
    report.record("links in documents lead somewhere", links_lead_somewhere());
    report.record("host/src names no driver", host_knows_no_device());
    report.command("cargo doc without warnings", rustdoc_builds());
}

#[cfg(test)]
mod tests {
    #[test]
    fn links_are_found() {
        let text = "[a](b.md) [c](https://x/y) [d](e/f.md#part) [g](#here)";
        assert_eq!(super::links(text), ["b.md", "e/f.md"]);
    }
}

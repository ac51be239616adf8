//! Where plugins are looked for, and what was found there.
//!
//! Only the directories themselves are read, not what is below them, and only files that end in `.so`. What is not a
//! plugin of this host is kept in a list with the reason, so that "my plugin isn't found" always has an answer.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::debug;

use super::manifest::{Manifest, ManifestError};
use super::manifest_toml::parse;
use super::section::{PluginFile, SectionError};
use crate::config::source::Span;

/// The environment variable with further directories, separated by colons.
pub const PATH_VARIABLE: &str = "VMM_PLUGIN_PATH";

/// Who asked for a directory to be searched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `--plugin-path`.
    Flag,
    /// [`PATH_VARIABLE`].
    Environment,
    /// `[plugins] path` of the VM file, at this place.
    VmFile(Span),
    /// Nobody: where the host's own binary is.
    BesideBinary,
    /// Nobody: `../lib/vmm-host/plugins` from there.
    Library,
}

impl Origin {
    /// Whether a user named the directory: it then has to exist.
    pub fn named(self) -> bool {
        !matches!(self, Origin::BesideBinary | Origin::Library)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Origin::Flag => "--plugin-path",
            Origin::Environment => PATH_VARIABLE,
            Origin::VmFile(_) => "[plugins] path",
            Origin::BesideBinary => "beside the binary",
            Origin::Library => "default",
        })
    }
}

/// A directory of the search path.
#[derive(Clone, Debug)]
pub struct Directory {
    /// As given.
    pub path: PathBuf,
    /// Who asked for it.
    pub origin: Origin,
}

/// What the search path is made of.
#[derive(Clone, Debug, Default)]
pub struct SearchOptions {
    /// `--plugin-path`, in order.
    pub flags: Vec<PathBuf>,
    /// The value of [`PATH_VARIABLE`].
    pub variable: Option<OsString>,
    /// The running binary.
    pub binary: Option<PathBuf>,
}

impl SearchOptions {
    /// Those of this process.
    pub fn of_process(flags: Vec<PathBuf>) -> SearchOptions {
        SearchOptions {
            flags,
            variable: std::env::var_os(PATH_VARIABLE),
            binary: std::env::current_exe().ok(),
        }
    }

    /// The directories in the order in which they are searched. `from_file` is `[plugins] path`, already resolved
    /// against the VM file's directory.
    pub fn directories(&self, from_file: &[(Span, PathBuf)]) -> Vec<Directory> {
        let mut out: Vec<Directory> = Vec::new();
        let mut add = |path: PathBuf, origin| out.push(Directory { path, origin });
        for path in &self.flags {
            add(path.clone(), Origin::Flag);
        }
        if let Some(variable) = &self.variable {
            // An empty element is an accident ("$OTHER:/x" with OTHER unset), not the working directory.
            for path in std::env::split_paths(variable).filter(|path| !path.as_os_str().is_empty())
            {
                add(path, Origin::Environment);
            }
        }
        for (at, path) in from_file {
            add(path.clone(), Origin::VmFile(*at));
        }
        if let Some(beside) = self.binary.as_deref().and_then(Path::parent) {
            add(beside.to_path_buf(), Origin::BesideBinary);
            if let Some(prefix) = beside.parent() {
                add(prefix.join("lib/vmm-host/plugins"), Origin::Library);
            }
        }
        out
    }
}

/// A plugin that was found and understood.
#[derive(Debug)]
pub struct Plugin {
    /// Its file.
    pub path: PathBuf,
    /// Index of its directory in [`Found::directories`].
    pub directory: usize,
    /// What it says about itself.
    pub manifest: Manifest,
}

/// A file that ends in `.so` and is no usable plugin.
#[derive(Debug)]
pub struct Skipped {
    /// The file.
    pub path: PathBuf,
    /// Index of its directory in [`Found::directories`].
    pub directory: usize,
    /// Why it is not used.
    pub why: ManifestError,
}

impl fmt::Display for Skipped {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.path.display(), self.why)
    }
}

/// A directory that a user named and that can't be searched.
#[derive(Debug)]
pub struct Unsearchable {
    /// The directory.
    pub directory: Directory,
    /// What the system said.
    pub why: std::io::Error,
}

impl fmt::Display for Unsearchable {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Directory { path, origin } = &self.directory;
        write!(
            out,
            "plugin directory {} ({origin}) can't be searched: {}",
            path.display(),
            self.why
        )
    }
}

/// The result of a search.
#[derive(Debug, Default)]
pub struct Found {
    /// The directories that exist, in search order.
    pub directories: Vec<Directory>,
    /// In search order, then by file name.
    pub plugins: Vec<Arc<Plugin>>,
    /// Likewise.
    pub skipped: Vec<Skipped>,
    /// Directories that were named and can't be read: an error for whoever named them.
    pub unsearchable: Vec<Unsearchable>,
}

/// Files that end in `.so`, each with the text of its manifest, and where they were looked for.
#[derive(Debug, Default)]
pub struct Candidates {
    directories: Vec<Directory>,
    files: Vec<Candidate>,
    unsearchable: Vec<Unsearchable>,
}

#[derive(Debug)]
struct Candidate {
    path: PathBuf,
    directory: usize,
    text: Result<String, SectionError>,
}

/// Takes the texts of the manifests out of all plugins in `directories`; loads nothing.
pub fn candidates(directories: Vec<Directory>) -> Candidates {
    let mut found = Candidates::default();
    // One file may be reached by two names or through a link; it is the same plugin.
    let mut seen_directories = HashSet::new();
    let mut seen_files = HashSet::new();
    for directory in directories {
        let files = match shared_objects(&directory.path, &mut seen_directories) {
            Ok(Some(files)) => files,
            Ok(None) => continue,
            Err(why) if directory.origin.named() => {
                found.unsearchable.push(Unsearchable { directory, why });
                continue;
            }
            Err(why) => {
                debug!(
                    "plugin directory {} skipped: {why}",
                    directory.path.display()
                );
                continue;
            }
        };
        let index = found.directories.len();
        found.directories.push(directory);
        for path in files {
            let file = PluginFile::open(&path);
            let identity = file.as_ref().map(PluginFile::identity);
            if identity.is_ok_and(|identity| !seen_files.insert(identity)) {
                continue;
            }
            found.files.push(Candidate {
                text: file.and_then(|file| file.manifest_text()),
                path,
                directory: index,
            });
        }
    }
    found
}

/// Reads the manifests of all plugins in `directories`; loads nothing.
pub fn search(directories: Vec<Directory>) -> Found {
    candidates(directories).read()
}

impl Candidates {
    /// Whether every directory that a user named was searched.
    pub fn complete(&self) -> bool {
        self.unsearchable.is_empty()
    }

    /// Reads the manifests that may provide one of these names: a start needs two or three of all that are installed.
    pub fn read_for(&self, names: &[&str]) -> Found {
        let mut found = Found {
            directories: self.directories.clone(),
            ..Found::default()
        };
        for Candidate {
            path,
            directory,
            text,
        } in &self.files
        {
            let wanted = text.as_ref().map_or(true, |text| {
                has_escaped_letters(text) || names.iter().any(|name| text.contains(name))
            });
            if wanted {
                found.add(path.clone(), *directory, text.clone());
            }
        }
        found
    }

    /// Reads all manifests.
    pub fn read(self) -> Found {
        let mut found = Found {
            directories: self.directories,
            unsearchable: self.unsearchable,
            ..Found::default()
        };
        for file in self.files {
            found.add(file.path, file.directory, file.text);
        }
        found
    }
}

impl Found {
    fn add(&mut self, path: PathBuf, directory: usize, text: Result<String, SectionError>) {
        match text.map_err(ManifestError::Section).and_then(parse) {
            Ok(manifest) => self.plugins.push(Arc::new(Plugin {
                path,
                directory,
                manifest,
            })),
            Err(why) => self.skipped.push(Skipped {
                path,
                directory,
                why,
            }),
        }
    }
}

/// Whether a part of a name could be written otherwise than it reads, by an escape (TOML 1.1, "String").
fn has_escaped_letters(text: &str) -> bool {
    let mut rest = text;
    while let Some((_, escape)) = rest.split_once('\\') {
        // These stand in no name.
        if !escape.starts_with(['"', '\\', 'n', 't']) {
            return true;
        }
        rest = &escape[1..];
    }
    false
}

/// The `.so` files of a directory by name; `None` if the directory was seen before.
fn shared_objects(
    directory: &Path,
    seen: &mut HashSet<(u64, u64)>,
) -> Result<Option<Vec<PathBuf>>, std::io::Error> {
    let entries = std::fs::read_dir(directory)?;
    let identity = std::fs::metadata(directory)?;
    if !seen.insert((identity.dev(), identity.ino())) {
        return Ok(None);
    }
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "so") {
            files.push(path);
        }
    }
    // By path they would be compared piece by piece.
    files.sort_by(|a, b| a.as_os_str().cmp(b.as_os_str()));
    Ok(Some(files))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_escapes_that_may_be_letters_make_a_text_suspect() {
        for text in [
            "name = \"file\"",
            r#"about = "a \"quoted\" word""#,
            r#"about = "C:\\u0066""#,
            r#"about = "\n\t\\""#,
        ] {
            assert!(!has_escaped_letters(text), "{text}");
        }
        for text in [
            r#"name = "\u0066ile""#,
            r#"name = "\x66ile""#,
            r#"about = "\\", name = "\U00000066ile""#,
            "name = \"\"\"fi\\\nle\"\"\"",
        ] {
            assert!(has_escaped_letters(text), "{text}");
        }
    }
}

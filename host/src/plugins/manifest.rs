//! The manifest: what a plugin says about itself, as data.
//!
//! It is TOML text in the plugin's file (see [`super::section`]). From it alone the host knows which drivers and backends
//! exist and which options they take, so a whole VM file is checked, and the option reference is printed, without running
//! any plugin code.

use std::fmt;
use std::path::Path;

use super::schema::{BackendKind, OptionSpec};
use super::section::{PluginFile, SectionError};

/// Version of the plugin ABI: a plugin runs in a host of the same major version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AbiVersion {
    /// Changes when old plugins stop working.
    pub major: u32,
    /// Changes when something was added.
    pub minor: u32,
}

impl fmt::Display for AbiVersion {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}", self.major, self.minor)
    }
}

/// The ABI version of this host.
pub const HOST_ABI: AbiVersion = AbiVersion {
    major: vmm_abi::ABI_MAJOR,
    minor: vmm_abi::ABI_MINOR,
};

/// How the guest finds a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusKind {
    /// At fixed addresses.
    Isa,
    /// By PCI enumeration: the VM file must give a `pci-path`.
    Pci,
}

/// A driver: what `driver = "NAME"` creates.
#[derive(Clone, Debug)]
pub struct Driver {
    /// As typed in a VM file.
    pub name: String,
    /// What it is, in a sentence.
    pub about: String,
    /// Where its devices sit.
    pub bus: BusKind,
    /// The operating systems that it works on; empty if on any.
    pub os: Vec<String>,
    /// The options that its devices take.
    pub options: Vec<OptionSpec>,
    /// The oldest and the current version of its saved state; `None` if its devices can't be saved.
    pub state: Option<(u32, u32)>,
}

/// A backend type: what `type = "NAME"` creates.
#[derive(Clone, Debug)]
pub struct Backend {
    /// As typed in a VM file.
    pub name: String,
    /// What it is, in a sentence.
    pub about: String,
    /// Which tables may name it.
    pub kind: BackendKind,
    /// The operating systems that it works on; empty if on any.
    pub os: Vec<String>,
    /// The options it takes.
    pub options: Vec<OptionSpec>,
    /// Further options, which a VM file gives once for all backends of the type: in a top-level table `[NAME]`, which it
    /// must then have.
    pub shared: Vec<OptionSpec>,
}

/// Everything that a plugin says about itself.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The ABI it was built against.
    pub abi: AbiVersion,
    /// Its name.
    pub name: String,
    /// Its own version.
    pub version: String,
    /// Its licence, an SPDX expression; may be empty.
    pub license: String,
    /// What it is, in a sentence.
    pub about: String,
    /// The drivers it provides.
    pub drivers: Vec<Driver>,
    /// The backends it provides, of all kinds.
    pub backends: Vec<Backend>,
    /// The text that all this was read from: the loaded plugin has to carry the same.
    pub source: String,
}

/// Why a file is not a usable plugin. One line, without the file's name.
#[derive(Debug, PartialEq, Eq)]
pub enum ManifestError {
    /// No manifest text.
    Section(SectionError),
    /// The manifest text is wrong, on this line of it.
    Malformed {
        /// Counted from 1.
        line: u32,
        /// What is wrong.
        text: String,
        /// How many problems there are besides.
        more: usize,
    },
    /// Built for a host of another ABI.
    Abi {
        /// The plugin's.
        plugin: AbiVersion,
        /// This host's.
        host: AbiVersion,
    },
}

impl fmt::Display for ManifestError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ManifestError::Section(error) => error.fmt(out),
            ManifestError::Malformed { line, text, more } => {
                write!(out, "its manifest is malformed, line {line}: {text}")?;
                if *more > 0 {
                    write!(out, " (and {more} more)")?;
                }
                Ok(())
            }
            ManifestError::Abi { plugin, host } => {
                let remedy = if plugin.major < host.major {
                    "build it against a newer vmm-plugin-api"
                } else {
                    "it needs a newer vmm-host"
                };
                write!(
                    out,
                    "built for plugin ABI {plugin}, this host has ABI {host}: {remedy}"
                )
            }
        }
    }
}

impl std::error::Error for ManifestError {}

impl Manifest {
    /// Reads and checks the manifest in the plugin file at `path`, running none of its code.
    pub fn read(path: &Path) -> Result<Manifest, ManifestError> {
        let text = PluginFile::open(path)
            .and_then(|file| file.manifest_text())
            .map_err(ManifestError::Section)?;
        super::manifest_toml::parse(text)
    }

    /// The backends of one kind.
    pub fn backends(&self, kind: BackendKind) -> impl Iterator<Item = &Backend> {
        self.backends
            .iter()
            .filter(move |backend| backend.kind == kind)
    }
}

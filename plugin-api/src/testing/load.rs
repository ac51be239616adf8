//! Plugins from their shared objects. A test program can link one plugin only: each exports its root under the same name.

#![allow(unsafe_code)] // loads a shared object

use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use vmm_abi::{ABI_MAJOR, MAGIC, ROOT_SYMBOL, Root};

use crate::Result;

/// Loads a plugin other than the one under test: a path to its shared object, or the name of a crate, whose shared object cargo
/// has built beside the test because the crate is among the dev-dependencies. It stays loaded.
///
/// # Errors
/// There is no such file, it can't be loaded, or is no plugin of this ABI.
pub fn load(path_or_crate: impl AsRef<Path>) -> Result<&'static Root> {
    let given = path_or_crate.as_ref();
    let path = if given.components().count() > 1 || given.extension().is_some() {
        given.to_owned()
    } else {
        beside_test(given)?
    };
    // SAFETY: a plugin is trusted to have constructors that may run here, as in the host.
    let library = unsafe { libloading::Library::new(&path) }
        .with_context(|| format!("{} can't be loaded", path.display()))?;
    // Its statics and threads may be in use until the process ends.
    let library = Box::leak(Box::new(library));
    // SAFETY: by the ABI the symbol is a static `Root`; magic and version are compared before anything else in it is believed.
    let root = unsafe { library.get::<*const Root>(ROOT_SYMBOL.as_bytes())?.as_ref() };
    let root = root.with_context(|| format!("{} has no root", path.display()))?;
    ensure!(
        root.magic == MAGIC && root.abi_major == ABI_MAJOR,
        "{} is no plugin of ABI {ABI_MAJOR}",
        path.display()
    );
    Ok(root)
}

/// The file of a crate: integration tests run from where cargo leaves shared objects, examples and binaries next to it.
fn beside_test(name: &Path) -> Result<PathBuf> {
    let name = name.to_string_lossy().replace('-', "_");
    let file = format!("{DLL_PREFIX}{name}{DLL_SUFFIX}");
    let program = std::env::current_exe()?;
    let places = ["", "deps", "../deps"].map(|place| program.with_file_name(place).join(&file));
    places
        .iter()
        .find(|path| path.is_file())
        .cloned()
        .with_context(|| {
            format!(
                "no {file} beside {}: add its crate to [dev-dependencies]",
                program.display()
            )
        })
}

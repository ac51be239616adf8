//! Loading a plugin: the only place that knows `dlopen`.
//!
//! A plugin stays mapped for the life of the process: its threads, thread-locals and the statics behind its tables may outlive any
//! moment at which unloading would seem safe.

#![allow(unsafe_code)] // loads code and reads its exported static

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use vmm_abi::{
    ABI_MAJOR, ABI_MINOR, FLAG_DEBUG, FLAG_UNWIND, MAGIC, MANIFEST_SECTION, ROOT_SYMBOL, Root,
};

use super::process;
use super::search::Plugin;

/// A loaded plugin, initialised and ready to create devices and backends.
#[derive(Debug)]
pub struct Loaded {
    /// Name in its manifest.
    pub name: String,
    /// Version in its manifest.
    pub version: String,
    pub(super) root: &'static Root,
}

/// The plugins of this process, each loaded once.
#[derive(Debug, Default)]
pub struct Loader {
    loaded: BTreeMap<PathBuf, Arc<Loaded>>,
}

impl Loader {
    /// Loads `plugin`, unless it is loaded already.
    ///
    /// # Errors
    /// The file can't be loaded, is not what was inspected, or is of another ABI.
    pub fn load(&mut self, plugin: &Plugin) -> Result<Arc<Loaded>> {
        if let Some(loaded) = self.loaded.get(&plugin.path) {
            return Ok(loaded.clone());
        }
        let loaded = Arc::new(
            open(plugin)
                .with_context(|| format!("plugin {} can't be loaded", plugin.path.display()))?,
        );
        self.loaded.insert(plugin.path.clone(), loaded.clone());
        Ok(loaded)
    }
}

fn open(plugin: &Plugin) -> Result<Loaded> {
    // SAFETY: loading runs the file's constructors. A plugin is trusted code, which the documentation says; its manifest
    // has been read and its ABI compared before.
    let library = unsafe {
        Library::open(
            Some(&plugin.path),
            RTLD_NOW | RTLD_LOCAL | libc::RTLD_NODELETE,
        )?
    };
    // SAFETY: the symbol is a `Root` by the ABI; magic and version are compared before anything else in it is believed.
    let root: &'static Root = unsafe {
        let symbol = library.get::<*const Root>(ROOT_SYMBOL.as_bytes());
        let Ok(symbol) = symbol else {
            bail!("it exports no {ROOT_SYMBOL}: it is not a vmm-host plugin")
        };
        let root: *const Root = *symbol;
        root.as_ref().context("its root is null")?
    };
    std::mem::forget(library);
    check(root, plugin)?;
    // SAFETY: a call by the root's contract: once for each plugin, since the loader keeps what it has loaded.
    let code = unsafe { (root.init)(process::host(&plugin.manifest.name)) };
    if code < 0 {
        bail!(
            "its init fails: {}",
            std::io::Error::from_raw_os_error(-code)
        );
    }
    let build = if root.flags & FLAG_DEBUG != 0 {
        "debug build"
    } else {
        "release build"
    };
    log::debug!(
        "plugin {} {}: loaded {} ({build})",
        plugin.manifest.name,
        plugin.manifest.version,
        plugin.path.display()
    );
    Ok(Loaded {
        name: plugin.manifest.name.clone(),
        version: plugin.manifest.version.to_string(),
        root,
    })
}

fn check(root: &Root, plugin: &Plugin) -> Result<()> {
    if root.magic != MAGIC {
        bail!("its root does not start with the plugin magic: it is not a vmm-host plugin");
    }
    if root.abi_major != ABI_MAJOR {
        bail!(
            "it is built for plugin ABI {}.{}, this host speaks {ABI_MAJOR}.{ABI_MINOR}: install a build for this host",
            root.abi_major,
            root.abi_minor
        );
    }
    if root.manifest.is_null() {
        bail!("its root carries no manifest: it has to be the text that the file's section holds");
    }
    // SAFETY: the root of our ABI major carries the manifest's bytes as a static.
    let manifest = unsafe { std::slice::from_raw_parts(root.manifest, root.manifest_len) };
    let trim = |bytes: &[u8]| {
        bytes
            .iter()
            .rposition(|b| *b != 0)
            .map_or(0, |last| last + 1)
    };
    if manifest[..trim(manifest)] != *plugin.manifest.source.trim_end_matches('\0').as_bytes() {
        bail!(
            "its manifest is not the text in its section {MANIFEST_SECTION}: build it again; if it was replaced meanwhile, run again"
        );
    }
    if root.flags & FLAG_UNWIND == 0 {
        log::warn!(
            "plugin {}: built without unwinding, so a panic in it ends the VM's process",
            plugin.manifest.name
        );
    }
    Ok(())
}

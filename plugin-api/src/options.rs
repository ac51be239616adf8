//! The options an object is created with.

use anyhow::{Context, bail};
use vmm_abi::{OPT_BOOL, OPT_INT, OPT_OBJECT, OPT_TEXT, Opt};

use crate::{BlockDevice, CharDevice, Result};

/// Options by name, as the manifest declares them: the host has checked types, ranges and required keys and filled in
/// defaults. A key that is optional and has no default may be absent.
pub struct Options<'a> {
    opts: &'a [Opt],
}

impl<'a> Options<'a> {
    pub(crate) fn new(opts: &'a [Opt]) -> Self {
        Self { opts }
    }

    fn find(&self, key: &str, kind: u32) -> Result<Option<&'a Opt>> {
        let found = self
            .opts
            .iter()
            .find(|o| crate::export::text(&o.key) == key);
        match found {
            Some(o) if o.kind != kind => {
                bail!(
                    "option `{key}` arrived as kind {}, not {kind}: the manifest and the code disagree",
                    o.kind
                )
            }
            other => Ok(other),
        }
    }

    /// A `bool`; absent reads as false.
    ///
    /// # Errors
    /// The manifest declares another type.
    pub fn bool(&self, key: &str) -> Result<bool> {
        Ok(self.find(key, OPT_BOOL)?.is_some_and(|o| o.int != 0))
    }

    /// A `u32`, `u64` or `size` (bytes), or `None` when absent.
    ///
    /// # Errors
    /// The manifest declares another type.
    pub fn maybe_u64(&self, key: &str) -> Result<Option<u64>> {
        Ok(self.find(key, OPT_INT)?.map(|o| o.int))
    }

    /// A `u32`, `u64` or `size` (bytes).
    ///
    /// # Errors
    /// Absent, or the manifest declares another type.
    pub fn u64(&self, key: &str) -> Result<u64> {
        self.maybe_u64(key)?
            .with_context(|| format!("option `{key}` is missing"))
    }

    /// A `u32`.
    ///
    /// # Errors
    /// Absent, too large, or the manifest declares another type.
    pub fn u32(&self, key: &str) -> Result<u32> {
        let value = self.u64(key)?;
        u32::try_from(value)
            .ok()
            .with_context(|| format!("option `{key}` is {value}, more than {}", u32::MAX))
    }

    /// A `string`, `path`, `readable` or `enum`, or `None` when absent.
    ///
    /// # Errors
    /// The manifest declares another type.
    pub fn maybe_str(&self, key: &str) -> Result<Option<&'a str>> {
        Ok(self
            .find(key, OPT_TEXT)?
            .map(|o| crate::export::text(&o.text)))
    }

    /// A `string`, `path`, `readable` or `enum`.
    ///
    /// # Errors
    /// Absent, or the manifest declares another type.
    pub fn str(&self, key: &str) -> Result<&'a str> {
        self.maybe_str(key)?
            .with_context(|| format!("option `{key}` is missing"))
    }

    /// The block backend that a `ref:block` option names.
    ///
    /// # Errors
    /// Absent, or the object is no block backend.
    pub fn block(&self, key: &str) -> Result<BlockDevice> {
        let opt = self
            .find(key, OPT_OBJECT)?
            .with_context(|| format!("option `{key}` is missing"))?;
        BlockDevice::from_object(opt)
    }

    /// The character backend that a `ref:char` option names, or `None` when absent.
    ///
    /// # Errors
    /// The object is no character backend.
    pub fn maybe_char(&self, key: &str) -> Result<Option<CharDevice>> {
        self.find(key, OPT_OBJECT)?
            .map(CharDevice::from_object)
            .transpose()
    }
}

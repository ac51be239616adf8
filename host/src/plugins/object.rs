//! A device or backend that a plugin made, in the host's hands.

#![allow(unsafe_code)] // calls the plugin's tables

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use vmm_abi::block::{BLOCK, BLOCK_RESIZE, BlockResizeTable, BlockTable};
use vmm_abi::chardev::{CHAR, CharTable};
use vmm_abi::device::EVENTS;
use vmm_abi::{OPT_BOOL, OPT_INT, OPT_OBJECT, OPT_TEXT, Obj, Opt, Sink, Str};

use super::instance::Instance;
use super::layout::take;
use super::loader::Loaded;
use super::schema::{BackendKind, OptionValue};

/// An object, live until [`Object::release`].
pub struct Object {
    obj: Obj,
    instance: &'static Instance,
    /// Backends outlive the objects that use them.
    uses: Vec<Arc<Object>>,
    released: AtomicBool,
}

// SAFETY: the tables' thread rules are kept by the callers; the pointers themselves may move.
unsafe impl Send for Object {}
// SAFETY: as above.
unsafe impl Sync for Object {}

/// The backends that exist, by kind and name.
pub type Backends = BTreeMap<(BackendKind, String), Arc<Object>>;

impl Object {
    /// Lets `plugin` create the object of `kind` (`vmm_abi::KIND_*`) named `name` with checked options. Control thread.
    ///
    /// # Errors
    /// What the plugin reports.
    pub fn create(
        plugin: &Loaded,
        kind: u32,
        name: &str,
        options: &[(String, OptionValue)],
        backends: &Backends,
        instance: &'static Instance,
    ) -> Result<Self> {
        let mut uses = Vec::new();
        let mut opts = Vec::with_capacity(options.len());
        for (key, value) in options {
            opts.push(option(key, value, backends, &mut uses)?);
        }
        let mut obj = Obj::NONE;
        let mut error = Collected::default();
        let sink = error.sink();
        // SAFETY: a call by the root's contract: checked options that live for the call, a host that lives for ever.
        let code = unsafe {
            let (out, err) = (&raw mut obj, &raw const sink);
            (plugin.root.create)(
                instance.host(),
                kind,
                Str::new(name),
                opts.as_ptr(),
                opts.len(),
                out,
                err,
            )
        };
        if code < 0 {
            bail!("{}", error.or_errno(code));
        }
        // SAFETY: the plugin filled `obj`; a base table is static.
        if unsafe { obj.base.as_ref() }.is_none() {
            bail!("the plugin created an object without a base table");
        }
        let object = Self {
            obj,
            instance,
            uses,
            released: AtomicBool::new(false),
        };
        instance.attach(obj.this, object.table(EVENTS)?);
        Ok(object)
    }

    /// The object's table for the interface `name`; `None`: not offered.
    ///
    /// # Errors
    /// The table is not the one that the name stands for.
    pub fn table<T: abi_stable::StableAbi>(&self, name: &str) -> Result<Option<&'static T>> {
        take(&self.obj, name)
    }

    /// Makes sure that a backend is what its kind says.
    ///
    /// # Errors
    /// It offers no such table, or a skewed one.
    pub fn check_backend(&self, kind: BackendKind) -> Result<()> {
        let there = match kind {
            BackendKind::Block => self.table::<BlockTable>(BLOCK)?.is_some(),
            BackendKind::Char => self.table::<CharTable>(CHAR)?.is_some(),
        };
        if !there {
            bail!(
                "the plugin's object is no {} backend: it offers no such table",
                kind.word()
            );
        }
        Ok(())
    }

    /// Whether it was created with one of `backends`.
    pub fn uses_any(&self, backends: &[&Arc<Object>]) -> bool {
        let among = |used: &Arc<Object>| backends.iter().any(|b| Arc::ptr_eq(b, used));
        self.uses.iter().any(among)
    }

    /// Lets a block backend look at the size of its disk again: bytes before and after, or `None` if it does not follow that.
    /// Control thread; those that it uses have looked.
    ///
    /// # Errors
    /// What the plugin reports, or a disk that gets smaller; it has the size that it had.
    pub fn look_again(&self) -> Result<Option<(u64, u64)>> {
        let Some(table) = self.table::<BlockResizeTable>(BLOCK_RESIZE)? else {
            return Ok(None);
        };
        let (mut error, mut after) = (Collected::default(), 0);
        let sink = error.sink();
        // SAFETY: calls by the table's contract on a live object.
        let (before, code) = unsafe {
            let before = (table.bytes)(self.obj.this);
            let code = (table.look_again)(self.obj.this, &raw mut after, &raw const sink);
            (before, code)
        };
        if code < 0 {
            bail!("{}", error.or_errno(code));
        }
        if after < before {
            bail!("the plugin says that its disk has shrunk from {before} to {after} bytes");
        }
        Ok(Some((before, after)))
    }

    /// First argument of the object's functions.
    pub fn this(&self) -> *mut c_void {
        self.obj.this
    }

    /// Its side of the host.
    pub fn instance(&self) -> &'static Instance {
        self.instance
    }

    /// Ends the object, once the I/O thread has left it. Control thread; no vCPU runs, and its users are released. The buses
    /// may still refer to it: they are not asked any more.
    pub fn release(&self) {
        if self.released.swap(true, Ordering::AcqRel) {
            return;
        }
        self.instance.detach();
        // SAFETY: the one release; the base table was checked at creation.
        unsafe { ((*self.obj.base).release)(self.obj.this) };
    }
}

fn option(
    key: &str,
    value: &OptionValue,
    backends: &Backends,
    uses: &mut Vec<Arc<Object>>,
) -> Result<Opt> {
    let (kind, int, text, obj) = match value {
        OptionValue::Bool(on) => (OPT_BOOL, u64::from(*on), "", Obj::NONE),
        OptionValue::Int(number) => (OPT_INT, *number, "", Obj::NONE),
        OptionValue::Text(text) => (OPT_TEXT, 0, text.as_str(), Obj::NONE),
        OptionValue::Ref(kind, name) => {
            let backend = backends.get(&(*kind, name.clone()));
            let backend =
                backend.with_context(|| format!("{}.{name} does not exist yet", kind.table()))?;
            uses.push(backend.clone());
            (OPT_OBJECT, 0, name.as_str(), backend.obj)
        }
    };
    Ok(Opt {
        key: Str::new(key),
        kind,
        reserved: 0,
        int,
        text: Str::new(text),
        obj,
    })
}

/// Collects what a plugin writes to a [`Sink`].
#[derive(Default)]
pub(super) struct Collected(Vec<u8>);

/// More error text than anybody reads.
const MAX_TEXT: usize = 64 << 10;

impl Collected {
    pub(super) fn sink(&mut self) -> Sink {
        unsafe extern "C" fn write(ctx: *mut c_void, ptr: *const u8, len: usize) {
            // SAFETY: `ctx` is the `Collected` that made this sink.
            let text = unsafe { &mut (*ctx.cast::<Collected>()).0 };
            let len = len.min(MAX_TEXT - text.len().min(MAX_TEXT));
            if len > 0 {
                // SAFETY: the ABI promises at least `len` bytes.
                text.extend_from_slice(unsafe { std::slice::from_raw_parts(ptr, len) });
            }
        }
        Sink {
            ctx: std::ptr::from_mut(self).cast(),
            write,
        }
    }

    pub(super) fn or_errno(self, code: i32) -> String {
        if self.0.is_empty() {
            return std::io::Error::from_raw_os_error(-code).to_string();
        }
        String::from_utf8_lossy(&self.0).into_owned()
    }
}

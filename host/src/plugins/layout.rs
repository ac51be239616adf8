//! Taking a table from a plugin: by name, and only when its layout is proved to be ours.
//!
//! The check compares abi_stable's record of the table in the plugin with the one in the host. It is deep, and its own report fills
//! hundreds of lines, of which one says what differs.

#![allow(unsafe_code)] // what a plugin answers becomes references here

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use abi_stable::StableAbi;
use abi_stable::abi_stability::abi_checking::{AbiInstabilityErrors, check_layout_compatibility};
use abi_stable::type_layout::TypeLayout;
use anyhow::{Result, bail};
use vmm_abi::{Iface, LAYOUT_ABI_STABLE_0_11, Obj, Str};

/// Pairs of layout records (ours, the plugin's) that have been compared: a record is a static of its plugin.
static PROVED: Mutex<BTreeSet<(usize, usize)>> = Mutex::new(BTreeSet::new());

/// The table that `obj` offers under `name`; `None`: it offers none.
///
/// # Errors
/// The table has another layout than ours: one line that says where.
pub fn take<T: StableAbi>(obj: &Obj, name: &str) -> Result<Option<&'static T>> {
    // SAFETY: the object is live, and its base table is static; see `Object::create`.
    let iface = unsafe { ((*obj.base).interface)(obj.this, Str::new(name)) };
    if iface.table.is_null() {
        return Ok(None);
    }
    prove::<T>(&iface, name)?;
    // SAFETY: the name stands for this table for ever, as far as a record exists it is proved, and tables are static.
    Ok(unsafe { iface.table.cast::<T>().as_ref() })
}

fn prove<T: StableAbi>(iface: &Iface, name: &str) -> Result<()> {
    if iface.layout.is_null() || iface.layout_kind != LAYOUT_ABI_STABLE_0_11 {
        log::debug!("{name}: the plugin carries no layout record, its table is taken on trust");
        return Ok(());
    }
    let pair = (
        std::ptr::from_ref(T::LAYOUT) as usize,
        iface.layout as usize,
    );
    let mut proved = PROVED.lock().unwrap_or_else(PoisonError::into_inner);
    if proved.contains(&pair) {
        return Ok(());
    }
    // SAFETY: `layout_kind` says that it is a `TypeLayout` of abi_stable 0.11, whose layout is stable within 0.11; it is a static.
    let theirs: &'static TypeLayout = unsafe { &*iface.layout.cast() };
    if let Err(error) = check_layout_compatibility(T::LAYOUT, theirs) {
        bail!("the plugin's {name} table is not ours: {}", shorten(&error));
    }
    proved.insert(pair);
    Ok(())
}

/// The first difference, such as `read.param_3: Name(ExpectedFound { expected: u32, found: u8 })`.
fn shorten(error: &AbiInstabilityErrors) -> String {
    let Some((trace, difference)) = error
        .errors
        .iter()
        .find_map(|e| Some((&e.stack_trace, e.errs.iter().next()?)))
    else {
        return "the layouts differ".to_owned();
    };
    let place: Vec<String> = trace.iter().map(|step| step.expected.to_string()).collect();
    let text = format!("{}: {difference:?}", place.join("."));
    let line: Vec<&str> = text.split_whitespace().collect();
    line.join(" ").chars().take(300).collect()
}

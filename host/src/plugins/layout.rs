//! Taking a table from a plugin: by name, and only when its layout is proved to be ours.
//!
//! The check compares abi_stable's record of the table in the plugin with the one in the host. It is deep, and its own report fills
//! hundreds of lines, of which one says what differs.

#![allow(unsafe_code)] // what a plugin answers becomes references here

use std::collections::BTreeSet;
use std::fmt::Display;
use std::sync::{Mutex, PoisonError};

use abi_stable::StableAbi;
use abi_stable::abi_stability::abi_checking::{
    AbiInstability, AbiInstabilityErrors, check_layout_compatibility,
};
use abi_stable::type_layout::{TLFieldOrFunction, TypeLayout};
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
        bail!(
            "the plugin's table {name} differs: {}; build it against a vmm-plugin-api with the table as published",
            shorten(&error)
        );
    }
    proved.insert(pair);
    Ok(())
}

/// The first difference, such as `read.param_2: expected u64, found u32`. Parameters count from 0, which is the object.
fn shorten(error: &AbiInstabilityErrors) -> String {
    let first = error
        .errors
        .iter()
        .find_map(|error| Some((&error.stack_trace, error.errs.iter().next()?)));
    let Some((trace, difference)) = first else {
        return "the layouts differ".to_owned();
    };
    let mut place: Vec<&str> = trace.iter().map(|step| step_name(&step.expected)).collect();
    // A function pointer is a field and its function, both of one name.
    place.dedup();
    let difference = describe(difference);
    let text = match place.is_empty() {
        true => difference,
        false => format!("{}: {difference}", place.join(".")),
    };
    // What has no wording of its own may fill many lines.
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(300).collect()
}

fn step_name(step: &TLFieldOrFunction) -> &'static str {
    match step {
        TLFieldOrFunction::Field(field) => field.name(),
        TLFieldOrFunction::Function(function) => function.name.as_str(),
    }
}

fn describe(difference: &AbiInstability) -> String {
    fn differ(what: &str, expected: impl Display, found: impl Display) -> String {
        format!("expected {what}{expected}, found {what}{found}")
    }
    use AbiInstability as Kind;
    match difference {
        Kind::Name(e) => differ("", e.expected, e.found),
        Kind::Package(e) => differ("a type of package ", e.expected, e.found),
        Kind::PackageVersion(e) => differ("package version ", e.expected, e.found),
        Kind::Size(e) => differ("size ", e.expected, e.found),
        Kind::Alignment(e) => differ("alignment ", e.expected, e.found),
        Kind::FieldCountMismatch(e) => differ("a count of members of ", e.expected, e.found),
        Kind::UnexpectedField(e) => differ("", e.expected.name(), e.found.name()),
        Kind::FnQualifierMismatch(e) => differ("", e.expected, e.found),
        other => format!("{other:?}"),
    }
}

//! The `[dev.NAME]` tables.

use std::collections::BTreeMap;

use super::document::Table;
use super::main_table::on_fault;
use super::options::{self, OptionTable};
use super::source::{Problems, Source, Span};
use super::spelling::misspelt;
use super::values::Field;
use super::vm_config::{DeviceConfig, OnFault, Place};
use crate::pci::Bdf;
use crate::plugins::manifest::BusKind;
use crate::plugins::registry::{DriverEntry, Registry};

/// Keys of a device that the host takes itself, by bus.
const ISA_KEYS: [&str; 2] = ["driver", "on_fault"];
const PCI_KEYS: [&str; 3] = ["driver", "pci-path", "on_fault"];

/// The chipset's own functions (82441FX and 82371SB/EB, as propolis places them).
const CHIPSET: [(&str, &str); 3] = [
    ("0.0.0", "host bridge"),
    ("0.1.0", "ISA bridge"),
    ("0.1.3", "power management function"),
];

/// A device with the places that problems found later point to.
#[derive(Debug)]
pub struct Device {
    /// The result.
    pub config: DeviceConfig,
    /// Where each key's value is.
    pub values: BTreeMap<String, Span>,
}

/// What the tables are read against.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The texts, for places.
    pub sources: &'a [Source],
    /// The plugins.
    pub registry: &'a Registry,
    /// `[main] on_fault`.
    pub on_fault: OnFault,
}

/// The devices' PCI addresses, each with its device's table and the place where it was given.
type Slots = BTreeMap<Bdf, (String, Span)>;

/// Reads all devices, in alphabetical order.
pub fn read(group: &Table, context: Context<'_>, problems: &mut Problems) -> Vec<Device> {
    let mut slots = Slots::new();
    let mut devices = Vec::new();
    for (name, entry) in group {
        options::check_name("dev", name, entry, problems);
        let field = Field {
            table: "dev",
            name,
            entry,
        };
        let Some(table) = field.table(problems) else {
            continue;
        };
        let label = format!("dev.{name}");
        let place = OptionTable {
            name: &label,
            table,
            entry,
        };
        devices.extend(device(name, place, group, context, &mut slots, problems));
    }
    warn_of_hidden_functions(&slots, problems);
    devices
}

fn device(
    name: &str,
    place: OptionTable<'_>,
    others: &Table,
    context: Context<'_>,
    slots: &mut Slots,
    problems: &mut Problems,
) -> Option<Device> {
    let pci = pci_path(place, context.sources, slots, problems);
    let driver = driver(place, others, context.registry, problems)?;
    let schema = driver.driver();
    let host_keys = match schema.bus {
        BusKind::Pci => PCI_KEYS.as_slice(),
        BusKind::Isa => ISA_KEYS.as_slice(),
    };
    if schema.bus == BusKind::Pci
        && place.field("pci-path").is_none()
        && !misspelt("pci-path", place.table.keys(), PCI_KEYS.into_iter())
    {
        problems
            .error(
                place.entry.key,
                format!("[{}] lacks the key `pci-path`", place.name),
            )
            .help(format!(
                "{} needs a PCI address, as in pci-path = \"0.4.0\"",
                schema.name
            ))
            .absent();
    }
    let options = options::read(place, &schema.name, &schema.options, host_keys, problems);
    let fault = place
        .field("on_fault")
        .and_then(|field| on_fault(&field, problems));
    Some(Device {
        values: place.places(),
        config: DeviceConfig {
            name: name.to_string(),
            pci: pci.filter(|_| schema.bus == BusKind::Pci),
            on_fault: fault.unwrap_or(context.on_fault),
            options,
            place: Place::of(place.entry.key, context.sources),
            driver,
        },
    })
}

fn driver(
    place: OptionTable<'_>,
    others: &Table,
    registry: &Registry,
    problems: &mut Problems,
) -> Option<DriverEntry> {
    let Some(field) = place.field("driver") else {
        place
            .lacks("driver", others, problems)
            .help("`vmm-host plugins` lists the drivers");
        return None;
    };
    let name = field.name(problems)?;
    place.found(registry.driver(name), field, problems)
}

/// Reads `pci-path` and takes the address.
fn pci_path(
    place: OptionTable<'_>,
    sources: &[Source],
    slots: &mut Slots,
    problems: &mut Problems,
) -> Option<Bdf> {
    let field = place.field("pci-path")?;
    let text = field.text(problems)?;
    let at = field.entry.at;
    let bdf = match text.parse::<Bdf>() {
        Ok(bdf) => bdf,
        Err(error) => {
            problems.error(at, format!("`pci-path` in [{}]: {error}", place.name));
            return None;
        }
    };
    if let Some((_, what)) = CHIPSET.iter().find(|(path, _)| *path == bdf.to_string()) {
        problems
            .error(
                at,
                format!(
                    "`pci-path` in [{}]: {bdf} is the chipset's {what}",
                    place.name
                ),
            )
            .help("free: 0.2.0 to 0.31.7");
        return None;
    }
    if let Some((other, other_at)) = slots.get(&bdf) {
        problems
            .error(
                at,
                format!(
                    "`pci-path` in [{}]: {bdf} is taken by [{other}]",
                    place.name
                ),
            )
            .help(format!("there: {}", Place::of(*other_at, sources)));
        return None;
    }
    slots.insert(bdf, (place.name.to_string(), at));
    Some(bdf)
}

/// Guests look at functions 1 to 7 of a device only if there is a function 0 (PCI Local Bus 3.0, 3.2.2.3.4).
fn warn_of_hidden_functions(slots: &Slots, problems: &mut Problems) {
    for (bdf, (label, at)) in slots {
        let chipset_device = bdf.device() == 1;
        let has_zero = Bdf::new(bdf.device(), 0).is_some_and(|zero| slots.contains_key(&zero));
        if bdf.function() != 0 && !chipset_device && !has_zero {
            problems.warning(
                *at,
                format!(
                    "guests won't find [{label}]: nothing is at 0.{}.0, function 0 of the same device",
                    bdf.device()
                ),
            );
        }
    }
}

//! Prints what plugins say about themselves: `vmm-host plugins`, and the option reference.

use std::fmt::Write as _;

use super::manifest::{BusKind, Manifest};
use super::registry::{Registry, Role};
use super::schema::{BackendKind, OptionSpec, OptionType};
use super::search::Plugin;
use crate::config::spelling::suggestion;
use crate::config::values::{listed_or, size_text};

/// A driver or backend type, whichever it is.
struct Item<'a> {
    role: Role,
    name: &'a str,
    about: &'a str,
    bus: Option<BusKind>,
    os: &'a [String],
    options: &'a [OptionSpec],
    shared: &'a [OptionSpec],
}

fn items(manifest: &Manifest) -> Vec<Item<'_>> {
    let drivers = manifest.drivers.iter().map(|driver| Item {
        role: Role::Driver,
        name: &driver.name,
        about: &driver.about,
        bus: Some(driver.bus),
        os: &driver.os,
        options: &driver.options,
        shared: &[],
    });
    let backends = manifest.backends.iter().map(|backend| Item {
        role: Role::Backend(backend.kind),
        name: &backend.name,
        about: &backend.about,
        bus: None,
        os: &backend.os,
        options: &backend.options,
        shared: &backend.shared,
    });
    drivers.chain(backends).collect()
}

impl Item<'_> {
    /// Name, type, default and meaning of each option.
    fn rows(&self) -> impl Iterator<Item = [String; 4]> {
        let shared = |option: &OptionSpec| match option.shared {
            true => format!("In [{}], for all of them: {}", self.name, option.about),
            false => option.about.clone(),
        };
        self.options.iter().chain(self.shared).map(move |option| {
            [
                option.name.clone(),
                type_text(option),
                default_text(option),
                shared(option),
            ]
        })
    }

    /// The line of a VM file that chooses it, and the table where that line goes.
    fn usage(&self) -> (String, &'static str) {
        match self.role {
            Role::Driver => (format!("driver = \"{}\"", self.name), "[dev.NAME]"),
            Role::Backend(BackendKind::Block) => {
                (format!("type = \"{}\"", self.name), "[block_dev.NAME]")
            }
            Role::Backend(BackendKind::Char) => {
                (format!("type = \"{}\"", self.name), "[char_dev.NAME]")
            }
        }
    }
}

/// The table of all plugins, the files that were skipped, and the directories that were searched.
pub fn list(registry: &Registry) -> String {
    let mut rows = vec![
        ["PLUGIN", "VERSION", "ABI", "PROVIDES", "FILE"]
            .map(str::to_string)
            .to_vec(),
    ];
    for plugin in registry.plugins() {
        let manifest = &plugin.manifest;
        rows.push(vec![
            manifest.name.clone(),
            manifest.version.clone(),
            manifest.abi.to_string(),
            provides(manifest),
            plugin.path.display().to_string(),
        ]);
    }
    let mut out = String::new();
    if registry.plugins().is_empty() {
        out.push_str("No plugin was found. Name their directory with --plugin-path.\n");
    } else {
        out.push_str(&columns(&rows, ""));
    }
    let conflicts: Vec<String> = registry
        .conflicts()
        .flat_map(|(role, name, plugins)| {
            plugins
                .into_iter()
                .map(move |plugin| format!("{role} {name}: {}", plugin.path.display()))
        })
        .collect();
    section(
        &mut out,
        "Refused, since two plugins of one directory claim the name:",
        &conflicts,
    );
    let skipped: Vec<String> = registry.skipped().iter().map(ToString::to_string).collect();
    section(&mut out, "Skipped:", &skipped);
    let searched: Vec<String> = registry
        .directories()
        .iter()
        .map(|directory| format!("{} ({})", directory.path.display(), directory.origin))
        .collect();
    section(&mut out, "Searched, in this order:", &searched);
    out
}

fn section(out: &mut String, title: &str, lines: &[String]) {
    if lines.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n{title}");
    for line in lines {
        let _ = writeln!(out, "  {line}");
    }
}

fn provides(manifest: &Manifest) -> String {
    let mut words = Vec::new();
    for (title, role) in [
        ("driver", Role::Driver),
        ("block", Role::Backend(BackendKind::Block)),
        ("char", Role::Backend(BackendKind::Char)),
    ] {
        let names: Vec<&str> = items(manifest)
            .into_iter()
            .filter(|item| item.role == role)
            .map(|item| item.name)
            .collect();
        if !names.is_empty() {
            words.push(format!("{title} {}", names.join(",")));
        }
    }
    words.join("; ")
}

/// Everything about the plugin, driver or backend type called `name`; an error line if there is none.
pub fn describe(registry: &Registry, name: &str) -> Result<String, String> {
    let mut out = String::new();
    for plugin in registry.plugins() {
        let whole = plugin.manifest.name == name;
        let wanted: Vec<Item<'_>> = items(&plugin.manifest)
            .into_iter()
            .filter(|item| whole || item.name == name)
            .collect();
        if !whole && wanted.is_empty() {
            continue;
        }
        if !out.is_empty() {
            out.push('\n');
        }
        heading(&mut out, plugin);
        for item in wanted {
            item_text(&mut out, &item);
        }
    }
    if !out.is_empty() {
        return Ok(out);
    }
    let known = registry.plugins().iter().flat_map(|plugin| {
        let manifest = &plugin.manifest;
        items(manifest)
            .into_iter()
            .map(|item| item.name)
            .chain([manifest.name.as_str()])
    });
    let help = suggestion(name, known).map_or(String::new(), |help| format!("; {help}"));
    Err(format!(
        "no plugin, driver or backend type is called \"{name}\"{help} (`vmm-host plugins` lists all)"
    ))
}

fn heading(out: &mut String, plugin: &Plugin) {
    let manifest = &plugin.manifest;
    let _ = write!(
        out,
        "Plugin {} {}, ABI {}",
        manifest.name, manifest.version, manifest.abi
    );
    if !manifest.license.is_empty() {
        let _ = write!(out, ", {}", manifest.license);
    }
    out.push('\n');
    for line in [manifest.about.as_str(), &plugin.path.display().to_string()] {
        if !line.is_empty() {
            let _ = writeln!(out, "  {line}");
        }
    }
}

fn item_text(out: &mut String, item: &Item<'_>) {
    let (usage, table) = item.usage();
    let _ = writeln!(out, "\n  {usage}  in {table}");
    if !item.about.is_empty() {
        let _ = writeln!(out, "    {}", item.about);
    }
    if item.bus == Some(BusKind::Pci) {
        let _ = writeln!(
            out,
            "    On the PCI bus: needs pci-path, as in pci-path = \"0.4.0\"."
        );
    }
    if !item.os.is_empty() {
        let _ = writeln!(out, "    Works on {} only.", listed_or(item.os));
    }
    if item.rows().next().is_none() {
        let _ = writeln!(out, "    Takes no options.");
        return;
    }
    let mut rows = vec![
        ["OPTION", "TYPE", "DEFAULT", "ABOUT"]
            .map(str::to_string)
            .to_vec(),
    ];
    rows.extend(item.rows().map(Vec::from));
    out.push_str(&columns(&rows, "    "));
}

/// The type with its range or words: `u32 1..64`, `com1|com2`.
fn type_text(option: &OptionSpec) -> String {
    let bound = |number: u64| match option.kind {
        OptionType::Size => size_text(number),
        _ => number.to_string(),
    };
    match (&option.kind, option.range) {
        (OptionType::Enum(words), _) => words.join("|"),
        (kind, Some((min, u64::MAX))) => format!("{kind} {}..", bound(min)),
        (kind, Some((min, max))) => format!("{kind} {}..{}", bound(min), bound(max)),
        (kind, None) => kind.to_string(),
    }
}

fn default_text(option: &OptionSpec) -> String {
    if option.required {
        return "required".to_string();
    }
    match option.default_text() {
        text if text.is_empty() => "-".to_string(),
        text => text,
    }
}

/// Rows as columns of equal width; the last is left as it is.
fn columns(rows: &[Vec<String>], indent: &str) -> String {
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..rows.first().map_or(0, Vec::len)).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let line: String = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}  "))
            .collect();
        let _ = writeln!(out, "{indent}{}", line.trim_end());
    }
    out
}

/// The option reference as a Markdown page: all plugins in the order of their names, without file names.
pub fn markdown(registry: &Registry) -> String {
    let mut plugins: Vec<&Plugin> = registry.plugins().iter().map(AsRef::as_ref).collect();
    plugins.sort_by(|a, b| a.manifest.name.cmp(&b.manifest.name));
    let mut out = String::from(
        "# Drivers, backends and their options\n\n\
         Generated from the plugins' manifests by `vmm-host plugins --markdown`; a test keeps it current. \
         `vmm-host plugins NAME` shows the same for the plugins that are installed, whoever wrote them.\n",
    );
    for plugin in plugins {
        let manifest = &plugin.manifest;
        let _ = writeln!(out, "\n## Plugin `{}`\n\n{}", manifest.name, manifest.about);
        for item in items(manifest) {
            markdown_item(&mut out, &item);
        }
    }
    out
}

fn markdown_item(out: &mut String, item: &Item<'_>) {
    let (usage, table) = item.usage();
    let _ = writeln!(out, "\n### `{usage}` in `{table}`\n\n{}", item.about);
    if item.bus == Some(BusKind::Pci) {
        out.push_str("\nOn the PCI bus: `pci-path` is required.\n");
    }
    if !item.os.is_empty() {
        let _ = writeln!(out, "\nWorks on {} only.", listed_or(item.os));
    }
    if item.rows().next().is_none() {
        out.push_str("\nTakes no options.\n");
        return;
    }
    out.push_str("\n| option | type | default | about |\n|---|---|---|---|\n");
    for row in item.rows() {
        // A bar would end the cell.
        let [name, kind, default, about] = row.map(|text| text.replace('|', "\\|"));
        let _ = writeln!(out, "| `{name}` | {kind} | {default} | {about} |");
    }
}

//! The VM file: TOML to a checked [`VmConfig`], or a report of everything that is wrong with it.
//!
//! Each file is read into a tree that knows where each key was written ([`document`]); the files are laid over each other and
//! over the profile ([`layers`], [`profile`]), and every table is checked against what the plugins' manifests declare. No plugin code runs
//! and no resource is created here. Nothing else in the host knows TOML.

mod backends;
mod backing;
pub mod boot;
pub mod cpuid;
mod cpus;
mod devices;
pub mod document;
mod fw_cfg;
mod images;
mod layers;
mod main_table;
pub mod options;
pub mod profile;
mod references;
mod shared;
mod smbios_table;
pub mod source;
pub mod spelling;
pub mod values;
mod vm_config;

use std::io::Read;
use std::path::{Path, PathBuf};

pub use vm_config::{
    BUILTIN_KERNELS, BackendConfig, Boot, BootKernel, Bootrom, DebugConfig, DeviceConfig,
    DirectKernel, FwCfgContents, FwCfgFile, OnFault, Place, VmConfig,
};

use document::{Table, Value};
use source::{Problems, Report, Severity, Source, Span};
use spelling::suggestion;
use values::{Field, refuse_unknown};

use crate::hypervisor::Kind;
use crate::hypervisor::backing::memory_of_machine;
use crate::plugins::registry::{BackendEntry, Registry};
use crate::plugins::schema::BackendKind;
use crate::plugins::search::{Candidates, Origin, SearchOptions, candidates};

/// No VM file is longer, even if it has data for the guest in it; what is was given by mistake.
const FILE_MAX: u64 = 64 << 20;

const TABLES: [&str; 8] = [
    "main",
    "smbios",
    "plugins",
    "dev",
    "block_dev",
    "char_dev",
    "cpuid",
    "fw_cfg",
];

/// A VM file that can be run.
#[derive(Debug)]
pub struct Loaded {
    /// What it describes.
    pub config: VmConfig,
    /// The plugins that were found on the way.
    pub registry: Registry,
    /// Holds warnings only; nothing to print if it has no problems.
    pub warnings: Report,
}

/// Reads the VM files at `paths`, each laid over those before it, and checks what they make, with all plugins of the search
/// path, for a VM of `hypervisor`. On an error the report holds every problem of them.
pub fn load(
    paths: &[PathBuf],
    search_options: &SearchOptions,
    hypervisor: Kind,
) -> Result<Loaded, Report> {
    let mut problems = Problems::default();
    let mut sources = Vec::new();
    for path in paths {
        let name = path.display().to_string();
        match read_file(path) {
            Ok(text) => sources.push(Source { name, text }),
            Err(why) => drop(problems.error_nowhere(format!("{name}: {why}"))),
        }
    }
    if sources.len() < paths.len() {
        return Err(Report::new(String::new(), Vec::new(), problems, Vec::new()));
    }
    let files = (0..).zip(&sources);
    let files: Vec<Table> = files
        .map(|(index, source)| document::parse(&source.text, index, &mut problems))
        .collect();
    let syntax = problems.list.len();
    let root = laid(files, &mut sources, &mut problems);

    let directories = plugin_path(&root, paths, &mut problems);
    let candidates = candidates(search_options.directories(&directories));
    if problems.list.is_empty()
        && let Some((config, registry)) = check_for_start(&root, &sources, &candidates, hypervisor)
    {
        let warnings = Report::new(title(paths), sources, problems, Vec::new());
        return Ok(Loaded {
            config,
            registry,
            warnings,
        });
    }
    let registry = Registry::new(candidates.read());
    report_unsearchable(&registry, &mut problems);
    let sharing = match only_known_tables(&root) {
        true => Vec::new(),
        false => registry.sharing(),
    };
    refuse_tables(&root, &sharing, &mut problems);
    let config = check(
        &root,
        &sources,
        &registry,
        &sharing,
        hypervisor,
        &mut problems,
    );
    drop_consequences(&mut problems, syntax, &sources[..paths.len()]);

    let failed = problems.any_error();
    let notes = if problems.list.iter().any(|problem| problem.lookup) {
        registry.search_notes()
    } else {
        Vec::new()
    };
    let report = Report::new(title(paths), sources, problems, notes);
    match config {
        Some(config) if !failed => Ok(Loaded {
            config,
            registry,
            warnings: report,
        }),
        _ => Err(report),
    }
}

fn only_known_tables(root: &Table) -> bool {
    root.keys().all(|key| TABLES.contains(&key.as_str()))
}

/// Checks files in which nothing is wrong, for which the manifests of the plugins that they name are enough. `None` if there
/// is anything to say about them: who says it should know all plugins.
fn check_for_start(
    root: &Table,
    sources: &[Source],
    candidates: &Candidates,
    hypervisor: Kind,
) -> Option<(VmConfig, Registry)> {
    if !candidates.complete() || !only_known_tables(root) {
        return None;
    }
    let registry = Registry::new(candidates.read_for(&names_of_plugins(root)));
    let mut problems = Problems::default();
    let config = check(root, sources, &registry, &[], hypervisor, &mut problems)?;
    problems.list.is_empty().then_some((config, registry))
}

/// What the file names by `driver` and `type`.
fn names_of_plugins(root: &Table) -> Vec<&str> {
    let tables = ["dev", "block_dev", "char_dev"].map(|name| root.get(name));
    let tables = tables.into_iter().flatten().map(|entry| &entry.value);
    let mut names = Vec::new();
    for table in tables {
        let Value::Table(table) = table else { continue };
        for entry in table.values() {
            let Value::Table(keys) = &entry.value else {
                continue;
            };
            for name in ["driver", "type"].iter().filter_map(|key| keys.get(*key)) {
                if let Value::Text(name) = &name.value {
                    names.push(name.as_str());
                }
            }
        }
    }
    names
}

/// What the VM files at `paths` are called together.
pub fn title(paths: &[PathBuf]) -> String {
    let names: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    names.join(" + ")
}

fn read_file(path: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    let mut file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    file.by_ref()
        .take(FILE_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(format!("not a VM file: it has more than {FILE_MAX} bytes"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count();
        format!("not UTF-8 text, line {}", line + 1)
    })
}

/// Lays the files over each other and over the profile that they choose, whose text becomes one of the sources.
fn laid(files: Vec<Table>, sources: &mut Vec<Source>, problems: &mut Problems) -> Table {
    // Which one that is, is known when the files are laid over each other; what is wrong with that is said below.
    let mut alone = Table::new();
    for file in files.iter().cloned() {
        layers::lay(&mut alone, file, &mut Problems::default());
    }
    let wanted = main_table::profile_name(&alone);
    let mut root = Table::new();
    if let Some((name, text)) = profile::PROFILES.iter().find(|(name, _)| *name == wanted) {
        root = document::parse(text, sources.len(), problems);
        sources.push(Source {
            name: format!("profile {name}"),
            text: (*text).to_string(),
        });
    }
    for file in files {
        layers::lay(&mut root, file, problems);
    }
    root
}

fn refuse_tables(root: &Table, sharing: &[BackendEntry], problems: &mut Problems) {
    let shared = sharing.iter().map(|entry| entry.backend().name.as_str());
    let known: Vec<&str> = TABLES.into_iter().chain(shared).collect();
    for (key, entry) in root {
        if !known.contains(&key.as_str()) {
            let problem = problems.error(entry.key, format!("there is no table or key `{key}`"));
            if let Some(help) = suggestion(key, known.iter().copied().chain([layers::REMOVE])) {
                problem.help(help);
            } else if main_table::KEYS.contains(&key.as_str()) {
                problem.help(format!("`{key}` belongs below [main]"));
            }
            problem.help(format!("accepted: [{}]", known.join("], [")));
        }
    }
}

/// The sub-tables of a top-level table, empty if it is absent; reported if it is something else.
fn group<'a>(root: &'a Table, name: &str, problems: &mut Problems) -> Option<(&'a Table, Span)> {
    let entry = root.get(name)?;
    match &entry.value {
        Value::Table(table) => Some((table, entry.key)),
        other => {
            problems.error(
                entry.at,
                format!("expected a table [{name}], found {}", other.describe()),
            );
            None
        }
    }
}

/// `[plugins] path`, relative to the directory of the VM file that it stands in.
fn plugin_path(root: &Table, files: &[PathBuf], problems: &mut Problems) -> Vec<(Span, PathBuf)> {
    let Some((table, _)) = group(root, "plugins", problems) else {
        return Vec::new();
    };
    refuse_unknown("plugins", table, &["path"], problems);
    let Some(entry) = table.get("path") else {
        return Vec::new();
    };
    let field = Field {
        table: "plugins",
        name: "path",
        entry,
    };
    let base = files
        .get(entry.at.source)
        .and_then(|file| file.parent())
        .unwrap_or(Path::new(""));
    field
        .texts(problems)
        .unwrap_or_default()
        .into_iter()
        .map(|(at, path)| (at, base.join(path)))
        .collect()
}

fn report_unsearchable(registry: &Registry, problems: &mut Problems) {
    for refused in registry.unsearchable() {
        match refused.directory.origin {
            Origin::VmFile(at) => problems.error(at, refused.to_string()),
            _ => problems.error_nowhere(refused.to_string()),
        };
    }
}

fn check(
    root: &Table,
    sources: &[Source],
    registry: &Registry,
    sharing: &[BackendEntry],
    hypervisor: Kind,
    problems: &mut Problems,
) -> Option<VmConfig> {
    let profiles = group(root, "cpuid", problems)
        .map(|(table, _)| cpuid::read(table, sources, problems))
        .unwrap_or_default();
    let main = match group(root, "main", problems) {
        Some((table, at)) => {
            let host = main_table::HostMachine {
                hypervisor,
                memory: memory_of_machine(),
            };
            Some(main_table::read(table, at, host, &profiles, problems))
        }
        None => {
            if !root.contains_key("main") {
                problems
                    .error(Span::default(), "there is no [main] table")
                    .help("it gives at least `name`, `cpus`, `memory` and `kernel` or `bootrom`")
                    .absent();
            }
            None
        }
    };
    let mut smbios = smbios_table::read(
        group(root, "smbios", problems).map(|(table, _)| table),
        problems,
    );
    let empty = Table::new();
    let mut tables = |name| group(root, name, problems).map_or(&empty, |(table, _)| table);
    let device_tables = tables("dev");
    let fw_cfg_tables = tables("fw_cfg");
    let backend_tables = BackendKind::ALL.map(|kind| (kind, tables(kind.table())));

    let context = devices::Context {
        sources,
        registry,
        on_fault: main.as_ref().map(|main| main.on_fault).unwrap_or_default(),
    };
    let devices = devices::read(device_tables, context, problems);
    let mut all = std::collections::BTreeMap::new();
    for (kind, table) in backend_tables {
        all.append(&mut backends::read(
            kind, table, sources, registry, problems,
        ));
    }
    shared::read(root, sharing, &mut all, problems);
    let backends = references::resolve(&devices, all, sources, problems);
    if let Some(Value::Table(main)) = root.get("main").map(|entry| &entry.value)
        && main.contains_key("bootrom")
    {
        boot::check_order(main, device_tables, &devices, problems);
    }
    let fw_cfg = fw_cfg::read(fw_cfg_tables, sources, problems);
    let main = main?;
    if let Some(version) = main.bootrom_version {
        smbios.firmware_version = version;
    }
    let board = profile::board(main_table::profile_name(root), &devices);
    let mut cpu_model = main.cpus.model;
    cpu_model.x2apic = board.legacy || main.cpus.count > 1;
    Some(VmConfig {
        smbios,
        name: main.name,
        cpus: main.cpus.count,
        cpu_model,
        cpu_binding: main.cpus.binding,
        memory_bytes: main.memory_bytes,
        backing: main.backing,
        board,
        boot: main.boot,
        fw_cfg,
        debug_port: main.debug_port,
        exit_on_halt: main.exit_on_halt,
        exit_on_reboot: main.exit_on_reboot,
        devices: devices.into_iter().map(|device| device.config).collect(),
        backends,
    })
}

/// Where a text did not parse, what the rest of it seems to say is not trusted: the first `syntax` problems are kept,
/// and of the others those that are not about something missing and not on a line that could not be read.
fn drop_consequences(problems: &mut Problems, syntax: usize, files: &[Source]) {
    if syntax == 0 {
        return;
    }
    let line = |at: Option<Span>| {
        let at = at?;
        Some((at.source, files.get(at.source)?.line(at.start)))
    };
    let broken: Vec<_> = problems.list[..syntax]
        .iter()
        .map(|problem| line(problem.at))
        .collect();
    let mut index = 0;
    problems.list.retain(|problem| {
        index += 1;
        let consequence = problem.absence
            || problem.severity == Severity::Warning
            || (problem.at.is_some() && broken.contains(&line(problem.at)));
        index <= syntax || !consequence
    });
}

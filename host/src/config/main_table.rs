//! The `[main]` table.

use std::path::Path;

use super::backing;
use super::boot;
use super::cpus::{self, Cpus, Profiles};
use super::document::{Table, Value};
use super::profile::PROFILES;
use super::smbios_table;
use super::source::{Problems, Span};
use super::spelling::misspelt;
use super::values::{Field, refuse_unknown, size_text};
use super::vm_config::{Boot, DebugConfig, OnFault};
use crate::hypervisor::Kind;
use crate::hypervisor::backing::Backing;

/// Keys of `[main]`, the last two of which exist for propolis files.
pub const KEYS: [&str; 29] = [
    "name",
    "hypervisor",
    "cpus",
    "sockets",
    "cores",
    "threads",
    "topology",
    "cpu_binding",
    "cpuid_profile",
    "memory",
    "hugepages",
    "prefault",
    "memory_file",
    "use_reservoir",
    "kernel",
    "initrd",
    "cmdline",
    "exit_on_halt",
    "exit_on_reboot",
    "profile",
    "on_fault",
    "debug_port",
    "bootrom",
    "bootrom_version",
    "bootrom_vars",
    "bootrom_vars_template",
    "boot_order",
    "acpi_variant",
    "hv_interface",
];

/// Those that name files which something is in.
const FILES: [&str; 6] = [
    "kernel",
    "initrd",
    "bootrom",
    "bootrom_vars",
    "bootrom_vars_template",
    "memory_file",
];

const MIB: u64 = 1 << 20;

/// `[main]`, checked. Where a value was refused it holds one that lets the check go on.
#[derive(Debug)]
pub struct Main {
    pub name: String,
    pub cpus: Cpus,
    pub memory_bytes: u64,
    pub backing: Backing,
    pub boot: Boot,
    pub debug_port: DebugConfig,
    pub exit_on_halt: u8,
    pub exit_on_reboot: Option<u8>,
    pub on_fault: OnFault,
    /// What SMBIOS says of the firmware.
    pub bootrom_version: Option<String>,
}

/// Which profile the VM file asks for; a name that does not exist counts as none, and is reported by [`read`].
pub fn profile_name(root: &Table) -> &str {
    let named = match root.get("main").map(|entry| &entry.value) {
        Some(Value::Table(main)) => main.get("profile"),
        _ => None,
    };
    match named.map(|entry| &entry.value) {
        None => PROFILES[0].0,
        Some(Value::Text(name)) => name,
        Some(_) => "none",
    }
}

/// What the VM is to run on.
#[derive(Clone, Copy, Debug)]
pub struct HostMachine {
    pub hypervisor: Kind,
    /// Bytes of memory, if that is known.
    pub memory: Option<u64>,
}

/// Reads the table, for a VM on `host`.
pub fn read(
    table: &Table,
    at: Span,
    host: HostMachine,
    profiles: &Profiles,
    problems: &mut Problems,
) -> Main {
    refuse_unknown("main", table, &KEYS, problems);
    let field = |name| {
        table.get(name).map(|entry| Field {
            table: "main",
            name,
            entry,
        })
    };
    for key in ["name", "cpus", "memory"] {
        if field(key).is_none() && !misspelt(key, table.keys(), KEYS.into_iter()) {
            problems
                .error(at, format!("[main] lacks the key `{key}`"))
                .absent();
        }
    }
    if let Some(field) = field("profile") {
        let names: Vec<&str> = PROFILES.iter().map(|(name, _)| *name).collect();
        field.word(&names, problems);
    }
    if let Some(field) = field("hypervisor") {
        hypervisor(&field, host.hypervisor, problems);
    }
    propolis_keys(&field, problems);
    let byte = |key, problems: &mut Problems| {
        let code = field(key)?.integer(0, 255, problems)?;
        u8::try_from(code).ok()
    };
    let memory = field("memory").and_then(|field| memory(&field, host.memory, problems));
    Main {
        name: field("name")
            .and_then(|field| vm_name(&field, host.hypervisor, problems))
            .unwrap_or_default(),
        cpus: cpus::read(&field, profiles, problems),
        backing: backing::read(&field, memory, host.hypervisor, problems),
        memory_bytes: memory.unwrap_or(MIB),
        debug_port: field("debug_port")
            .and_then(|port| {
                let output = debug_port(&port, problems);
                if let Some(DebugConfig::File(path)) = &output {
                    boot::refuse_same(&port, path, FILES.map(&field), problems);
                }
                output
            })
            .unwrap_or_default(),
        exit_on_halt: byte("exit_on_halt", problems).unwrap_or(0),
        exit_on_reboot: byte("exit_on_reboot", problems),
        on_fault: field("on_fault")
            .and_then(|field| on_fault(&field, problems))
            .unwrap_or_default(),
        bootrom_version: field("bootrom_version")
            .and_then(|field| smbios_table::text(&field, problems)),
        boot: boot::read(&field, at, problems),
    }
}

/// "auto" or the hypervisor that this system has.
fn hypervisor(field: &Field<'_>, there: Kind, problems: &mut Problems) {
    let [first, second] = Kind::ALL.map(Kind::name);
    let asked = field.word(&["auto", first, second], problems);
    let asked = Kind::ALL
        .into_iter()
        .find(|kind| asked == Some(kind.name()));
    if let Some(other) = asked.filter(|kind| *kind != there) {
        let (name, system) = (other.name(), other.system());
        problems
            .error(
                field.entry.at,
                format!("`hypervisor` in [main]: {name} is the hypervisor of {system}"),
            )
            .help(format!("\"{}\" and \"auto\" work here", there.name()));
    }
}

/// The VM's name.
fn vm_name(field: &Field<'_>, hypervisor: Kind, problems: &mut Problems) -> Option<String> {
    let name = field.name(problems)?;
    if let Some(max) = hypervisor.name_max().filter(|max| name.len() > *max) {
        let expected = format!(
            "a name of at most {max} bytes, as {} takes",
            hypervisor.name()
        );
        field.expected(&expected, problems);
        return None;
    }
    if name
        .chars()
        .any(|c| c == '/' || c.is_control() || c.is_whitespace())
    {
        field.expected("a name without blanks and `/`", problems);
        return None;
    }
    Some(name.to_string())
}

fn memory(field: &Field<'_>, memory_max: Option<u64>, problems: &mut Problems) -> Option<u64> {
    let bytes = field.size(MIB, MIB, u64::MAX, problems)?;
    if bytes % MIB != 0 {
        field.expected("a whole number of MiB", problems);
        return None;
    }
    if let Some(max) = memory_max
        && bytes > max
    {
        problems
            .error(
                field.entry.at,
                format!(
                    "`memory` in [main]: {} is more than this machine has",
                    size_text(bytes)
                ),
            )
            .help(format!("it has {}M", max / MIB));
        return None;
    }
    Some(bytes)
}

/// `on_fault` of `[main]` or of a device.
pub fn on_fault(field: &Field<'_>, problems: &mut Problems) -> Option<OnFault> {
    match field.word(&["stop", "fail"], problems)? {
        "fail" => Some(OnFault::Fail),
        _ => Some(OnFault::Stop),
    }
}

/// "off", "log" or a file to be made. Whether it can be is known when it is; that its directory is there can be said before.
fn debug_port(field: &Field<'_>, problems: &mut Problems) -> Option<DebugConfig> {
    let text = field.name(problems)?;
    let path = match text {
        "off" => return Some(DebugConfig::Off),
        "log" => return Some(DebugConfig::Log),
        path => Path::new(path),
    };
    let directory = crate::boot::directory_of(path);
    if path.is_dir() || !directory.is_dir() {
        field
            .expected("\"off\", \"log\" or the name of a file", problems)
            .help(if path.is_dir() {
                format!("{} is a directory", path.display())
            } else {
                format!("there is no directory {}", directory.display())
            });
        return None;
    }
    Some(DebugConfig::File(path.to_path_buf()))
}

/// Keys that propolis files carry. What would change the guest is refused, what would not is noted and ignored.
fn propolis_keys<'a>(field: &impl Fn(&'static str) -> Option<Field<'a>>, problems: &mut Problems) {
    if let Some(field) = field("acpi_variant") {
        field.word(&["V0"], problems);
    }
    if let Some(field) = field("hv_interface") {
        hv_interface(&field, problems);
    }
}

/// `[main.hv_interface]`: what hypervisor the guest is to find. "bhyve" means the one that there is.
fn hv_interface(field: &Field<'_>, problems: &mut Problems) {
    const KEYS: [&str; 2] = ["type", "reference_tsc"];
    let name = "main.hv_interface";
    let header = field.entry.key;
    let Some(table) = field.table(problems) else {
        return;
    };
    refuse_unknown(name, table, &KEYS, problems);
    let field = |key| {
        table.get(key).map(|entry| Field {
            table: name,
            name: key,
            entry,
        })
    };
    let kind = field("type").and_then(|field| field.word(&["bhyve", "hyperv"], problems));
    if let Some(field) = field("type")
        && kind == Some("hyperv")
    {
        problems
            .error(
                field.entry.at,
                format!("`type` in [{name}]: this version has no Hyper-V interface for guests"),
            )
            .help("without it, guests find the interface of the hypervisor that runs them");
    }
    if field("type").is_none() && !misspelt("type", table.keys(), KEYS.into_iter()) {
        problems
            .error(header, format!("[{name}] lacks the key `type`"))
            .absent();
    }
    if let Some(field) = field("reference_tsc")
        && field.boolean(problems) == Some(true)
        && kind == Some("bhyve")
    {
        problems.warning(
            field.entry.key,
            format!("`reference_tsc` in [{name}] has no effect: it is a clock of Hyper-V's"),
        );
    }
}

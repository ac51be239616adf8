//! The `[main]` table.

use std::path::{Path, PathBuf};

use super::backing;
use super::document::{Table, Value};
use super::profile::PROFILES;
use super::source::{Problems, Span};
use super::spelling::misspelt;
use super::values::{Field, refuse_unknown, size_text};
use super::vm_config::{BUILTIN_KERNELS, Boot, BootKernel, OnFault};
use crate::hypervisor::backing::Backing;

/// Keys of `[main]`, the last seven of which exist for propolis files.
pub const KEYS: [&str; 20] = [
    "name",
    "cpus",
    "memory",
    "hugepages",
    "prefault",
    "memory_file",
    "kernel",
    "initrd",
    "cmdline",
    "exit_on_halt",
    "exit_on_reboot",
    "profile",
    "on_fault",
    "bootrom",
    "bootrom_version",
    "use_reservoir",
    "cpuid_profile",
    "cpu_binding",
    "boot_order",
    "acpi_variant",
];

/// The most vCPUs: an xAPIC id has 8 bits, and 255 means all (Intel SDM volume 3, 12.6.1).
const CPUS_MAX: u64 = 254;

const MIB: u64 = 1 << 20;

/// `[main]`, checked. Where a value was refused it holds one that lets the check go on.
#[derive(Debug)]
pub struct Main {
    pub name: String,
    pub cpus: u8,
    pub memory_bytes: u64,
    pub backing: Backing,
    pub boot: Boot,
    pub exit_on_halt: u8,
    pub exit_on_reboot: Option<u8>,
    pub on_fault: OnFault,
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

/// Reads the table. `memory_max` is what the machine has, if that is known.
pub fn read(table: &Table, at: Span, memory_max: Option<u64>, problems: &mut Problems) -> Main {
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
    propolis_keys(&field, problems);
    let byte = |key, problems: &mut Problems| {
        let code = field(key)?.integer(0, 255, problems)?;
        u8::try_from(code).ok()
    };
    let memory = field("memory").and_then(|field| memory(&field, memory_max, problems));
    Main {
        name: field("name")
            .and_then(|field| vm_name(&field, problems))
            .unwrap_or_default(),
        cpus: field("cpus")
            .and_then(|field| field.integer(1, CPUS_MAX, problems))
            .and_then(|cpus| u8::try_from(cpus).ok())
            .unwrap_or(1),
        backing: backing::read(&field, memory, problems),
        memory_bytes: memory.unwrap_or(MIB),
        exit_on_halt: byte("exit_on_halt", problems).unwrap_or(0),
        exit_on_reboot: byte("exit_on_reboot", problems),
        on_fault: field("on_fault")
            .and_then(|field| on_fault(&field, problems))
            .unwrap_or_default(),
        boot: boot(&field, at, problems),
    }
}

/// The VM's name, which on illumos is also a file name under /dev/vmm.
fn vm_name(field: &Field<'_>, problems: &mut Problems) -> Option<String> {
    let name = field.name(problems)?;
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

fn boot<'a>(
    field: &impl Fn(&'static str) -> Option<Field<'a>>,
    at: Span,
    problems: &mut Problems,
) -> Boot {
    let kernel = match field("kernel") {
        Some(field) => kernel(&field, problems),
        None => {
            // A file written for a bootrom has been told what to do about it.
            if field("bootrom").is_none() {
                problems
                    .error(at, "[main] lacks the key `kernel`")
                    .help(
                        "the kernel to boot: a bzImage or an ELF vmlinux, or \"builtin:selftest\"",
                    )
                    .absent();
            }
            None
        }
    };
    Boot {
        kernel: kernel.unwrap_or_else(|| BootKernel::File(PathBuf::new())),
        initrd: field("initrd").and_then(|field| readable(&field, problems)),
        cmdline: field("cmdline")
            .and_then(|field| field.text(problems))
            .unwrap_or_default()
            .to_string(),
    }
}

fn kernel(field: &Field<'_>, problems: &mut Problems) -> Option<BootKernel> {
    let text = field.name(problems)?;
    let Some(name) = text.strip_prefix("builtin:") else {
        return readable(field, problems).map(BootKernel::File);
    };
    if BUILTIN_KERNELS.contains(&name) {
        return Some(BootKernel::Builtin(name.to_string()));
    }
    let known = BUILTIN_KERNELS.map(|name| format!("builtin:{name}"));
    field.word(&known.each_ref().map(String::as_str), problems);
    None
}

/// A file that can be opened. As in propolis, its name is relative to the working directory.
fn readable(field: &Field<'_>, problems: &mut Problems) -> Option<PathBuf> {
    let path = Path::new(field.name(problems)?);
    // Asked before opening: to open a FIFO would wait for its other end.
    let refusal = match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => std::fs::File::open(path)
            .err()
            .map(|error| error.to_string()),
        Ok(_) => Some("not a regular file".to_string()),
        Err(error) => Some(error.to_string()),
    };
    let Some(why) = refusal else {
        return Some(path.to_path_buf());
    };
    let problem = problems.error(
        field.entry.at,
        format!(
            "`{}` in [main]: {} can't be read: {why}",
            field.name,
            path.display()
        ),
    );
    if path.is_relative() {
        problem.help("the name is relative to the working directory, not to this file");
    }
    None
}

/// Keys that propolis files carry. What would change the guest is refused, what would not is noted and ignored.
fn propolis_keys<'a>(field: &impl Fn(&'static str) -> Option<Field<'a>>, problems: &mut Problems) {
    if let Some(field) = field("bootrom") {
        field.text(problems);
        problems
            .error(
                field.entry.key,
                "`bootrom` is not supported by this version: use `kernel`",
            )
            .help("a bzImage or an ELF vmlinux, with `initrd` and `cmdline` as needed");
    }
    if let Some(field) = field("cpuid_profile") {
        field.text(problems);
        problems.error(
            field.entry.key,
            "`cpuid_profile` is not supported by this version: the guest sees the host's CPU",
        );
    }
    if let Some(field) = field("acpi_variant") {
        field.word(&["V0"], problems);
    }
    let mut ignored = |field: &Field<'_>, why: &str| {
        problems.warning(
            field.entry.key,
            format!("`{}` in [main] has no effect: {why}", field.name),
        );
    };
    let mut bad = Problems::default();
    if let Some(field) = field("bootrom_version")
        && field.text(&mut bad).is_some()
    {
        ignored(&field, "there is no bootrom");
    }
    if let Some(field) = field("use_reservoir")
        && field.boolean(&mut bad) == Some(true)
    {
        ignored(&field, "memory comes from the system, not from a reservoir");
    }
    if let Some(field) = field("cpu_binding")
        && field.word(&["any", "upper-half"], &mut bad) == Some("upper-half")
    {
        ignored(&field, "vCPU threads run on any CPU");
    }
    if let Some(field) = field("boot_order")
        && field.texts(&mut bad).is_some()
    {
        ignored(&field, "the kernel is booted directly");
    }
    problems.list.append(&mut bad.list);
}

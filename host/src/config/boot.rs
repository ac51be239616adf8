//! Keys of `[main]` that say what the guest starts with: a kernel, or firmware.

use std::path::{Path, PathBuf};

use super::devices::Device;
use super::document::{Table, Value};
use super::profile;
use super::source::{Problems, Span};
use super::spelling::{listed, suggestion};
use super::values::Field;
use super::vm_config::{BUILTIN_KERNELS, Boot, BootKernel, Bootrom, DirectKernel};
use crate::boot::{BOOTROM_MAX, directory_of};
use crate::memory::PAGE;
use crate::plugins::manifest::BusKind;

const KERNEL_KEYS: [&str; 2] = ["initrd", "cmdline"];
const BOOTROM_KEYS: [&str; 3] = ["bootrom_vars", "bootrom_vars_template", "boot_order"];

/// Reads the keys; `field` gives one of `[main]`, whose header is `at`.
pub fn read<'a>(
    field: &impl Fn(&'static str) -> Option<Field<'a>>,
    at: Span,
    problems: &mut Problems,
) -> Boot {
    match (field("kernel"), field("bootrom")) {
        (Some(kernel), None) => {
            has_no_effect(
                field,
                &BOOTROM_KEYS,
                "the kernel is booted directly",
                problems,
            );
            direct(&kernel, field, problems)
        }
        (None, Some(rom)) => {
            refuse_kernel_keys(field, problems);
            firmware(&rom, field, problems)
        }
        (Some(kernel), Some(rom)) => {
            problems
                .error(
                    rom.entry.key,
                    "`bootrom` and `kernel` in [main]: a guest starts with one of them",
                )
                .help("a bootrom finds its system on the VM's disks");
            direct(&kernel, field, problems)
        }
        (None, None) => {
            problems
                .error(at, "[main] lacks the key `kernel` or `bootrom`")
                .help("`kernel`: a bzImage or an ELF vmlinux to boot directly, or \"builtin:selftest\"")
                .help("`bootrom`: firmware such as OVMF, which boots the VM's disks")
                .absent();
            Boot::Firmware(Bootrom {
                path: PathBuf::new(),
                vars: None,
                vars_template: None,
                order: Vec::new(),
            })
        }
    }
}

/// Values are checked all the same.
fn has_no_effect<'a>(
    field: &impl Fn(&'static str) -> Option<Field<'a>>,
    keys: &[&'static str],
    why: &str,
    problems: &mut Problems,
) {
    for key in keys {
        let Some(field) = field(key) else { continue };
        let understood = match *key {
            "boot_order" => field.texts(problems).is_some(),
            _ => field.text(problems).is_some(),
        };
        if understood {
            problems.warning(
                field.entry.key,
                format!("`{key}` in [main] has no effect: {why}"),
            );
        }
    }
}

fn refuse_kernel_keys<'a>(
    field: &impl Fn(&'static str) -> Option<Field<'a>>,
    problems: &mut Problems,
) {
    for key in KERNEL_KEYS {
        if let Some(field) = field(key) {
            problems
                .error(
                    field.entry.key,
                    format!("`{key}` in [main] belongs to a `kernel`, and there is a `bootrom`"),
                )
                .help("what a bootrom boots is on the VM's disks");
        }
    }
}

fn direct<'a>(
    kernel: &Field<'_>,
    field: &impl Fn(&'static str) -> Option<Field<'a>>,
    problems: &mut Problems,
) -> Boot {
    let kernel = builtin_or_file(kernel, problems);
    Boot::Direct(DirectKernel {
        kernel: kernel.unwrap_or_else(|| BootKernel::File(PathBuf::new())),
        initrd: field("initrd").and_then(|field| readable(&field, problems)),
        cmdline: field("cmdline")
            .and_then(|field| field.text(problems))
            .unwrap_or_default()
            .to_string(),
    })
}

fn builtin_or_file(field: &Field<'_>, problems: &mut Problems) -> Option<BootKernel> {
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

fn firmware<'a>(
    rom: &Field<'_>,
    field: &impl Fn(&'static str) -> Option<Field<'a>>,
    problems: &mut Problems,
) -> Boot {
    if let Some(field) = field("profile")
        && matches!(&field.entry.value, Value::Text(name) if !profile::is_pc(name))
    {
        problems.warning(
            field.entry.at,
            "`profile` in [main]: this board is for kernels that are booted directly, firmware may miss the rest of a PC",
        );
    }
    let image_path = image(rom, problems);
    let template = field("bootrom_vars_template").and_then(|field| image(&field, problems));
    let kept = field("bootrom_vars");
    // A template that was refused has been reported.
    let has_template = field("bootrom_vars_template").is_some();
    let vars = kept.and_then(|field| vars(&field, has_template, problems));
    let given = kept.zip(vars.as_deref());
    if let Some((kept, vars)) = given {
        let others = ["bootrom", "bootrom_vars_template"].map(field);
        refuse_same(&kept, vars, others, problems);
    }
    if let Some(path) = &image_path {
        let stored = given.map(|(_, vars)| vars).filter(|vars| vars.exists());
        fit_together(rom, path, stored.or(template.as_deref()), problems);
    }
    let order = field("boot_order").and_then(|field| field.texts(problems));
    Boot::Firmware(Bootrom {
        path: image_path.unwrap_or_default(),
        vars,
        vars_template: template,
        order: order
            .unwrap_or_default()
            .into_iter()
            .map(|(_, name)| name.to_string())
            .collect(),
    })
}

/// `bootrom_vars`: a file that is there, or one that can be made, if there is what to make it from.
fn vars(field: &Field<'_>, has_template: bool, problems: &mut Problems) -> Option<PathBuf> {
    let path = Path::new(field.name(problems)?);
    if path.exists() {
        return image(field, problems);
    }
    let directory = directory_of(path);
    if !has_template {
        problems
            .error(
                field.entry.at,
                format!("`bootrom_vars` in [main]: there is no {}", path.display()),
            )
            .help(
                "`bootrom_vars_template` names what it is to start from: the bootrom's package has it, for OVMF as OVMF_VARS*.fd",
            );
    } else if !directory.is_dir() {
        problems.error(
            field.entry.at,
            format!(
                "`bootrom_vars` in [main]: {} can't be made: there is no directory {}",
                path.display(),
                directory.display()
            ),
        );
    }
    Some(path.to_path_buf())
}

/// Refuses to write to the file at `path`, which `field` names, if it is what one of the `others` names.
pub fn refuse_same<'a>(
    field: &Field<'_>,
    path: &Path,
    others: impl IntoIterator<Item = Option<Field<'a>>>,
    problems: &mut Problems,
) {
    let real = |path: &Path| path.canonicalize().ok();
    let Some(path) = real(path) else { return };
    let named = |other: &Field<'_>| match &other.entry.value {
        Value::Text(name) => real(Path::new(name)),
        _ => None,
    };
    let same = others
        .into_iter()
        .flatten()
        .find(|other| named(other).as_deref() == Some(&path));
    if let Some(other) = same {
        problems
            .error(
                field.entry.at,
                format!(
                    "`{}` in [main] is the file that `{}` is, and would be written to",
                    field.name, other.name
                ),
            )
            .help("it needs a file of its own");
    }
}

/// Image and variables lie below 4 GiB, one below the other.
fn fit_together(rom: &Field<'_>, image: &Path, vars: Option<&Path>, problems: &mut Problems) {
    let len = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let Some(vars) = vars else { return };
    let total = len(image).saturating_add(len(vars));
    if total > BOOTROM_MAX {
        problems.error(
            rom.entry.at,
            format!(
                "`bootrom` in [main]: {} and {} have {total} bytes together, and {BOOTROM_MAX} fit below 4 GiB",
                image.display(),
                vars.display()
            ),
        );
    }
}

/// A file that can be opened and has the size of something that lies below 4 GiB.
fn image(field: &Field<'_>, problems: &mut Problems) -> Option<PathBuf> {
    let path = readable(field, problems)?;
    let len = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
    let problem = if len == 0 {
        "is empty".to_string()
    } else if len > BOOTROM_MAX {
        format!("has {len} bytes, more than the {BOOTROM_MAX} that fit below 4 GiB")
    } else if !len.is_multiple_of(PAGE) {
        format!("has {len} bytes, which is no multiple of {PAGE}")
    } else {
        return Some(path);
    };
    problems.error(
        field.entry.at,
        format!("`{}` in [main]: {} {problem}", field.name, path.display()),
    );
    None
}

/// A file that can be opened. As in propolis, its name is relative to the working directory.
pub fn readable(field: &Field<'_>, problems: &mut Problems) -> Option<PathBuf> {
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
            "`{}` in [{}]: {} can't be read: {why}",
            field.name,
            field.table,
            path.display()
        ),
    );
    if path.is_relative() {
        problem.help("the name is relative to the working directory, not to this file");
    }
    None
}

/// Checks that `boot_order` names devices that firmware can boot from, each once. Of those in `tables` that are not in
/// `devices`, other things have been reported.
pub fn check_order(main: &Table, tables: &Table, devices: &[Device], problems: &mut Problems) {
    let Some(entry) = main.get("boot_order") else {
        return;
    };
    let field = Field {
        table: "main",
        name: "boot_order",
        entry,
    };
    let on_pci = |device: &Device| device.config.driver.driver().bus == BusKind::Pci;
    // What is no list was reported where it was read.
    let mut reported = Problems::default();
    let names = field.texts(&mut reported).unwrap_or_default();
    for (index, (at, name)) in names.iter().enumerate() {
        let error = |problems: &mut Problems, why: &str| {
            let bootable = devices.iter().filter(|device| on_pci(device));
            let known: Vec<&str> = bootable.map(|device| device.config.name.as_str()).collect();
            let problem = problems.error(*at, format!("`boot_order` in [main]: {name} {why}"));
            let help = suggestion(name, known.iter().copied());
            if let Some(help) = help.filter(|_| !known.contains(name)) {
                problem.help(help);
            }
            problem.help(format!("devices on the PCI bus: {}", listed(known)));
        };
        match devices.iter().find(|device| device.config.name == *name) {
            None if tables.contains_key(*name) => {}
            None => error(problems, "is no device"),
            Some(device) if !on_pci(device) => {
                error(
                    problems,
                    "is not on the PCI bus, so firmware can't boot from it",
                );
            }
            Some(_) if names[..index].iter().any(|(_, other)| other == name) => {
                error(problems, "stands there twice");
            }
            Some(_) => {}
        }
    }
}

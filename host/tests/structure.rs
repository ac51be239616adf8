//! What keeps the tree the shape that `docs/architecture.md` shows. Each rule names the file that breaks it.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

/// The host's modules: each may import from its own line and from those after it.
const LAYERS: &[&[&str]] = &[
    &["main", "lib"],
    &["cli"],
    &["vm"],
    &["vcpu"],
    &["boot", "config", "diagnose", "machine", "plugins"],
    &["bus", "hypervisor", "memory", "pci"],
    &["probes", "thread"],
];

/// Where `unsafe` may be used, apart from tests: prefixes of paths.
const UNSAFE: &[&str] = &[
    // The ABI's edges and guest memory, for all plugins.
    "plugin-api/",
    // System calls on memory and virtual CPUs.
    "host/src/hypervisor/",
    "host/src/memory.rs",
    "host/src/memory/sparse.rs",
    // The other side of the ABI.
    "host/src/plugins/device.rs",
    "host/src/plugins/instance.rs",
    "host/src/plugins/layout.rs",
    "host/src/plugins/loader.rs",
    "host/src/plugins/memory_table.rs",
    "host/src/plugins/object.rs",
    "host/src/plugins/process.rs",
    // System calls that safe wrappers don't have, memory that is shared with the kernel, and files that are mapped, with the handler
    // for what is cut off them.
    "block-file/src/guarded.rs",
    "block-file/src/illumos.rs",
    "block-file/src/lock.rs",
    "block-file/src/mapped.rs",
    "block-file/src/transfer.rs",
    "block-file/src/uring.rs",
    "plugins/console/src/streams.rs",
    "plugins/memory/src/ram.rs",
    // Programs without an operating system.
    "guests/selftest/guest/",
    // Requests whose arguments are pointers, served as a kernel does.
    "tests/vmm-driver/src/",
];

/// Where operating systems are told apart: prefixes of paths. Everything else is the same on all of them.
const SYSTEMS: &[&str] = &[
    // Hypervisors, their memory and their threads.
    "host/Cargo.toml",
    "host/src/hypervisor/",
    // How disk images are opened and what their space can do (each system has a file of its own, which the first chooses), io_uring,
    // and reads that don't wait.
    "block-file/Cargo.toml",
    "block-file/src/lib.rs",
    "block-file/src/queue.rs",
    "block-file/src/transfer.rs",
    // Pseudo terminals, which illumos makes of streams.
    "plugins/console/Cargo.toml",
    "plugins/console/src/lib.rs",
    "plugins/console/src/pty.rs",
    // Memory that is given back and reads as zero.
    "plugins/memory/src/ram.rs",
    // The name of GNU's linker.
    "guests/selftest/build.rs",
    // Tests of what one system has.
    "host/tests/tracing.rs",
    "plugins/file/tests/",
    // illumos' driver over Linux' KVM.
    "tests/vmm-driver/",
];

/// The longest file.
const LINES: usize = 600;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .unwrap()
}

/// The files below `directory` whose names end in `end`, as paths from the workspace, with their text.
fn files(directory: &str, end: &str) -> Vec<(String, String)> {
    let root = workspace();
    let mut found = Vec::new();
    let mut waiting = vec![root.join(directory)];
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                waiting.push(path);
            } else if path.is_file() && name.ends_with(end) {
                let short = path.strip_prefix(&root).unwrap().to_str().unwrap();
                found.push((short.to_owned(), std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "{directory} has no file *{end}");
    found
}

/// The host's sources without their tests, which may set up and name what they need.
fn host() -> Vec<(String, String)> {
    let test = |path: &str| path.contains("/tests/") || path.ends_with("/tests.rs");
    let code = |(path, text): (String, String)| {
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        (path, code.to_owned())
    };
    let all = files("host/src", ".rs").into_iter();
    all.filter(|(path, _)| !test(path)).map(code).collect()
}

/// Whether `line` has `word` with nothing before it that would make it the end of another word.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        before.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '_')
    })
}

/// All files that break a rule.
fn none(rule: &str, broken: Vec<String>) {
    assert!(broken.is_empty(), "{rule}:\n{}", broken.join("\n"));
}

/// Every `name =` that a manifest gives a driver or a backend.
fn names() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let known = files("configs/profiles", "propolis-names.toml");
    for (path, text) in files("", "plugin.toml").into_iter().chain(known) {
        let manifest: Table = text.parse().unwrap_or_else(|e| panic!("{path}: {e}"));
        for kind in ["driver", "block", "char", "net"] {
            let tables = manifest.get(kind).and_then(Value::as_array);
            for table in tables.into_iter().flatten() {
                names.insert(table["name"].as_str().unwrap().to_owned());
            }
        }
    }
    names
}

#[test]
fn the_host_names_no_driver_and_no_backend() {
    let names = names();
    assert!(names.contains("lpc-uart") && names.len() >= 8, "{names:?}");
    let mut broken = Vec::new();
    for (path, text) in host() {
        for (number, line) in (1..).zip(text.lines()) {
            for name in &names {
                // A key of VM files that is called as a backend is.
                if (path.as_str(), name.as_str()) == ("host/src/config/fw_cfg.rs", "file") {
                    continue;
                }
                // A plain word such as `file` is a name only where it stands alone in quotes.
                let there = match name.contains('-') {
                    true => line.contains(name.as_str()),
                    false => line.contains(&format!("\"{name}\"")),
                };
                if there {
                    broken.push(format!("{path}:{number}: {name}: {}", line.trim()));
                }
            }
        }
    }
    none("the host knows no device", broken);
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

#[test]
fn imports_point_one_way() {
    let mut broken = Vec::new();
    for (path, code) in host() {
        let below = path.strip_prefix("host/src/").unwrap();
        let module = below.split(['/', '.']).next().unwrap();
        let Some(own) = layer(module) else {
            broken.push(format!("{path}: module {module} has no layer"));
            continue;
        };
        for (number, line) in (1..).zip(code.lines()) {
            for import in line.split("crate::").skip(1) {
                let name: String = import
                    .chars()
                    .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                    .collect();
                if layer(&name).is_some_and(|other| other < own) {
                    broken.push(format!("{path}:{number}: imports {name}: {}", line.trim()));
                }
            }
        }
    }
    none("imports point one way", broken);
}

/// What knows one thing of the outside world is in one place.
#[test]
fn each_outside_thing_is_known_in_one_place() {
    let mut broken = Vec::new();
    for (path, text) in host() {
        for (what, places) in [
            ("libloading::", &["host/src/plugins/loader.rs"][..]),
            ("kvm_", &["host/src/hypervisor/"]),
            (
                "toml::",
                &["host/src/config/", "host/src/plugins/manifest_toml.rs"],
            ),
        ] {
            let allowed = places.iter().any(|place| path.starts_with(place));
            // Comments may speak of anything.
            let used = text
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .any(|line| has_word(line, what));
            if used && !allowed {
                broken.push(format!("{path}: {what}"));
            }
        }
    }
    none("only its own place may know it", broken);
}

#[test]
fn operating_systems_are_told_apart_in_the_named_files() {
    let mut broken = Vec::new();
    let mut used = BTreeSet::new();
    for (path, text) in files("", ".rs").into_iter().chain(files("", "Cargo.toml")) {
        let code = |line: &&str| !line.trim_start().starts_with("//");
        let mut lines = text.lines().filter(code);
        if path == "host/tests/structure.rs" || !lines.any(|line| line.contains("target_os")) {
            continue;
        }
        match SYSTEMS.iter().find(|place| path.starts_with(*place)) {
            Some(place) => drop(used.insert(*place)),
            None => broken.push(path),
        }
    }
    none("this works alike on all systems, or is named", broken);
    let unused = SYSTEMS.iter().filter(|place| !used.contains(*place));
    none(
        "named and alike on all systems",
        unused.map(ToString::to_string).collect(),
    );
}

fn manifests() -> Vec<(String, Table)> {
    let parse = |(path, text): (String, String)| {
        let table = text.parse().unwrap_or_else(|e| panic!("{path}: {e}"));
        (path, table)
    };
    files("", "Cargo.toml").into_iter().map(parse).collect()
}

#[test]
fn crates_depend_one_way() {
    let mut broken = Vec::new();
    for (path, manifest) in manifests() {
        let Some(dependencies) = manifest.get("dependencies").and_then(Value::as_table) else {
            continue;
        };
        let allowed: &[&str] = match path.split('/').next().unwrap() {
            "host" => &["vmm-abi", "vmm-selftest"],
            "plugin-api" if path.contains("/abi/") => &[],
            "plugin-api" => &["vmm-abi"],
            "virtio" | "block-file" => &["vmm-plugin-api"],
            "plugins" => &["vmm-block-file", "vmm-plugin-api", "vmm-virtio"],
            "examples" => &["vmm-plugin-api"],
            _ => continue,
        };
        for name in dependencies.keys() {
            let ours = ["vmm-", "hello-"]
                .iter()
                .any(|start| name.starts_with(start));
            if ours && !allowed.contains(&name.as_str()) {
                broken.push(format!("{path}: {name}"));
            }
        }
    }
    none("crates depend one way", broken);
}

/// Examples stand for crates outside of the workspace, which have no lints to inherit; they do without unsafe code anyway.
#[test]
fn every_crate_inherits_the_lints() {
    let mut broken = Vec::new();
    for (path, manifest) in manifests() {
        let inherits = manifest
            .get("lints")
            .and_then(|lints| lints.get("workspace"))
            .and_then(Value::as_bool);
        let free = path == "Cargo.toml" || path.starts_with("examples/");
        if inherits != Some(true) && !free {
            broken.push(path);
        }
    }
    none("[lints] workspace = true is missing", broken);
}

#[test]
fn unsafe_code_is_in_the_named_files() {
    let mut broken = Vec::new();
    let mut used = BTreeSet::new();
    for (path, text) in files("", ".rs") {
        let code = |line: &&str| !line.trim_start().starts_with("//");
        let there = text.lines().filter(code).any(|line| {
            line.contains("unsafe {")
                || line.contains("unsafe fn")
                || line.contains("unsafe impl")
                || line.contains("unsafe extern")
        });
        let test =
            path.starts_with("tests/") || path.contains("tests/") || path.ends_with("/tests.rs");
        match UNSAFE.iter().find(|place| path.starts_with(*place)) {
            Some(place) if there => drop(used.insert(*place)),
            None if there && !test && path != "host/tests/structure.rs" => broken.push(path),
            _ => {}
        }
    }
    none("unsafe code where none is expected", broken);
    let unused = UNSAFE.iter().filter(|place| !used.contains(*place));
    none(
        "named and without unsafe code",
        unused.map(ToString::to_string).collect(),
    );
}

#[test]
fn no_file_is_too_long() {
    let long = files("", ".rs")
        .into_iter()
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > LINES)
        .map(|(path, lines)| format!("{path}: {lines} lines"));
    none("a file of this length holds two ideas", long.collect());
}

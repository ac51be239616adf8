//! Every way to get a VM file wrong, with the exact report: `config/NAME.toml` must produce `config/NAME.stderr`.
//!
//! `VMM_UPDATE_GOLDENS=1 cargo test -p vmm-host --test config` writes the reports anew, to be read before they are
//! committed.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod fixture;

use std::path::{Path, PathBuf};
use vmm_host::hypervisor::Kind;
use vmm_host::hypervisor::backing::Source;

use fixture::{Scene, plugin};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config")
}

fn files_with(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    files
}

/// A scene with a plugin for each manifest in `config/plugins`, and files that a VM may name.
fn scene() -> Scene {
    let scene = Scene::new();
    for (name, len) in [("good.fd", 8192), ("odd.fd", 100), ("empty.fd", 0)] {
        scene.write(name, vec![1; len]);
    }
    for (name, len) in [("largest.fd", 16 << 20), ("large.fd", (16 << 20) + 4096)] {
        let file = std::fs::File::create(scene.path(name)).unwrap();
        file.set_len(len).unwrap();
    }
    for manifest in files_with(&goldens().join("plugins"), "toml") {
        let stem = manifest.file_stem().unwrap().to_str().unwrap();
        let text = std::fs::read_to_string(&manifest).unwrap();
        scene.write(&format!("plugins/lib{stem}.so"), plugin(&text));
    }
    scene
}

#[test]
fn each_bad_file_gets_its_report() {
    let scene = scene();
    let update = std::env::var_os("VMM_UPDATE_GOLDENS").is_some();
    let mut wrong = Vec::new();
    let files = files_with(&goldens(), "toml");
    assert!(files.len() >= 20, "found only {files:?}");
    for file in files {
        let name = file.file_name().unwrap().to_str().unwrap();
        scene.write(name, std::fs::read(&file).unwrap());
        let ran = scene.run(&["check", name, "--plugin-path", "plugins"]);
        let good = name.starts_with("good-");
        assert_eq!(ran.code, Some(if good { 0 } else { 3 }), "{name}: {ran:?}");
        let expected = file.with_extension("stderr");
        if update {
            std::fs::write(&expected, &ran.stderr).unwrap();
        } else if std::fs::read_to_string(&expected).unwrap_or_default() != ran.stderr {
            wrong.push(format!("--- {name}\n{}", ran.stderr));
        }
    }
    assert!(wrong.is_empty(), "reports differ:\n{}", wrong.join("\n"));
}

#[test]
fn more_memory_than_the_machine_has_is_refused() {
    let scene = scene();
    scene.write(
        "vm.toml",
        "[main]\nname = \"x\"\ncpus = 1\nmemory = \"4000000G\"\nkernel = \"builtin:selftest\"\n",
    );
    let ran = scene.run(&["check", "vm.toml", "--plugin-path", "plugins"]);
    if !Path::new("/proc/meminfo").exists() {
        println!(
            "SKIPPED: more_memory_than_the_machine_has_is_refused: this system has no /proc/meminfo"
        );
        return;
    }
    assert_eq!(ran.code, Some(3));
    assert!(
        ran.stderr.contains(
            "vm.toml:4:10: error: `memory` in [main]: 4000000G is more than this machine has"
        ),
        "{}",
        ran.stderr
    );
}

#[test]
fn cpus_that_this_machine_has_not_are_refused() {
    let scene = scene();
    for (cpus, binding, expected) in [
        (
            1,
            "[60000]",
            "vCPU 0 is to run on CPU 60000, which this machine does not have",
        ),
        (
            2,
            "{ start = 65535 }",
            "vCPU 0 is to run on CPU 65535, which this machine",
        ),
        (
            254,
            "\"upper-half\"",
            "too few to give each of 254 vCPUs one",
        ),
    ] {
        let text = format!(
            "[main]\nname = \"x\"\ncpus = {cpus}\nmemory = 64\nkernel = \"builtin:selftest\"\ncpu_binding = {binding}\n"
        );
        scene.write("vm.toml", text);
        let ran = scene.run(&["check", "vm.toml", "--plugin-path", "plugins"]);
        if ran.stderr.contains("can't be bound to CPUs yet") || ran.code == Some(0) {
            println!("SKIPPED: cpus_that_this_machine_has_not_are_refused: {binding}: {ran:?}");
            continue;
        }
        assert_eq!(ran.code, Some(3), "{ran:?}");
        let place = "vm.toml:6:";
        assert!(
            ran.stderr.contains(expected) && ran.stderr.starts_with(place),
            "{}",
            ran.stderr
        );
    }
}

#[test]
fn a_file_that_is_no_text_is_refused() {
    let scene = scene();
    scene.write("latin1.toml", b"[main]\nname = \"caf\xe9\"\n");
    for (file, expected) in [
        (
            "latin1.toml",
            "error: latin1.toml: not UTF-8 text, line 2\n",
        ),
        (
            "absent.toml",
            "error: absent.toml: No such file or directory",
        ),
        ("plugins", "error: plugins: Is a directory"),
        (
            "/dev/zero",
            "error: /dev/zero: not a VM file: it has more than 67108864 bytes",
        ),
    ] {
        let ran = scene.run(&["check", file]);
        assert_eq!(ran.code, Some(3), "{ran:?}");
        assert!(ran.stderr.starts_with(expected), "{}", ran.stderr);
    }
}

#[test]
fn any_prefix_of_a_good_file_is_read_without_a_panic() {
    let text = std::fs::read_to_string(goldens().join("good-all-tables.toml")).unwrap();
    let scene = scene();
    let options = vmm_host::plugins::search::SearchOptions {
        flags: vec![scene.path("plugins")],
        ..Default::default()
    };
    let mut accepted = 0;
    for end in (0..=text.len()).filter(|end| text.is_char_boundary(*end)) {
        let file = scene.write("prefix.toml", &text[..end]);
        match vmm_host::config::load(std::slice::from_ref(&file), &options, Kind::Kvm) {
            Ok(_) => accepted += 1,
            Err(report) => assert!(report.to_string().contains("error"), "{end}: {report}"),
        }
    }
    assert!(accepted > 0, "not even the whole file was accepted");
}

/// What a VM file says is checked against the hypervisor that is to run it.
#[test]
fn bhyve_has_its_own_names_and_memory() {
    let scene = scene();
    let options = vmm_host::plugins::search::SearchOptions {
        flags: vec![scene.path("plugins")],
        ..Default::default()
    };
    let load = |name: &str, more: &str| {
        let text = format!(
            "[main]\nname = \"{name}\"\ncpus = 1\nmemory = 64\nkernel = \"builtin:selftest\"\n{more}\n"
        );
        let file = scene.write("bhyve.toml", text);
        vmm_host::config::load(std::slice::from_ref(&file), &options, Kind::Bhyve)
            .map(|loaded| (loaded.config.backing.source, loaded.warnings.to_string()))
            .map_err(|report| report.to_string())
    };
    for (key, source) in [
        ("hypervisor = \"bhyve\"", Source::Anonymous),
        ("hypervisor = \"auto\"", Source::Anonymous),
        ("use_reservoir = true", Source::Reservoir),
        ("hugepages = false", Source::Anonymous),
    ] {
        let (found, warnings) = load("good", key).unwrap();
        assert_eq!(found, source, "{key}");
        assert!(!warnings.contains("warning"), "{key}: {warnings}");
    }
    assert!(load(&"n".repeat(127), "").is_ok());
    for (name, key, expected) in [
        ("n".repeat(128), "", "a name of at most 127 bytes"),
        ("a/b".to_owned(), "", "without blanks and `/`"),
        (
            "kvm".to_owned(),
            "hypervisor = \"kvm\"",
            "kvm is the hypervisor of Linux",
        ),
        (
            "huge".to_owned(),
            "hugepages = \"2M\"",
            "`hugepages` in [main]: bhyve makes guest memory itself",
        ),
        (
            "file".to_owned(),
            "memory_file = \"ram\"",
            "`memory_file` in [main]: bhyve makes guest memory itself",
        ),
        (
            "both".to_owned(),
            "hugepages = true\nmemory_file = \"ram\"",
            "`hugepages` in [main]: bhyve makes guest memory itself",
        ),
    ] {
        let report = load(&name, key).unwrap_err();
        assert!(report.contains(expected), "{key}: {report}");
    }
}

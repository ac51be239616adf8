//! VM files as propolis-standalone's users write them, against our own plugins' manifests, with the exact report:
//! `propolis/NAME.toml` must produce `propolis/NAME.stderr`.
//!
//! `VMM_UPDATE_GOLDENS=1 cargo test -p vmm-host --test propolis` writes the reports anew, to be read before they are
//! committed.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod fixture;

use std::path::Path;
use vmm_host::hypervisor::Kind;

use fixture::Scene;

/// A scene with the files that the VMs name.
fn scene() -> Scene {
    let scene = Scene::with_our_plugins();
    scene.write("OVMF.fd", vec![1; 8192]);
    for name in ["user-data", "meta-data", "disk.img"] {
        scene.write(name, "");
    }
    std::os::unix::fs::symlink("disk.img", scene.path("link.img")).unwrap();
    scene
}

/// Which plugins there are is not what this is about.
fn without_plugins(report: &str) -> String {
    let short = |line: &str| match line.split_once("): ") {
        Some((searched, _)) if line.starts_with("searched ") => format!("{searched}): ...\n"),
        _ => format!("{line}\n"),
    };
    report.lines().map(short).collect()
}

#[test]
fn each_file_is_understood_whatever_can_run_it() {
    let scene = scene();
    let update = std::env::var_os("VMM_UPDATE_GOLDENS").is_some();
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/propolis");
    let mut wrong = Vec::new();
    let mut count = 0;
    for entry in std::fs::read_dir(goldens).unwrap() {
        let file = entry.unwrap().path();
        if file.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let text = std::fs::read_to_string(&file).unwrap();
        if text.contains("viona") && std::env::consts::OS == "illumos" {
            println!("SKIPPED: {}: this system may have viona", file.display());
            continue;
        }
        count += 1;
        let name = file.file_name().unwrap().to_str().unwrap();
        scene.write(name, text);
        let ran = scene.run(&["check", name, "--plugin-path", "plugins"]);
        let good = name.starts_with("good-");
        assert_eq!(ran.code, Some(if good { 0 } else { 3 }), "{name}: {ran:?}");
        let report = without_plugins(&ran.stderr).replace(std::env::consts::OS, "OS");
        let expected = file.with_extension("stderr");
        if update {
            std::fs::write(&expected, &report).unwrap();
        } else if std::fs::read_to_string(&expected).unwrap_or_default() != report {
            wrong.push(format!("--- {name}\n{report}"));
        }
    }
    assert!(count >= 10, "found only {count} files");
    assert!(wrong.is_empty(), "reports differ:\n{}", wrong.join("\n"));
}

/// A plugin that provides a name of propolis's counts, whatever else is known about the name.
const SEED: &str = r#"
abi = "1.0"
name = "seed"
version = "0"
[[driver]]
name = "pci-virtio-socket"
bus = "pci"
[[driver.option]]
name = "colour"
type = "string"
[[block]]
name = "seedling"
[[block.option]]
name = "label"
type = "string"
[[block.option]]
name = "user-data"
type = "string"
shared = true
[[block.option]]
name = "user-data-path"
type = "readable"
not_with = "user-data"
shared = true
[[char]]
name = "far"
os = ["plan9", "vms"]
about = "Another system's"
"#;

const MAIN: &str = "[main]\nname = \"x\"\ncpus = 1\nmemory = 64\nkernel = \"builtin:selftest\"\nprofile = \"none\"\n";

#[test]
fn a_plugin_takes_the_place_of_what_is_known() {
    let scene = scene();
    scene.write("plugins/libseed.so", fixture::plugin(SEED));
    let check = |rest: &str| {
        scene.write("vm.toml", format!("{MAIN}{rest}"));
        scene.run(&["check", "vm.toml", "--plugin-path", "plugins"])
    };
    let socket = "[dev.a]\ndriver = \"pci-virtio-socket\"\npci-path = \"0.4.0\"\n";
    let ran = check(&format!("{socket}colour = \"red\"\n"));
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    let ran = check(&format!("{socket}guest_cid = 3\n"));
    assert!(
        ran.stderr.contains("[dev.a] has no key `guest_cid`"),
        "{ran:?}"
    );

    let ran = check("[char_dev.a]\ntype = \"far\"\nspeed = 1\n");
    assert_eq!(ran.code, Some(3));
    let os = std::env::consts::OS;
    for expected in [
        &format!(
            "vm.toml:8:8: error: [char_dev.a]: the char_dev type \"far\" needs plan9 or vms, and this is {os}\n"
        ),
        "      Another system's\n",
        "vm.toml:9:1: error: [char_dev.a] has no key `speed`\n",
    ] {
        assert!(ran.stderr.contains(expected), "{}", ran.stderr);
    }
    let shown = scene
        .run(&["plugins", "seed", "--plugin-path", "plugins"])
        .stdout;
    for expected in [
        "Works on plan9 or vms only.",
        "In [seedling], for all of them:",
    ] {
        assert!(shown.contains(expected), "{shown}");
    }
}

#[test]
fn a_shared_table_reaches_each_backend_of_its_type() {
    let scene = scene();
    scene.write("plugins/libseed.so", fixture::plugin(SEED));
    let disks: String = ["a", "b"]
        .map(|name| {
            let address = name.bytes().map(|byte| byte - b'a' + 4).sum::<u8>();
            format!(
                "[dev.{name}]\ndriver = \"pci-virtio-block\"\npci-path = \"0.{address}.0\"\nblock_dev = \"{name}\"\n\
                 [block_dev.{name}]\ntype = \"seedling\"\nlabel = \"{name}\"\n"
            )
        })
        .concat();
    let options = vmm_host::plugins::search::SearchOptions {
        flags: vec![scene.path("plugins")],
        ..Default::default()
    };
    let file = scene.write(
        "vm.toml",
        format!("{MAIN}{disks}[seedling]\nuser-data = \"hello\"\n"),
    );
    let loaded = vmm_host::config::load(std::slice::from_ref(&file), &options, Kind::Kvm)
        .unwrap_or_else(|report| panic!("{report}"));
    let given: Vec<String> = loaded
        .config
        .backends
        .iter()
        .flat_map(|backend| &backend.options)
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let expected = [
        "label=\"a\"",
        "user-data=\"hello\"",
        "label=\"b\"",
        "user-data=\"hello\"",
    ];
    assert_eq!(given, expected);

    let file = scene.write("vm.toml", format!("{MAIN}{disks}"));
    let report = vmm_host::config::load(std::slice::from_ref(&file), &options, Kind::Kvm)
        .unwrap_err()
        .to_string();
    assert_eq!(
        report.matches("needs a table [seedling]").count(),
        2,
        "{report}"
    );
}

#[test]
fn ten_megabytes_of_user_data_may_stand_in_the_vm_file() {
    let scene = scene();
    let line = "# \u{1f980} and so on, in more than one byte for a letter\n";
    let text = line.repeat(10_000_000 / line.len());
    let disk = "[block_dev.a]\ntype = \"cloudinit\"\n\
        [dev.a]\ndriver = \"pci-virtio-block\"\npci-path = \"0.4.0\"\nblock_dev = \"a\"\n";
    scene.write(
        "vm.toml",
        format!("{MAIN}{disk}[cloudinit]\nuser-data = \"\"\"\n{text}\"\"\"\n"),
    );
    let ran = scene.run(&["check", "vm.toml", "--plugin-path", "plugins"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
}

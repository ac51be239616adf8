//! One plugin, built as its author may build it. Cargo keeps what it builds here in the target directory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::objects::{Stage, built, workspace};
use crate::vm;

/// Builds the plugin that panics on demand with these settings, as `libNAME.so`. All variants have one profile name, so that
/// they share what cargo builds for itself.
fn build(name: &str, settings: &[&str]) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("abi-variants");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args([
            "build",
            "--offline",
            "--quiet",
            "-p",
            "vmm-test-plugin-panic",
        ])
        .args(["--profile", "variant"])
        .current_dir(workspace(""))
        .env("CARGO_TARGET_DIR", &target);
    // What the plugin links need not be fast.
    let common = [
        "inherits='release'",
        "debug=false",
        "package.'*'.opt-level=0",
    ];
    for setting in common.iter().chain(settings) {
        command
            .arg("--config")
            .arg(format!("profile.variant.{setting}"));
    }
    let done = command.output().expect("cargo");
    let text = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{name}: {text}");
    let kept = target.join(format!("lib{name}.so"));
    std::fs::copy(target.join("variant/libvmm_test_plugin_panic.so"), &kept).unwrap();
    kept
}

/// It works, and a panic in it stops at its boundary.
fn works(path: &Path) {
    let mut stage = Stage::new();
    let device = stage.device(path, &[]).unwrap();
    assert_eq!(device.read(), 0x5a);
    let device = stage.device(path, &[("where", "read")]).unwrap();
    assert_eq!(device.read(), 0xff);
    assert!(stage.fault().contains("dev.it has failed"));
}

#[test]
fn a_debug_build_works() {
    works(&built("vmm-test-plugin-panic"));
}

#[test]
fn a_release_build_works() {
    works(&build("release", &["lto='off'"]));
}

/// All of the plugin as one unit, without a symbol but the one that the host looks for.
#[test]
fn a_build_with_fat_lto_and_stripped_works() {
    let settings = [
        "lto='fat'",
        "strip='symbols'",
        "codegen-units=1",
        "opt-level='s'",
    ];
    works(&build("fat", &settings));
}

/// It works until it panics, which ends the process, as it was warned: its last words are the panic's.
#[test]
fn a_build_that_aborts_on_panic_is_warned_about() {
    let name = "a_build_that_aborts_on_panic_is_warned_about";
    if !vm::possible(name) {
        return;
    }
    let path = build("abort", &["panic='abort'", "lto='off'", "opt-level=0"]);
    for (place, code) in [("nowhere", Some(7)), ("read", None)] {
        let scene = vm::scene(&[]);
        vm::link(&scene, &path);
        let device = format!(
            "[dev.bad]\ndriver = \"test-panic\"\nwhere = \"{place}\"\n{}",
            vm::PORT
        );
        let ended = vm::run(&scene, "mode=hello checks=machine", &device);
        assert_eq!(ended.code, code, "{ended:?}");
        let warning = "warn: plugin test-panic: built without unwinding, so a panic in it ends the VM's process";
        assert!(ended.log.contains(warning), "{}", ended.log);
        let panicked = ended.log.contains("the test wants a panic in read");
        assert_eq!(panicked, code.is_none(), "{}", ended.log);
    }
}

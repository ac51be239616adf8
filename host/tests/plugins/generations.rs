//! Plugins that are older or newer than the host, that have a table wrong, and one in C.

use std::collections::BTreeSet;

use tempfile::TempDir;

use crate::objects::{Stage, built, compile, workspace};
use crate::vm;

#[test]
fn an_older_plugin_works() {
    let mut stage = Stage::new();
    let device = stage.device(&built("vmm-test-plugin-older"), &[]).unwrap();
    device.write(1);
    assert_eq!(device.read(), 0x1d);
}

#[test]
fn a_newer_plugin_works() {
    let mut stage = Stage::new();
    let device = stage.device(&built("vmm-test-plugin-newer"), &[]).unwrap();
    device.write(1);
    assert_eq!(
        device.read(),
        0x4e,
        "it got what it needs, and no service of the future"
    );
}

/// They share a process, and a VM, with plugins of this generation.
#[test]
fn generations_live_in_one_vm() {
    let name = "generations_live_in_one_vm";
    if !vm::possible(name) {
        return;
    }
    let scene = vm::scene(&[
        "vmm-test-plugin-older",
        "vmm-test-plugin-newer",
        "hello-device",
    ]);
    let ended = vm::run(
        &scene,
        "mode=hello checks=machine",
        "[dev.a]\ndriver = \"test-older\"\n[dev.b]\ndriver = \"test-newer\"\nport = 0x531\n[dev.c]\ndriver = \"hello\"\n\
         [dev.d]\ndriver = \"hello\"\nport = 0x600",
    );
    assert_eq!(
        (ended.code, ended.console.contains("PASS")),
        (Some(0), true),
        "{ended:?}"
    );
}

/// One line that says which table, which method, which parameter (counted from 0, the object), and both types. A call through
/// the wrong table would abort this process.
#[test]
fn a_skewed_table_is_refused_in_one_line() {
    let mut stage = Stage::new();
    let refused = stage
        .device(&built("vmm-test-plugin-skewed"), &[])
        .err()
        .unwrap();
    assert_eq!(
        format!("{refused:#}"),
        "the plugin's table vmm.io/1 differs: read.param_2: expected u64, found u32; \
         build it against a vmm-plugin-api with the table as published"
    );
}

/// The same before a VM exists, with the place in its file.
#[test]
fn a_vm_with_a_skewed_plugin_is_not_built() {
    let name = "a_vm_with_a_skewed_plugin_is_not_built";
    if !vm::possible(name) {
        return;
    }
    let scene = vm::scene(&["vmm-test-plugin-skewed"]);
    let ended = vm::run(&scene, "mode=hello", "[dev.odd]\ndriver = \"test-skewed\"");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let line = "error: vm.toml:17: dev.odd: the plugin's table vmm.io/1 differs: read.param_2: expected u64, found u32;";
    assert!(ended.log.contains(line), "{}", ended.log);
    assert_eq!(ended.log.lines().count(), 1, "{}", ended.log);
}

#[test]
fn a_plugin_in_c_works() {
    let dir = TempDir::new().unwrap();
    let plugin = dir.path().join("libhello_c.so");
    compile(&workspace("examples/hello-c/hello.c"), &[], &plugin);
    let mut stage = Stage::new();
    let device = stage.device(&plugin, &[("text", "Good morning")]).unwrap();
    assert_eq!(device.text(), "Good morning");
    assert_eq!(device.read(), 0);
    device.write(1);
    assert_eq!(device.text(), "Good morning");
}

/// The guest reads the port and expects ones: the letters that the C plugin gives are what it finds instead.
#[test]
fn a_guest_reads_the_plugin_in_c() {
    let name = "a_guest_reads_the_plugin_in_c";
    if !vm::possible(name) {
        return;
    }
    let scene = vm::scene(&[]);
    compile(
        &workspace("examples/hello-c/hello.c"),
        &[],
        &scene.path("plugins/libhello_c.so"),
    );
    let ended = vm::run(
        &scene,
        "mode=hello checks=machine",
        &format!("[dev.c]\ndriver = \"hello-c\"\n{}", vm::PORT),
    );
    assert_eq!(ended.code, Some(7), "{ended:?}");
    assert!(
        ended
            .console
            .contains("FAIL machine: a port nobody has reads as ones"),
        "{ended:?}"
    );
}

/// Forty plugins of one kind, as if from forty vendors: each has its own statics, panic hook and log bridge.
#[test]
fn forty_copies_of_a_plugin_live_in_one_process() {
    let dir = TempDir::new().unwrap();
    let mut stage = Stage::new();
    let mut devices = Vec::new();
    for number in 0..40 {
        let copy = dir.path().join(format!("libhello{number}.so"));
        std::fs::copy(built("hello-device"), &copy).unwrap();
        let text = format!("copy {number}");
        devices.push((stage.device(&copy, &[("text", &text)]).unwrap(), text));
    }
    let texts: BTreeSet<String> = devices.iter().map(|(device, _)| device.text()).collect();
    assert_eq!(texts.len(), 40);
    for (device, text) in devices {
        assert!(texts.contains(&text));
        device.write(0);
        assert_eq!(device.text(), text);
    }
}

/// Several devices of one plugin share its code and nothing else.
#[test]
fn several_devices_of_one_plugin_do_not_know_each_other() {
    let mut stage = Stage::new();
    let path = built("hello-device");
    let one = stage.device(&path, &[("text", "one")]).unwrap();
    let two = stage.device(&path, &[("text", "two")]).unwrap();
    assert_eq!(one.read(), u64::from(b'o'));
    assert_eq!(two.text(), "two");
    drop(two);
    assert_eq!(one.text(), "ne");
}

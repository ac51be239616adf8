//! Panics in plugins: each is reported with plugin, device, method and place, and only the device with it is lost.

use crate::objects::{Stage, built};
use crate::vm::{self, Ended, PORT};

const PLUGIN: &str = "vmm-test-plugin-panic";

/// What the host logs of a panic that the fixture was told to have in `place`, and reports as in `method`.
fn report(label: &str, method: &str, place: &str) -> String {
    format!(
        "error: plugin test-panic 0.1.0, {label}, in {method}: panicked at tests/plugins/panic/src/lib.rs:29:9: the test wants a panic in {place}"
    )
}

/// Runs a guest with a device that panics in `place`.
fn run(cmdline: &str, place: &str, on_fault: &str) -> Ended {
    let scene = vm::scene(&[PLUGIN]);
    let device =
        format!("[dev.bad]\ndriver = \"test-panic\"\nwhere = \"{place}\"\n{PORT}\n{on_fault}");
    vm::run(&scene, cmdline, &device)
}

#[test]
fn a_panic_while_the_guest_runs_stops_the_vm() {
    let name = "a_panic_while_the_guest_runs_stops_the_vm";
    if !vm::possible(name) {
        return;
    }
    for (place, method) in [
        ("read", "read"),
        ("write", "write"),
        ("thread", "thread test"),
    ] {
        for policy in ["", "on_fault = \"stop\""] {
            let ended = run("mode=hello checks=machine", place, policy);
            assert_eq!(ended.code, Some(1), "{place}: {ended:?}");
            assert!(
                ended.log.contains(&report("dev.bad", method, place)),
                "{}",
                ended.log
            );
            let consequence = "error: dev.bad has failed: the VM stops (on_fault = \"fail\"";
            assert!(ended.log.contains(consequence), "{}", ended.log);
        }
    }
}

#[test]
fn a_device_that_may_fail_reads_all_ones_from_then_on() {
    let name = "a_device_that_may_fail_reads_all_ones_from_then_on";
    if !vm::possible(name) {
        return;
    }
    // The guest's check wants ones in a byte and in four, and writes besides.
    let ended = run("mode=hello checks=machine", "read", "on_fault = \"fail\"");
    assert_eq!(
        (ended.code, ended.console.contains("PASS")),
        (Some(0), true),
        "{ended:?}"
    );
    assert!(
        ended.log.contains(&report("dev.bad", "read", "read")),
        "{}",
        ended.log
    );
    let consequence =
        "warn: dev.bad has failed: the guest goes on without it (on_fault = \"fail\")";
    assert!(ended.log.contains(consequence), "{}", ended.log);
    assert_eq!(
        ended.log.matches("dev.bad").count(),
        2,
        "said once: {}",
        ended.log
    );

    // Without a fault the port reads 0x5a, which the guest notices.
    let ended = run(
        "mode=hello checks=machine",
        "nowhere",
        "on_fault = \"fail\"",
    );
    assert_eq!(ended.code, Some(7), "{ended:?}");
    for (place, method) in [
        ("write", "write"),
        ("thread", "thread test"),
        ("start", "start"),
    ] {
        let ended = run("mode=hello checks=machine", place, "on_fault = \"fail\"");
        assert!(
            ended.console.contains(" checks"),
            "the guest got to its end: {ended:?}"
        );
        assert!(
            ended.log.contains(&report("dev.bad", method, place)),
            "{}",
            ended.log
        );
    }
}

#[test]
fn a_panic_before_the_guest_runs_is_reported_with_the_place_in_the_file() {
    let name = "a_panic_before_the_guest_runs_is_reported_with_the_place_in_the_file";
    if !vm::possible(name) {
        return;
    }
    for place in ["create", "describe"] {
        let ended = run("mode=poweroff", place, "on_fault = \"fail\"");
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(
            ended.log.contains(&report("dev.bad", "create", place)),
            "{}",
            ended.log
        );
        assert!(
            ended
                .log
                .contains("error: vm.toml:17: dev.bad: panicked at "),
            "{}",
            ended.log
        );
    }
    let ended = run("mode=poweroff", "start", "");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(
        ended.log.contains(&report("dev.bad", "start", "start")),
        "{}",
        ended.log
    );
    assert!(
        ended.log.contains("error: dev.bad does not start"),
        "{}",
        ended.log
    );
}

/// The guest is done and its exit code stands; the fault is reported all the same.
#[test]
fn a_panic_while_the_vm_ends_is_reported() {
    let name = "a_panic_while_the_vm_ends_is_reported";
    if !vm::possible(name) {
        return;
    }
    for place in ["stop", "drop"] {
        let ended = run("mode=poweroff", place, "");
        assert_eq!(ended.code, Some(0), "{place}: {ended:?}");
        assert!(
            ended.log.contains(&report("dev.bad", place, place)),
            "{}",
            ended.log
        );
    }
}

/// A reset pauses devices. One that fails then is lost, and the guest starts again without it.
#[test]
fn a_panic_while_the_guest_resets() {
    let name = "a_panic_while_the_guest_resets";
    if !vm::possible(name) {
        return;
    }
    for (policy, code) in [("", 1), ("on_fault = \"fail\"", 0)] {
        let scene = vm::scene(&[PLUGIN]);
        let device = format!("[dev.bad]\ndriver = \"test-panic\"\nwhere = \"pause\"\n{policy}");
        let ended = vm::run_with(&scene, "", "mode=reboot-once", &device);
        assert_eq!(ended.code, Some(code), "{ended:?}");
        assert!(
            ended.log.contains(&report("dev.bad", "pause", "pause")),
            "{}",
            ended.log
        );
        assert_eq!(ended.console.contains("second boot"), code == 0);
    }
}

/// A disk whose backend panics: the guest's own checks find out, by I/O errors if the device may fail.
fn disk(place: &str, on_fault: &str) -> Ended {
    let scene = vm::scene(&[PLUGIN, "vmm-plugin-virtio-block"]);
    let tables = format!(
        "[dev.disk]\ndriver = \"pci-virtio-block\"\npci-path = \"0.4.0\"\nblock_dev = \"bad\"\n{on_fault}\n\
         [block_dev.bad]\ntype = \"test-panic\"\nwhere = \"{place}\""
    );
    vm::run(&scene, "mode=hello checks=block", &tables)
}

/// A backend's queues and the backend itself end after the guest.
#[test]
fn a_panic_in_a_backend_that_ends_is_reported() {
    let name = "a_panic_in_a_backend_that_ends_is_reported";
    if !vm::possible(name) {
        return;
    }
    for place in ["close_queue", "drop"] {
        let ended = disk(place, "");
        let expected = report("block_dev.bad", place, place);
        assert!(ended.log.contains(&expected), "{}", ended.log);
        assert!(ended.console.contains(" checks"), "{ended:?}");
    }
}

#[test]
fn a_panic_in_a_backend_stops_the_vm() {
    let name = "a_panic_in_a_backend_stops_the_vm";
    if !vm::possible(name) {
        return;
    }
    for place in ["submit", "reap"] {
        let ended = disk(place, "");
        assert_eq!(ended.code, Some(1), "{place}: {ended:?}");
        assert!(
            ended.log.contains(&report("block_dev.bad", place, place)),
            "{}",
            ended.log
        );
        assert!(
            ended
                .log
                .contains("error: block_dev.bad has failed: the VM stops"),
            "{}",
            ended.log
        );
    }
    let ended = disk("create", "");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(
        ended
            .log
            .contains(&report("block_dev.bad", "create", "create")),
        "{}",
        ended.log
    );
}

#[test]
fn a_backend_of_a_device_that_may_fail_gives_the_guest_errors() {
    let name = "a_backend_of_a_device_that_may_fail_gives_the_guest_errors";
    if !vm::possible(name) {
        return;
    }
    for place in ["submit", "reap"] {
        let ended = disk(place, "on_fault = \"fail\"");
        assert!(
            ended.log.contains(&report("block_dev.bad", place, place)),
            "{}",
            ended.log
        );
        assert_eq!(ended.code, Some(7), "its checks fail: {ended:?}");
        assert!(ended.console.contains("FAIL block"), "{ended:?}");
    }
}

/// After a panic in a thread of the plugin's own the device is lost as after any other.
#[test]
fn a_device_whose_thread_has_panicked_reads_ones() {
    let mut stage = Stage::new();
    let device = stage
        .device(&built(PLUGIN), &[("where", "thread")])
        .unwrap();
    let other = stage
        .device(&built(PLUGIN), &[("where", "nowhere")])
        .unwrap();
    assert_eq!(device.read(), 0x5a);
    device.write(1);
    assert!(stage.fault().contains("dev.it has failed"));
    assert_eq!(device.read(), 0xff);
    assert_eq!(other.read(), 0x5a, "another device of the plugin goes on");
}

//! The host as on illumos, on the emulated driver: the self-test guest, its life, and what a driver refuses. The first misuse of the driver
//! ends the host.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../../../host/tests/run/mod.rs"]
mod run;

use run::{Ran, Running, STDIO, Scene, disk, host, kvm, vm};
use rustix::process::Signal;

const BANNER: &str = "vmm-selftest";

/// Starts it on a system that differs from a perfect one by `settings`.
fn start(scene: &Scene, settings: &str, vm: &str) -> Running {
    start_with(scene, settings, vm, &[])
}

fn start_with(scene: &Scene, settings: &str, vm: &str, arguments: &[&str]) -> Running {
    let mut command = host();
    command
        .env("VMM_DRIVER", settings)
        .env("VMM_DRIVER_STRICT", "1");
    scene.start_with(command, vm, arguments)
}

fn run(settings: &str, vm: &str) -> Ran {
    start(&Scene::new(), settings, vm).wait()
}

#[test]
fn the_self_test_guest_passes() {
    if !kvm("the_self_test_guest_passes") {
        return;
    }
    let rest = disk("type = \"mem-async\"\nsize = \"16M\"");
    for cpus in [1, 2] {
        let main = format!("hypervisor = \"bhyve\"\ncpus = {cpus}\nexit_on_reboot = 1");
        let ran = run("", &vm("", &main, &rest)).exited(0).said("PASS");
        assert!(!ran.out.contains("FAIL"), "{ran}");
    }
}

#[test]
fn memory_above_4_gib_is_there() {
    if !kvm("memory_above_4_gib_is_there") {
        return;
    }
    let main = "memory = 4096\nexit_on_reboot = 1";
    run("", &vm("checks=machine", main, STDIO))
        .exited(0)
        .said("PASS");
}

#[test]
fn resets_keep_memory_and_each_door_leads_to_one() {
    if !kvm("resets_keep_memory_and_each_door_leads_to_one") {
        return;
    }
    let ran = run("", &vm("mode=reboot-once", "cpus = 2", STDIO))
        .exited(0)
        .said("first boot")
        .said("second boot");
    assert_eq!(ran.out.matches(BANNER).count(), 2, "{ran}");
    for mode in ["reboot", "reboot-ps2", "reboot-port92", "triple-fault"] {
        let main = "exit_on_reboot = 5";
        run("", &vm(&format!("mode={mode}"), main, STDIO)).exited(5);
    }
}

#[test]
fn devices_work_again_after_resets() {
    if !kvm("devices_work_again_after_resets") {
        return;
    }
    let scene = Scene::new();
    scene.image("disk.img", 1 << 20);
    let file = disk("type = \"file\"\npath = \"disk.img\"");
    let running = start(&scene, "", &vm("mode=reboot", "", &file));
    running.expect_times(BANNER, 5);
    running.signal(Signal::INT);
    running.wait().exited(0);
}

#[test]
fn ends_are_told_apart() {
    if !kvm("ends_are_told_apart") {
        return;
    }
    run("", &vm("mode=poweroff", "exit_on_halt = 7", STDIO))
        .exited(7)
        .logged("the guest has turned its power off");
    run("", &vm("mode=halt", "exit_on_halt = 9", STDIO))
        .exited(9)
        .logged("the guest has halted");
    let running = start(&Scene::new(), "", &vm("mode=wait-power-button", "", STDIO));
    running.expect("waiting");
    running.signal(Signal::TERM);
    running
        .wait()
        .exited(0)
        .said("ok   power: the button was pressed");
}

#[test]
fn a_vm_that_somebody_destroys_ends_with_its_own_code() {
    if !kvm("a_vm_that_somebody_destroys_ends_with_its_own_code") {
        return;
    }
    run("destroyed_after=1500", &vm("mode=hang", "", STDIO))
        .exited(4)
        .said("hanging")
        .logged("VM test was destroyed by another process");
}

#[test]
fn a_vm_from_the_reservoir() {
    if !kvm("a_vm_from_the_reservoir") {
        return;
    }
    let reserved = vm("mode=poweroff", "use_reservoir = true", STDIO);
    run("reservoir=96", &reserved).exited(0);
    run("reservoir=32,reservoir_limit=4096", &reserved)
        .exited(1)
        .logged("bhyve has no 64 MiB for the guest")
        .logged("32 MiB of the reservoir are free and 0 in use")
        .logged("the limit for all is 4096 MiB")
        .logged("leave out `use_reservoir`");
}

#[test]
fn what_the_driver_refuses_is_said_with_a_remedy() {
    if !kvm("what_the_driver_refuses_is_said_with_a_remedy") {
        return;
    }
    let plain = vm("mode=poweroff", "", STDIO);
    for (settings, texts) in [
        (
            "present=false",
            &["/dev/vmmctl", "pkg install system/bhyve"][..],
        ),
        ("privileged=false", &["/dev/vmmctl", "pfexec"]),
        ("version=15", &["version 15", "16 is the oldest", "update"]),
        ("hvm_available=false", &["VM test", "another hypervisor"]),
        ("zone_limit=0", &["VM test", "a zone may have one VM"]),
        ("other=test", &["VM test", "--force"]),
    ] {
        let mut ran = run(settings, &plain).exited(1);
        for text in texts {
            ran = ran.logged(text);
        }
    }
    run("version=19", &plain)
        .exited(0)
        .logged("version 19")
        .logged("look for a newer vmm-host");
}

#[test]
fn force_takes_the_place_of_a_vm_of_the_same_name() {
    if !kvm("force_takes_the_place_of_a_vm_of_the_same_name") {
        return;
    }
    let plain = vm("mode=poweroff", "", STDIO);
    let force = |settings: &str| start_with(&Scene::new(), settings, &plain, &["--force"]).wait();
    // What is not there is not asked for.
    let ran = force("").exited(0);
    assert!(!ran.err.contains("destroys"), "{ran}");
    force("other=test")
        .exited(0)
        .logged("VM test is there already; --force destroys it");
    force("other=test,other_held=true")
        .exited(1)
        .logged("still open in another process")
        .logged("fuser /dev/vmm/test");
}

#[test]
fn names_that_the_driver_could_not_take_are_refused_with_their_line() {
    if !kvm("names_that_the_driver_could_not_take_are_refused_with_their_line") {
        return;
    }
    for (name, text) in [
        ("a/b".to_owned(), "without blanks and `/`"),
        ("n".repeat(128), "127"),
    ] {
        let file = vm("mode=poweroff", "", STDIO);
        let file = file.replace("name = \"test\"", &format!("name = \"{name}\""));
        run("", &file).exited(3).logged("name").logged(text);
    }
    run("", &vm("", "hypervisor = \"kvm\"", STDIO))
        .exited(3)
        .logged("hypervisor");
    run("", &vm("", "hugepages = \"2M\"", STDIO))
        .exited(3)
        .logged("hugepages");
}

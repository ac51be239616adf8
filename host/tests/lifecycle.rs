//! How a VM's life begins and ends: power off, halt, resets, faults, signals.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod run;

use run::{STDIO, Scene, disk, elf, host, kvm, vm};
use rustix::process::Signal;

const BANNER: &str = "vmm-selftest";

#[test]
fn power_off_ends_with_exit_on_halt() {
    if !kvm("power_off_ends_with_exit_on_halt") {
        return;
    }
    let scene = Scene::new();
    scene
        .run(&vm("mode=poweroff", "exit_on_halt = 7", STDIO))
        .exited(7)
        .said(BANNER)
        .logged("the guest has turned its power off");
    assert!(scene.files().is_empty(), "{:?}", scene.files());
}

#[test]
fn a_guest_that_halts_for_good_is_noticed() {
    if !kvm("a_guest_that_halts_for_good_is_noticed") {
        return;
    }
    let scene = Scene::new();
    // A second CPU that nobody has started does not hide it.
    let [one, two] = [1, 2].map(|cpus| {
        let main = format!("exit_on_halt = 9\ncpus = {cpus}");
        scene.start(&vm("mode=halt", &main, STDIO))
    });
    one.wait().exited(9).logged("the guest has halted");
    two.wait().exited(9).logged("the guest has halted");
}

/// A kernel that says so and then waits for interrupts, of which there are none.
const IDLE: [u8; 11] = [
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'R', // mov al, 'R'
    0xee, // out dx, al
    0xfb, // sti
    0xf4, // hlt
    0xeb, 0xfc, // jmp to sti
];

#[test]
fn an_idle_guest_is_not_taken_for_halted() {
    if !kvm("an_idle_guest_is_not_taken_for_halted") {
        return;
    }
    let scene = Scene::new();
    scene.write("kernel", elf(&IDLE));
    let running = scene.start(&vm("", "kernel = \"kernel\"", STDIO));
    running.expect("R");
    // A guest that has halted for good is found within four seconds.
    std::thread::sleep(std::time::Duration::from_secs(6));
    running.signal(Signal::TERM);
    let ran = running.wait().exited(0).logged("asked to terminate");
    assert!(!ran.err.contains("halted"), "{ran}");
}

#[test]
fn a_reboot_happens_in_place_and_keeps_memory() {
    if !kvm("a_reboot_happens_in_place_and_keeps_memory") {
        return;
    }
    let ran = Scene::new()
        .run(&vm("mode=reboot-once", "", STDIO))
        .exited(0)
        .said("first boot")
        .said("second boot");
    assert_eq!(ran.out.matches(BANNER).count(), 2, "{ran}");
}

/// Open descriptors, threads and mappings of a process.
fn holdings(id: u32) -> [usize; 3] {
    let count = |what: &str| {
        std::fs::read_dir(format!("/proc/{id}/{what}"))
            .unwrap()
            .count()
    };
    let maps = std::fs::read_to_string(format!("/proc/{id}/maps")).unwrap();
    [count("fd"), count("task"), maps.lines().count()]
}

#[test]
fn ten_reboots_in_a_row_leak_nothing() {
    if !kvm("ten_reboots_in_a_row_leak_nothing") {
        return;
    }
    for (mode, cpus) in [("reboot", 1), ("reboot-ps2", 2), ("reboot-port92", 1)] {
        let scene = Scene::new();
        let rest = disk("type = \"mem-async\"\nsize = \"1M\"");
        let main = format!("cpus = {cpus}");
        let running = scene.start(&vm(&format!("mode={mode}"), &main, &rest));
        running.expect_times(BANNER, 3);
        let before = holdings(running.id());
        running.expect_times(BANNER, 13);
        let after = holdings(running.id());
        running.signal(Signal::TERM);
        running.wait().exited(0);
        for (before, after) in before.iter().zip(after) {
            // The I/O of the moment may hold one or two.
            assert!(after <= before + 3, "{before} -> {after} of {before:?}");
        }
    }
}

#[test]
fn devices_work_again_after_a_reset() {
    if !kvm("devices_work_again_after_a_reset") {
        return;
    }
    let scene = Scene::new();
    scene.image("disk.img", 1 << 20);
    let file = disk("type = \"file\"\npath = \"disk.img\"");
    scene
        .run(&vm("checks=block", "exit_on_reboot = 4", &file))
        .exited(0)
        .said("PASS");
    let running = scene.start(&vm("mode=reboot", "", &file));
    running.expect_times(BANNER, 5);
    running.signal(Signal::INT);
    running.wait().exited(0);
    assert_eq!(scene.files(), ["disk.img"]);
}

#[test]
fn a_reset_ends_with_exit_on_reboot() {
    if !kvm("a_reset_ends_with_exit_on_reboot") {
        return;
    }
    for mode in [
        "reboot",
        "reboot-ps2",
        "reboot-port92",
        "triple-fault",
        "panic",
    ] {
        let ran = Scene::new()
            .run(&vm(&format!("mode={mode}"), "exit_on_reboot = 5", STDIO))
            .exited(5);
        assert_eq!(ran.out.matches(BANNER).count(), 1, "{mode}: {ran}");
    }
}

#[test]
fn a_triple_fault_resets() {
    if !kvm("a_triple_fault_resets") {
        return;
    }
    let running = Scene::new().start(&vm("mode=triple-fault", "", STDIO));
    running.expect_times(BANNER, 3);
    running.signal(Signal::TERM);
    running.wait().exited(0).logged("triple fault");
}

#[test]
fn a_crash_shows_where_the_guest_was() {
    if !kvm("a_crash_shows_where_the_guest_was") {
        return;
    }
    Scene::new()
        .run(&vm("mode=bad-jump", "exit_on_halt = 7", STDIO))
        .exited(1)
        .said("jumping to 0xdffff000")
        .logged("vCPU 0 can't go on")
        .logged("64-bit mode, ring 3")
        .logged("rip   00000000dffff000")
        .logged("code at dffff000:")
        .logged("[not in RAM]");
}

#[test]
fn sigterm_presses_the_power_button() {
    if !kvm("sigterm_presses_the_power_button") {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let running = Scene::new().start(&vm("mode=wait-power-button", "", STDIO));
        running.expect("waiting");
        running.signal(signal);
        running
            .wait()
            .exited(0)
            .said("ok   power: the button was pressed")
            .logged("the guest was asked to power off");
    }
}

#[test]
fn a_guest_that_ignores_its_button_is_stopped() {
    if !kvm("a_guest_that_ignores_its_button_is_stopped") {
        return;
    }
    let running = Scene::new().start(&vm("mode=hang", "exit_on_halt = 3", STDIO));
    running.expect("hanging");
    running.signal(Signal::INT);
    running
        .wait()
        .exited(3)
        .logged("does not listen to its power button");
}

/// A kernel that enables its power button (PM1_EN), says so, and then only spins.
const DEAF: [u8; 18] = [
    0x66, 0xba, 0x02, 0xb0, // mov dx, 0xb002
    0x66, 0xb8, 0x00, 0x01, // mov ax, 0x100
    0x66, 0xef, // out dx, ax
    0xb0, b'R', // mov al, 'R'
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    0x90, // nop, before the loop
];

#[test]
fn a_second_signal_stops_at_once() {
    if !kvm("a_second_signal_stops_at_once") {
        return;
    }
    let scene = Scene::new();
    let code: Vec<u8> = DEAF.into_iter().chain([0xeb, 0xfe]).collect();
    scene.write("kernel", elf(&code));
    let running = scene.start(&vm("", "kernel = \"kernel\"", STDIO));
    running.expect("R");
    running.signal(Signal::INT);
    running.expect_log("the guest was asked to power off");
    running.signal(Signal::INT);
    running
        .wait()
        .exited(0)
        .logged("again: the VM stops at once");
}

#[test]
fn two_cpus_pass_the_self_test() {
    if !kvm("two_cpus_pass_the_self_test") {
        return;
    }
    let rest = disk("type = \"mem-async\"\nsize = \"16M\"");
    let ran = Scene::new()
        .run(&vm("", "cpus = 2\nexit_on_reboot = 1", &rest))
        .exited(0)
        .said("PASS");
    assert!(!ran.out.contains("FAIL"), "{ran}");
}

#[test]
fn memory_above_4_gib_is_there() {
    if !kvm("memory_above_4_gib_is_there") {
        return;
    }
    let ran = Scene::new().run(&vm(
        "checks=machine,acpi",
        "memory = \"5G\"\nexit_on_reboot = 1",
        STDIO,
    ));
    if ran.err.contains("more than this machine has") {
        println!("SKIPPED: memory_above_4_gib_is_there: this machine has less than 5 GiB");
        return;
    }
    ran.exited(0)
        .said("the last bytes of the memory up to 0xc0000000 can be written")
        .said("the last bytes of the memory up to 0x180000000 can be written")
        .said("PASS");
}

#[test]
fn the_debug_log_has_the_boot_timeline() {
    if !kvm("the_debug_log_has_the_boot_timeline") {
        return;
    }
    let vm = vm("mode=poweroff", "", STDIO);
    let mut ran = Scene::new()
        .start_with(host(), &vm, &["--log-level", "debug"])
        .wait()
        .exited(0)
        .logged("Boot timeline");
    for mark in [
        "configuration read",
        "plugins loaded",
        "VM created, memory mapped",
        "devices created",
        "kernel loaded",
        "CPUs run",
        "first port write",
    ] {
        ran = ran.logged(mark);
    }
}

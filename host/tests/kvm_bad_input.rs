//! What can't be run is refused with the reason and what to do, by the exit code, and leaves nothing behind.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod run;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;

use run::{Ran, STDIO, Scene, elf, host, host_by_mounting, kvm, vm};
use rustix::process::geteuid;

/// The VM could not be built.
const FAILED: i32 = 1;
/// The VM file is refused.
const REFUSED: i32 = 3;

/// Runs a VM with the implicit console, whose socket must not be left, nor may anything wait for a client.
fn run_main(scene: &Scene, main: &str) -> Ran {
    let before = scene.files();
    let ran = scene.run(&vm("mode=poweroff", main, ""));
    assert_eq!(scene.files(), before, "{ran}");
    ran
}

#[test]
fn what_is_no_kernel_is_named() {
    if !kvm("what_is_no_kernel_is_named") {
        return;
    }
    let scene = Scene::new();
    let mut old = elf(&[0xf4]);
    old[4] = 1;
    let mut arm = elf(&[0xf4]);
    arm[18] = 183;
    // Its one segment says that it has more in the file than there is.
    let mut cut = elf(&[0x90; 64]);
    cut.truncate(0x80);
    let mut far = elf(&[0xf4]);
    far[0x50..0x60].copy_from_slice(&[1 << 32u64, 1 << 32].map(u64::to_le_bytes).concat());
    let kernels: [(&[u8], &str); 7] = [
        (b"#!/bin/sh\necho no kernel\n", "it is a text file"),
        (&[0x1f, 0x8b, 8, 0, 0, 0], "unpack it with gunzip first"),
        (&[0; 4096], "it has neither a bzImage nor an ELF header"),
        (&old, "it is a 32-bit ELF file"),
        (&arm, "it is an ELF file for another CPU"),
        (&cut, "is it truncated?"),
        (&far, "raise [main] memory"),
    ];
    for (bytes, why) in kernels {
        scene.write("kernel", bytes);
        run_main(&scene, "kernel = \"kernel\"")
            .exited(FAILED)
            .logged("kernel kernel")
            .logged(why);
    }
}

#[test]
fn kernels_that_cannot_be_read_are_named() {
    if !kvm("kernels_that_cannot_be_read_are_named") {
        return;
    }
    let scene = Scene::new();
    std::fs::create_dir(scene.path("directory")).unwrap();
    scene.write("empty", "");
    for name in ["directory", "empty"] {
        let ran = run_main(&scene, &format!("kernel = \"{name}\"")).logged(name);
        assert!(
            [FAILED, REFUSED].contains(&ran.status.code().unwrap()),
            "{ran}"
        );
    }
    run_main(&scene, "kernel = \"missing\"")
        .exited(REFUSED)
        .logged("No such file or directory");
    run_main(&scene, "kernel = \"builtin:other\"")
        .exited(REFUSED)
        .logged("selftest");
}

#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    if !kvm("an_initrd_that_does_not_fit_is_refused") {
        return;
    }
    let scene = Scene::new();
    scene.image("initrd.img", 64 << 20);
    run_main(&scene, "initrd = \"initrd.img\"")
        .exited(FAILED)
        .logged("initrd.img")
        .logged("raise [main] memory");
    let main = "initrd = \"initrd.img\"\nmemory = 128";
    scene
        .run(&vm("mode=poweroff", main, STDIO))
        .exited(0)
        .said("vmm-selftest");
}

#[test]
fn a_command_line_that_does_not_fit_is_refused() {
    if !kvm("a_command_line_that_does_not_fit_is_refused") {
        return;
    }
    let scene = Scene::new();
    let ran = scene.run(&vm(&"x".repeat(3000), "", "")).logged("cmdline");
    assert!(
        [FAILED, REFUSED].contains(&ran.status.code().unwrap()),
        "{ran}"
    );
    assert!(scene.files().is_empty(), "{:?}", scene.files());
}

#[test]
fn more_memory_than_the_machine_has_is_refused() {
    if !kvm("more_memory_than_the_machine_has_is_refused") {
        return;
    }
    let scene = Scene::new();
    run_main(&scene, "memory = \"64T\"")
        .exited(REFUSED)
        .logged("`memory` in [main]: 64T is more than this machine has");
    run_main(&scene, "memory = \"1M\"")
        .exited(FAILED)
        .logged("raise [main] memory");
}

#[test]
fn more_cpus_than_allowed_are_refused() {
    if !kvm("more_cpus_than_allowed_are_refused") {
        return;
    }
    let scene = Scene::new();
    run_main(&scene, "cpus = 255")
        .exited(REFUSED)
        .logged("`cpus` in [main]")
        .logged("254");
    run_main(&scene, "cpus = 0").exited(REFUSED);
    // KVM may allow fewer than a guest could have.
    let ran = scene.run(&vm("mode=poweroff", "cpus = 254", STDIO));
    match ran.status.code() {
        Some(0) => println!("SKIPPED: more_cpus_than_allowed_are_refused: KVM allows 254"),
        _ => drop(
            ran.exited(FAILED)
                .logged("[main] cpus = 254 is more than this host's hypervisor allows: at most"),
        ),
    }
}

#[test]
fn without_kvm_the_reason_is_told() {
    const NAME: &str = "without_kvm_the_reason_is_told";
    let scene = Scene::new();
    std::fs::create_dir(scene.path("dev")).unwrap();
    let Some(command) = host_by_mounting(NAME, "mount --bind dev /dev && exec \"$@\"") else {
        return;
    };
    scene
        .start_with(command, &vm("mode=poweroff", "", ""), &[])
        .wait()
        .exited(FAILED)
        .logged("/dev/kvm")
        .logged("No such file or directory");
    assert_eq!(scene.files(), ["dev"]);
}

#[test]
fn without_permission_for_kvm_the_remedy_is_told() {
    const NAME: &str = "without_permission_for_kvm_the_remedy_is_told";
    const NOBODY: u32 = 65534;
    let Ok(device) = std::fs::metadata("/dev/kvm") else {
        println!("SKIPPED: {NAME}: there is no /dev/kvm");
        return;
    };
    if !geteuid().is_root() || device.permissions().mode() & 0o006 != 0 {
        println!("SKIPPED: {NAME}: needs root, and a /dev/kvm that is not for everybody");
        return;
    }
    let nobody = || {
        let mut command = host();
        command.uid(NOBODY).gid(NOBODY);
        command
    };
    if !nobody()
        .arg("--version")
        .output()
        .is_ok_and(|ran| ran.status.success())
    {
        println!("SKIPPED: {NAME}: others may not execute the host where it was built");
        return;
    }
    let scene = Scene::new();
    let all = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(scene.path(""), all).unwrap();
    scene
        .start_with(nobody(), &vm("mode=poweroff", "", ""), &[])
        .wait()
        .exited(FAILED)
        .logged("/dev/kvm")
        .logged("Permission denied")
        .logged("group");
    assert!(scene.files().is_empty(), "{:?}", scene.files());
}

//! What guest memory is made of: `[main] hugepages`, `prefault` and `memory_file`.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod run;

use run::{STDIO, Scene, kvm, vm};
use rustix::process::Signal;

/// The VM could not be built.
const FAILED: i32 = 1;
/// The VM file is refused.
const REFUSED: i32 = 3;

/// Memory of this process in kB, in use and free, by a key of `/proc`.
fn proc_kb(file: &str, key: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn prefaulted_memory_is_there_before_the_guest_runs() {
    if !kvm("prefaulted_memory_is_there_before_the_guest_runs") {
        return;
    }
    let scene = Scene::new();
    for (main, all) in [("prefault = true", true), ("", false)] {
        let running = scene.start(&vm("mode=hang", main, STDIO));
        running.expect("vmm-selftest");
        let resident = proc_kb(&format!("/proc/{}/status", running.id()), "VmRSS:");
        assert_eq!(resident >= 64 << 10, all, "{main}: {resident} kB");
        running.signal(Signal::TERM);
        running.wait();
    }
}

#[test]
fn memory_that_is_not_there_is_refused_before_the_guest_runs() {
    let scene = Scene::new();
    let (all, free) = (
        proc_kb("/proc/meminfo", "MemTotal:") >> 10,
        proc_kb("/proc/meminfo", "MemAvailable:") >> 10,
    );
    if all - free < 64 {
        println!("SKIPPED: memory_that_is_not_there_is_refused_before_the_guest_runs: all is free");
        return;
    }
    scene
        .run(&vm("", &format!("memory = {all}\nprefault = true"), STDIO))
        .exited(REFUSED)
        .logged("`prefault` in [main]")
        .logged("are to be allocated up front, and ")
        .logged("MiB of memory are free");
}

/// Where there are enough large pages the guest runs on them, elsewhere it is told how many there are.
#[test]
fn large_pages_are_used_or_asked_for() {
    if !kvm("large_pages_are_used_or_asked_for") {
        return;
    }
    let free: u64 =
        std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
            .map_or(0, |text| text.trim().parse().unwrap());
    let scene = Scene::new();
    for value in ["true", "\"2M\""] {
        let ran = scene.run(&vm("mode=poweroff", &format!("hugepages = {value}"), STDIO));
        if free >= 32 {
            ran.exited(0).said("vmm-selftest");
        } else {
            ran.exited(REFUSED)
                .logged("32 pages of 2 MiB are needed")
                .logged(&format!("{free} are free: \"sysctl vm.nr_hugepages="));
        }
    }
}

#[test]
fn a_memory_file_is_one_vms_and_stays() {
    if !kvm("a_memory_file_is_one_vms_and_stays") {
        return;
    }
    let scene = Scene::new();
    let main = "memory_file = \"ram\"";
    let running = scene.start(&vm("mode=hang", main, STDIO));
    running.expect("vmm-selftest");
    scene
        .run(&vm("", main, ""))
        .exited(FAILED)
        .logged("Cannot lock guest memory ram: is it that of another VM that runs?");
    running.signal(Signal::TERM);
    running.wait();
    let ram = std::fs::read(scene.path("ram")).unwrap();
    assert_eq!(ram.len(), 64 << 20);
    // The zero page, as direct boot writes it and the guest left it (boot.rst: `header`).
    assert_eq!(&ram[0x7202..0x7206], b"HdrS");
    scene
        .run(&vm("", &format!("{main}\nmemory = 32"), ""))
        .exited(REFUSED)
        .logged("ram has 67108864 bytes, and this VM's memory has 33554432");
    scene.run(&vm("mode=poweroff", main, STDIO)).exited(0);
}

//! What a VM file says about CPUs, as the guest and this machine's scheduler see it.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod run;

use run::{Running, STDIO, Scene, host, kvm, vm};
use rustix::process::Signal;

/// A made-up profile: leaves with and without subleaf, and one that the guest must not find.
const PROFILE: &str = "[cpuid.odd]
vendor = \"intel\"
\"0\" = [0xc, 0x756e6547, 0x6c65746e, 0x49656e69]
\"1\" = [0x000906ea, 0xffff0800, 0x80202001, 0x178bfbff]
\"4-0\" = [0xfc004121, 0x01c0003f, 0x3f, 0]
\"4-3\" = [0xfc1fc163, 0x03c0003f, 0xffff, 6]
\"6\" = [1, 0x10, 0x100, 0x1000]
\"6-1\" = [2, 0x20, 0x200, 0x2000]
\"c\" = [0xc, 0xcc, 0xccc, 0xcccc]
\"80000000\" = [0x80000002, 0, 0, 0]
\"80000001\" = [0, 0, 0x121, 0x2c100800]
\"80000002\" = [0x6464754f, 0, 0, 0]
";

/// Runs the guest's CPUID checks against `expected`, a line of LEAF-SUBLEAF:EAX,EBX,ECX,EDX each.
fn compare(main: &str, profile: &str, expected: &[String]) {
    for part in expected.chunks(8) {
        let words: Vec<String> = part.iter().map(|word| format!("cpuid={word}")).collect();
        let line = format!("checks=cpuid {}", words.join(" "));
        let main = format!("exit_on_reboot = 1\n{main}");
        let ran = Scene::new()
            .run(&vm(&line, &main, &format!("{STDIO}{profile}")))
            .exited(0);
        let compared = ran.out.matches("ok   cpuid: leaf").count();
        assert_eq!(compared, part.len(), "{ran}");
    }
}

fn lines(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Whether this machine's KVM has guests see what it was told. Where it runs their ring 3 on a CPU that can't trap CPUID there, the
/// instruction says what the CPU itself is, to a guest in ring 3 as the self-test's; the lab's guests ask in ring 0.
fn shows_profiles(test: &str) -> bool {
    if !kvm(test) {
        return false;
    }
    let request = ["0-0".to_owned()];
    let shown = seen("cpuid_profile = \"odd\"", PROFILE, &request);
    let is_odd = shown.iter().any(|line| line.contains("is 0000000c"));
    if !is_odd {
        println!("SKIPPED: {test}: CPUID can't be trapped in a guest's ring 3 here");
    }
    is_odd
}

#[test]
fn the_guest_sees_its_profile_and_nothing_else() {
    if !shows_profiles("the_guest_sees_its_profile_and_nothing_else") {
        return;
    }
    let expected = lines(
        "0-0:c,756e6547,6c65746e,49656e69
        1-0:906ea,00010800,*,*
        4-0:121,01c0003f,3f,0
        4-1:0,0,0,0
        4-3:163,03c0003f,ffff,6
        6-0:1,10,100,1000
        6-1:2,20,200,2000
        6-2:1,10,100,1000
        2-0:0,0,0,0
        b-0:0,1,100,0
        b-1:0,1,201,0
        80000001-0:0,0,121,*
        80000002-0:6464754f,0,0,0
        c-9:c,cc,ccc,cccc
        40000000-0:*,4b4d564b,564b4d56,4d
        80000009-9:c,cc,ccc,cccc
        1f-9:c,cc,ccc,cccc",
    );
    compare("cpuid_profile = \"odd\"", PROFILE, &expected);
}

#[test]
fn on_amd_leaves_beyond_the_last_are_zero() {
    if !shows_profiles("on_amd_leaves_beyond_the_last_are_zero") {
        return;
    }
    let profile = PROFILE.replace("\"intel\"", "\"amd\"").replace(
        "0x756e6547, 0x6c65746e, 0x49656e69",
        "0x68747541, 0x444d4163, 0x69746e65",
    );
    let expected = lines(
        "0-0:c,68747541,444d4163,69746e65
        4-0:0,0,0,0
        80000009-9:0,0,0,0
        1f-9:0,0,0,0",
    );
    compare("cpuid_profile = \"odd\"", &profile, &expected);
}

#[test]
fn a_profile_that_kvm_refuses_is_an_error() {
    if !kvm("a_profile_that_kvm_refuses_is_an_error") {
        return;
    }
    let profile = PROFILE.replace("0x80000002, 0, 0, 0", "0x80000008, 0, 0, 0")
        + "\"80000008\" = [0x2020, 0, 0, 0]\n";
    Scene::new()
        .run(&vm(
            "",
            "cpuid_profile = \"odd\"",
            &format!("{STDIO}{profile}"),
        ))
        .exited(1)
        .logged("KVM refused the CPUID table")
        .logged("80000008");
}

#[test]
fn the_guest_sees_its_topology() {
    if !shows_profiles("the_guest_sees_its_topology") {
        return;
    }
    let expected = lines(
        "1-0:906ea,00080800,*,*
        4-0:c004121,01c0003f,3f,0
        4-3:c01c163,03c0003f,ffff,6
        b-0:1,2,100,0
        b-1:3,6,201,0
        b-2:0,0,2,0",
    );
    let main = "cpus = 12\nsockets = 2\ncores = 3\ncpuid_profile = \"odd\"";
    compare(main, PROFILE, &expected);
}

/// Each leaf that the guest finds among `requests`, as it says it.
fn seen(main: &str, profile: &str, requests: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for part in requests.chunks(8) {
        let words: Vec<String> = part
            .iter()
            .map(|request| format!("cpuid={request}:*,*,*,*"))
            .collect();
        let line = format!("checks=cpuid {}", words.join(" "));
        let ran = Scene::new()
            .run(&vm(&line, main, &format!("{STDIO}{profile}")))
            .exited(0);
        let leaves = ran
            .out
            .lines()
            .filter(|line| line.starts_with("ok   cpuid: leaf"));
        found.extend(leaves.map(|line| line.trim().to_owned()));
    }
    found
}

#[test]
fn the_hosts_profile_pasted_is_what_the_guest_sees_without() {
    if !shows_profiles("the_hosts_profile_pasted_is_what_the_guest_sees_without") {
        return;
    }
    let ran = host().arg("cpuid").output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
    let text = String::from_utf8(ran.stdout).unwrap();
    let table: toml::Table = text.parse().unwrap();
    let leaves = table["cpuid"]["host"].as_table().unwrap();
    let mut requests: Vec<String> = leaves
        .keys()
        .filter(|key| *key != "vendor")
        .map(|key| match key.contains('-') {
            true => key.clone(),
            false => format!("{key}-0"),
        })
        .collect();
    // What the profile leaves out, and what is nowhere.
    requests.extend(lines(
        "b-0 b-1 1f-0 4-9 d-3f 8000001e-0 8fffffff-0 40000000-0 40000001-0",
    ));
    for main in ["", "cpus = 4\nthreads = 2\nsockets = 2"] {
        let without = seen(main, "", &requests);
        assert_eq!(without.len(), requests.len());
        let with = seen(
            &format!("{main}\ncpuid_profile = \"host\""),
            &text,
            &requests,
        );
        assert_eq!(with, without);
    }
    // The name does not depend on anything.
    let values = leaves["80000002"].as_array().unwrap();
    let name: Vec<String> = values
        .iter()
        .map(|value| format!("{:x}", value.as_integer().unwrap()))
        .collect();
    compare("", "", &[format!("80000002-0:{}", name.join(","))]);
}

/// ECX of leaf 1, bit 21.
#[test]
fn the_only_cpu_of_a_microvm_has_no_x2apic() {
    if !shows_profiles("the_only_cpu_of_a_microvm_has_no_x2apic") {
        return;
    }
    let features = |main: &str| {
        let text = vm("checks=cpuid cpuid=1-0:*,*,*,*", main, STDIO);
        let running = Scene::new().start(&text);
        running.expect("PASS");
        // A microvm has no power button, and nothing that the self-test guest could power off with.
        running.signal(Signal::TERM);
        let ran = running.wait().exited(0);
        let leaf = ran.out.lines().find(|line| line.contains("leaf 1-0 is"));
        let word = leaf.unwrap().split_whitespace().rev().nth(1).unwrap();
        u32::from_str_radix(word, 16).unwrap()
    };
    let all = features("");
    assert_eq!(features("profile = \"microvm\""), all & !(1 << 21));
    assert_eq!(features("profile = \"microvm\"\ncpus = 2"), all);
}

/// The CPUs that each vCPU's thread may run on, in the order of the vCPUs.
fn bound(running: &Running) -> Vec<String> {
    let tasks = format!("/proc/{}/task", running.id());
    let mut found = Vec::new();
    for task in std::fs::read_dir(tasks).unwrap() {
        // Threads that only help to start come to their end meanwhile.
        let Ok(status) = std::fs::read_to_string(task.unwrap().path().join("status")) else {
            continue;
        };
        let value = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_once(':').unwrap().1.trim().to_owned()
        };
        if value("Name").starts_with("vcpu-") {
            found.push((value("Name"), value("Cpus_allowed_list")));
        }
    }
    found.sort();
    found.into_iter().map(|(_, cpus)| cpus).collect()
}

#[test]
fn threads_run_where_the_file_says() {
    const NAME: &str = "threads_run_where_the_file_says";
    if !kvm(NAME) {
        return;
    }
    let online = vmm_host::hypervisor::affinity::online().unwrap();
    let [.., before, last] = online[..] else {
        println!("SKIPPED: {NAME}: this machine has one CPU");
        return;
    };
    let pair = [before.to_string(), last.to_string()];
    let swapped = [last.to_string(), before.to_string()];
    let bindings = [
        ("\"upper-half\"".to_owned(), &pair),
        (format!("{{ start = {before} }}"), &pair),
        (format!("[{last}, {before}]"), &swapped),
    ];
    for (binding, expected) in bindings {
        let main = format!("cpus = 2\ncpu_binding = {binding}");
        let running = Scene::new().start(&vm("mode=hang", &main, STDIO));
        running.expect("hanging");
        // A thread that another has just started bears its name at first.
        let settled = (0..100).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            bound(&running) == *expected
        });
        assert!(settled, "{binding}: {:?}", bound(&running));
        running.signal(Signal::INT);
        running.wait().exited(0);
    }
    let running = Scene::new().start(&vm("mode=hang", "cpu_binding = \"any\"", STDIO));
    running.expect("hanging");
    assert_ne!(bound(&running), [last.to_string()]);
    running.signal(Signal::INT);
    running.wait().exited(0);
}

#[test]
fn as_many_sockets_as_an_apic_has_ids_for() {
    if !kvm("as_many_sockets_as_an_apic_has_ids_for") {
        return;
    }
    // Ids up to 21: the last CPU is socket 5, core 0, thread 1.
    let main = "cpus = 12\nsockets = 6\nthreads = 2\nexit_on_reboot = 1";
    Scene::new()
        .run(&vm("checks=acpi,cpuid", main, STDIO))
        .exited(0)
        .said("MADT lists 12 processors");
}

//! What devices and backends count, as an operator gets it: at the end with `--stats`, and at any time by SIGUSR1.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod run;

use run::{Scene, disk, host, kvm, vm};
use rustix::process::Signal;

/// The block of text between the marks, the `number`th of them.
fn block(err: &str, number: usize) -> &str {
    let part = err.split("statistics after ").nth(number + 1);
    let part = part.unwrap_or_else(|| panic!("no statistics {number}: {err}"));
    part.split_once("end of statistics\n").expect("its end").0
}

/// A counter of an object; 0 if it is not there.
fn counter(block: &str, label: &str, name: &str) -> u64 {
    let lines = block
        .lines()
        .filter_map(|line| line.strip_prefix(label)?.strip_prefix(": "));
    let mut found = lines.flat_map(|line| line.split(", ")).filter_map(|word| {
        let (key, value) = word.split_once(' ')?;
        (key == name).then(|| value.parse().unwrap())
    });
    found.next().unwrap_or(0)
}

#[test]
fn the_end_says_what_the_guest_has_written() {
    if !kvm("the_end_says_what_the_guest_has_written") {
        return;
    }
    let scene = Scene::new();
    scene.image("disk.img", 4 << 20);
    let file = vm(
        "mode=fill",
        "exit_on_halt = 6",
        &disk("type = \"file\"\npath = \"disk.img\""),
    );
    let ran = scene
        .start_with(host(), &file, &["--stats", "--log-level", "error"])
        .wait()
        .exited(6);
    // 4 MiB in pieces of 64 KiB.
    assert!(ran.out.contains("fill: 64"), "{ran}");
    let stats = block(&ran.err, 0);
    for (label, name, expected) in [
        ("block_dev.disk", "writes", 64),
        ("block_dev.disk", "write_bytes", 4 << 20),
        ("block_dev.disk", "errors", 0),
        ("dev.block0", "writes", 64),
        ("dev.block0", "write_bytes", 4 << 20),
    ] {
        assert_eq!(
            counter(stats, label, name),
            expected,
            "{label}: {name}: {stats}"
        );
    }
    let (reads, flushes) = ("reads", "flushes");
    for name in [reads, flushes] {
        let both = ["block_dev.disk", "dev.block0"].map(|label| counter(stats, label, name));
        assert_eq!(both[0], both[1], "{name}: {stats}");
    }
    let requests =
        64 + counter(stats, "block_dev.disk", reads) + counter(stats, "block_dev.disk", flushes);
    let notified = counter(stats, "dev.block0", "notifications");
    assert!((1..=requests).contains(&notified), "{stats}");
    let interrupts = counter(stats, "dev.block0", "interrupts");
    assert!((1..=requests).contains(&interrupts), "{stats}");
    assert!(
        counter(stats, "dev.block0", "register_writes") > 0,
        "{stats}"
    );
    // Every character that came out was written to the port.
    let port = counter(stats, "dev.com1", "register_writes");
    assert!(port as usize >= ran.out.len(), "{port}: {stats}");
    let latency = stats
        .lines()
        .find(|line| line.starts_with("block_dev.disk: latency of "));
    let latency = latency.unwrap_or_else(|| panic!("no latency: {stats}"));
    let (all, parts) = latency["block_dev.disk: latency of ".len()..]
        .split_once(": ")
        .unwrap();
    let all: u64 = all.parse().unwrap();
    let sum: u64 = parts
        .split(", ")
        .map(|part| part.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    assert_eq!(all, sum, "{latency}");
    assert!((1..=requests).contains(&all), "{latency}");
}

#[test]
fn errors_are_counted_by_the_backend_that_reports_them() {
    if !kvm("errors_are_counted_by_the_backend_that_reports_them") {
        return;
    }
    let scene = Scene::new();
    scene.image("disk.img", 20 << 20);
    let command = run::host_by("ulimit -f 34816 && exec \"$@\"");
    let file = vm(
        "mode=fill",
        "memory = 16\nexit_on_halt = 6",
        &disk("type = \"file\"\npath = \"disk.img\""),
    );
    let ran = scene
        .start_with(command, &file, &["--stats"])
        .wait()
        .exited(6);
    let stats = block(&ran.err, 0);
    assert_eq!(
        counter(stats, "block_dev.disk", "writes"),
        20 * 16,
        "{stats}"
    );
    assert_eq!(
        counter(stats, "block_dev.disk", "errors"),
        3 * 16,
        "{stats}"
    );
    assert_eq!(counter(stats, "dev.block0", "writes"), 17 * 16, "{stats}");
    assert_eq!(counter(stats, "dev.block0", "errors"), 3 * 16, "{stats}");
}

#[test]
fn a_signal_prints_them_and_the_guest_goes_on() {
    if !kvm("a_signal_prints_them_and_the_guest_goes_on") {
        return;
    }
    let scene = Scene::new();
    let running = scene.start(&vm(
        "mode=hang",
        "",
        &disk("type = \"mem-async\"\nsize = \"1M\""),
    ));
    running.expect("hanging");
    running.signal(Signal::USR1);
    running.expect_log("end of statistics");
    running.signal(Signal::TERM);
    let ran = running.wait().exited(0);
    let written = counter(block(&ran.err, 0), "dev.com1", "register_writes");
    assert!(written >= "hanging".len() as u64, "{ran}");
    // Without the option the end says nothing.
    assert_eq!(ran.err.matches("statistics after").count(), 1, "{ran}");
}

/// While the start is held, there is something to ask for as well, and the signal ends nothing.
#[test]
fn a_signal_before_the_start_ends_nothing() {
    if !kvm("a_signal_before_the_start_ends_nothing") {
        return;
    }
    let scene = Scene::new();
    let running = scene.start(&vm("mode=poweroff", "", ""));
    running.expect_log("the guest starts after");
    running.signal(Signal::USR1);
    running.expect_log("end of statistics");
    let _client = scene.connect("ttya");
    running.wait().exited(0);
}

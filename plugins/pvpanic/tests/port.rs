//! The port as a guest's driver uses it, and what the host hears.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends where its helpers fail

use vmm_plugin_api::abi::host::{REQUEST_FAILURE, REQUEST_RESET};
use vmm_plugin_api::testing::{FakeDevice, FakeHost};
use vmm_plugin_pvpanic::VMM_PLUGIN;

const PANICKED: u64 = 1;
const CRASH_LOADED: u64 = 2;
const SAID: &str = "2 the guest has panicked";

fn device(enable: bool, on_panic: &str) -> (FakeHost, FakeDevice) {
    let host = FakeHost::new(4096);
    let options = [("enable_isa", enable.into()), ("on_panic", on_panic.into())];
    let device = host.device(&VMM_PLUGIN, "qemu-pvpanic", &options).unwrap();
    device.start().unwrap();
    (host, device)
}

#[test]
fn is_where_guests_look_for_it() {
    let (_host, device) = device(true, "log");
    let regions = device.regions();
    assert_eq!(regions.len(), 1);
    assert_eq!((regions[0].address, regions[0].size), (0x505, 1));
    assert_eq!(device.read(0, 0, 1), PANICKED | CRASH_LOADED);
}

#[test]
fn is_not_there_unless_enabled() {
    let (_host, device) = device(false, "stop");
    assert!(device.regions().is_empty());
}

#[test]
fn a_panic_is_logged_once_until_a_reset_and_counted() {
    let (host, device) = device(true, "log");
    for _ in 0..1000 {
        device.write(0, 0, 1, PANICKED);
    }
    assert_eq!(host.logs(), [SAID]);
    assert_eq!(device.counter("panics"), 1000);
    device.reset().unwrap();
    device.write(0, 0, 1, PANICKED);
    assert_eq!(host.logs(), [SAID, SAID]);
    assert_eq!(host.requests(), []);
}

#[test]
fn panics_over_many_resets_do_not_fill_the_log() {
    let (host, device) = device(true, "log");
    for _ in 0..1000 {
        device.write(0, 0, 1, PANICKED);
        device.reset().unwrap();
    }
    let logs = host.logs();
    assert_eq!(logs.len(), 100);
    assert_eq!(logs[98], SAID);
    assert_eq!(
        logs[99],
        format!("{SAID}; from now on that is only counted")
    );
    assert_eq!(device.counter("panics"), 1000);
}

#[test]
fn a_panic_asks_for_what_the_file_says() {
    for (on_panic, request) in [("stop", REQUEST_FAILURE), ("reset", REQUEST_RESET)] {
        let (host, device) = device(true, on_panic);
        device.write(0, 0, 1, PANICKED);
        device.write(0, 0, 1, PANICKED);
        let requests = host.requests();
        assert_eq!(requests.len(), 1, "{requests:?}");
        assert_eq!(requests[0].0, request);
        assert!(requests[0].1.contains("panic"));
    }
}

#[test]
fn a_crash_kernel_may_run() {
    let (host, device) = device(true, "stop");
    device.write(0, 0, 1, CRASH_LOADED);
    assert_eq!(
        host.logs(),
        ["2 the guest has panicked and goes on into its crash kernel"]
    );
    assert_eq!(host.requests(), []);
    assert_eq!(
        (device.counter("panics"), device.counter("crash_kernels")),
        (0, 1)
    );
}

#[test]
fn other_bits_mean_nothing() {
    let (host, device) = device(true, "stop");
    for value in [0, 4, 0xfc, 0xff00] {
        device.write(0, 0, 1, value);
    }
    assert_eq!(host.requests(), []);
    assert!(host.logs().is_empty());
}

#[test]
fn an_unknown_policy_is_refused() {
    let host = FakeHost::new(4096);
    let options = [("enable_isa", true.into()), ("on_panic", "cry".into())];
    let error = host
        .device(&VMM_PLUGIN, "qemu-pvpanic", &options)
        .err()
        .unwrap();
    let error = format!("{error:#}");
    assert!(
        error.contains("`cry`; it can be log, stop or reset"),
        "{error}"
    );
}

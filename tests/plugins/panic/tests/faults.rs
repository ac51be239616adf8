//! A panic in any method is a reported fault, and the object answers neutrally from then on.

use std::time::Duration;

use vmm_plugin_api::testing::{FakeHost, Value};
use vmm_plugin_api::{Batch, BlockDone};
use vmm_test_plugin_panic::VMM_PLUGIN;

fn options(place: &str) -> [(&'static str, Value); 2] {
    [("port", 0x520u64.into()), ("where", place.into())]
}

/// The one fault of `host`, which names the method and the place in the source.
fn assert_fault(host: &FakeHost, place: &str, refusal: Option<String>) {
    // An object that could not be made has its fault in create's error as well.
    let faults = refusal.map_or_else(|| host.faults(), |text| vec![text]);
    assert_eq!(faults.len(), 1, "{place}: {faults:?}");
    assert!(
        faults[0].contains(&format!("the test wants a panic in {place}"))
            && faults[0].contains("lib.rs"),
        "{faults:?}"
    );
    println!("{}", faults[0]);
}

#[test]
fn devices() {
    for place in [
        "nowhere", "create", "describe", "start", "read", "write", "thread", "pause", "stop",
        "drop",
    ] {
        let host = FakeHost::new(1 << 20);
        let mut refusal = None;
        let device = host.device(&VMM_PLUGIN, "test-panic", &options(place));
        match device {
            Err(error) => refusal = Some(error.to_string()),
            Ok(device) => {
                let _ = device.start();
                let first = device.read(0, 0, 1);
                device.write(0, 0, 1, 1);
                if place == "thread" {
                    assert!(host.poll_until(Duration::from_secs(10), || !host.faults().is_empty()));
                    assert_eq!(device.read(0, 0, 1), 0xff);
                }
                assert_eq!(
                    first,
                    if ["start", "read"].contains(&place) {
                        0xff
                    } else {
                        0x5a
                    },
                    "{place}"
                );
                let _ = device.pause();
                device.stop();
            }
        }
        assert_eq!(
            refusal.is_some(),
            ["create", "describe"].contains(&place),
            "{place}"
        );
        match place {
            "nowhere" => assert!(host.faults().is_empty(), "{:?}", host.faults()),
            _ => assert_fault(&host, place, refusal),
        }
    }
}

#[test]
fn disks() {
    for place in [
        "nowhere",
        "create",
        "info",
        "open_queue",
        "submit",
        "reap",
        "close_queue",
        "drop",
    ] {
        let host = FakeHost::new(1 << 20);
        let mut refusal = None;
        match host.block(&VMM_PLUGIN, "test-panic", &options(place)[1..]) {
            Err(error) => refusal = Some(error.to_string()),
            Ok(backend) => {
                let block = backend.as_block().expect("block");
                assert_eq!(block.info().is_err(), place == "info");
                if let Ok(mut queue) = block.open_queue(4) {
                    let mut batch = Batch::default();
                    batch.transfer(
                        1,
                        vmm_plugin_api::BlockOp::Read,
                        0,
                        &[host.memory().writable(0, 512).expect("RAM")],
                    );
                    let mut done = [BlockDone::default()];
                    let count = queue.submit(&mut batch).min(queue.reap(&mut done));
                    assert_eq!(
                        count,
                        usize::from(!["submit", "reap"].contains(&place)),
                        "{place}"
                    );
                } else {
                    assert!(["open_queue", "info"].contains(&place), "{place}");
                }
            }
        }
        assert_eq!(refusal.is_some(), place == "create", "{place}");
        match place {
            "nowhere" => assert!(host.faults().is_empty(), "{:?}", host.faults()),
            _ => assert_fault(&host, place, refusal),
        }
    }
}

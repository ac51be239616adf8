//! A namespace that grows while its driver uses it (sections 5.2, 5.14.1.4 and 5.21.1.11).

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs::OpenOptions;
use std::path::Path;

use support::*;
use vmm_plugin_api::testing::{Backend, FakeHost, Value, load};
use vmm_plugin_nvme::VMM_PLUGIN;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2048;
const GET_LOG: u8 = 0x02;
const SET_FEATURES: u8 = 0x09;
const AER: u8 = 0x0c;
const ASYNC_EVENTS: u32 = 0x0b;
/// Namespace attribute notices, in the feature and in the controller's capabilities.
const NAMESPACES: u32 = 1 << 8;
/// What such an event says: a notice, namespace changed, log page 4.
const NAMESPACE_CHANGED: u32 = 2 | 4 << 16;

fn resize(path: &Path, bytes: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(bytes).unwrap();
}

/// A controller on an image of a CD of 1 MiB.
fn disk(path: &Path) -> (Backend, Setup) {
    std::fs::write(path, vec![0x11; MIB as usize]).unwrap();
    let host = FakeHost::new(64 << 20);
    let options = [
        ("path", path.to_str().unwrap().into()),
        ("read_only", true.into()),
        ("block_size", BLOCK.into()),
        ("workers", 2u64.into()),
        ("skip_flush", false.into()),
        ("direct", false.into()),
        ("discard", true.into()),
    ];
    let root = load("vmm-plugin-file").unwrap();
    let backend = host.block(root, "file", &options).unwrap();
    let options = [("block_dev", Value::from(&backend))];
    let device = host.device(&VMM_PLUGIN, "pci-nvme", &options).unwrap();
    device.start().unwrap();
    (backend, Setup::on(host, device))
}

fn look(backend: &Backend, setup: &Setup) {
    assert!(backend.look_again().unwrap().is_some());
    assert!(setup.device.resized(), "it follows");
}

/// The first namespace that the log of changed ones lists; reading takes note of it, unless `retain`.
fn changed(driver: &mut Driver<'_>, retain: bool) -> u32 {
    let log = Cmd::new(GET_LOG).dw(10, 4 | u32::from(retain) << 15 | 1023 << 16);
    let page = driver.page_of(log).unwrap();
    assert!(page[4..].iter().all(|b| *b == 0));
    u32::from_le_bytes(page[..4].try_into().unwrap())
}

fn blocks(driver: &mut Driver<'_>) -> u64 {
    let page = driver.identify(0, 1).unwrap();
    assert_eq!((page[8..16].to_vec(), page[130]), (page[..8].to_vec(), 11));
    u64::from_le_bytes(page[..8].try_into().unwrap())
}

#[test]
fn identify_event_and_log_page() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("disk");
    let (backend, setup) = disk(&path);
    let (mut driver, mut pair) = setup.disk();
    let page = driver.identify(1, 0).unwrap();
    let offered = u32::from_le_bytes(page[92..96].try_into().unwrap());
    assert_eq!(offered & NAMESPACES, NAMESPACES);
    assert_eq!(blocks(&mut driver), MIB / BLOCK);
    let first_new = Cmd::rw(READ, MIB / BLOCK, 1);
    let at = driver.page();
    let status = driver.run(&mut pair, first_new.prp(at, 0)).status;
    assert_eq!(status, LBA_RANGE);
    let set = Cmd::new(SET_FEATURES)
        .dw(10, ASYNC_EVENTS)
        .dw(11, NAMESPACES);
    driver.must(set);
    let mut admin = driver.admin.clone();
    let event = driver.add(&mut admin, Cmd::new(AER));
    driver.ring(&mut admin);
    // Nothing has changed: nothing is said.
    look(&backend, &setup);
    resize(&path, 2 * MIB + 512);
    look(&backend, &setup);
    let cqe = driver.wait(&mut admin);
    assert_eq!(
        (cqe.cid, cqe.status, cqe.result),
        (event, OK, NAMESPACE_CHANGED)
    );
    driver.admin = admin;
    assert_eq!(blocks(&mut driver), 2 * MIB / BLOCK, "whole blocks");
    let status = driver.run(&mut pair, first_new.prp(at, 0)).status;
    assert_eq!(status, OK);
    assert!(driver.bytes(at, 2048).iter().all(|b| *b == 0));
    let status = driver.run(&mut pair, Cmd::rw(READ, 2 * MIB / BLOCK, 1).prp(at, 0));
    assert_eq!(status.status, LBA_RANGE);
    assert_eq!(changed(&mut driver, true), 1);
    assert_eq!(changed(&mut driver, false), 1, "the first was no note");
    assert_eq!(changed(&mut driver, false), 0);
    // And again, once the guest has taken note.
    let mut admin = driver.admin.clone();
    driver.add(&mut admin, Cmd::new(AER));
    driver.ring(&mut admin);
    resize(&path, 3 * MIB);
    look(&backend, &setup);
    assert_eq!(driver.wait(&mut admin).result, NAMESPACE_CHANGED);
    assert_eq!(setup.host.faults(), Vec::<String>::new());
}

#[test]
fn a_guest_that_wants_no_notices_finds_the_log_page() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("disk");
    let (backend, setup) = disk(&path);
    let mut driver = setup.driver();
    let mut admin = driver.admin.clone();
    driver.add(&mut admin, Cmd::new(AER));
    driver.ring(&mut admin);
    resize(&path, 2 * MIB);
    look(&backend, &setup);
    driver.admin = admin;
    // The next that completes is this command, not the event.
    assert_eq!(changed(&mut driver, true), 1);
    assert_eq!(blocks(&mut driver), 2 * MIB / BLOCK);
    // A reset begins anew: whoever enables the controller identifies.
    driver.begin_disable();
    driver.wait_ready(false);
    driver.enable();
    assert_eq!(changed(&mut driver, false), 0);
    // The same for a change that comes while the controller is disabled.
    driver.begin_disable();
    driver.wait_ready(false);
    resize(&path, 3 * MIB);
    look(&backend, &setup);
    driver.enable();
    assert_eq!(changed(&mut driver, false), 0);
    assert_eq!(blocks(&mut driver), 3 * MIB / BLOCK);
}

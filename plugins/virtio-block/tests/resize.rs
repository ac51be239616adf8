//! A disk that grows while its driver uses it (sections 2.5, 4.1.4.5 and 5.2.6), on the real backends.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs::OpenOptions;
use std::path::Path;

use support::*;
use vmm_plugin_api::testing::{Backend, FakeHost, Value, load};
use vmm_plugin_virtio_block::VMM_PLUGIN;

const MIB: u64 = 1 << 20;
const SECTORS: u64 = MIB / 512;

fn grow(path: &Path, bytes: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(bytes).unwrap();
}

fn file(host: &FakeHost, path: &Path) -> Backend {
    let options = [
        ("path", path.to_str().unwrap().into()),
        ("read_only", false.into()),
        ("block_size", 512u64.into()),
        ("workers", 2u64.into()),
        ("skip_flush", false.into()),
        ("direct", false.into()),
        ("discard", true.into()),
    ];
    let root = load("vmm-plugin-file").unwrap();
    host.block(root, "file", &options).unwrap()
}

fn layer(host: &FakeHost, name: &str, options: &[(&str, Value)]) -> Backend {
    let root = load(format!("vmm-plugin-{name}")).unwrap();
    host.block(root, name, options).unwrap()
}

/// A disk of 1 MiB in a file, under a throttle and a fault layer if `layers`. What the host asks, in its order; the device.
fn disk(path: &Path, layers: bool) -> (Vec<Backend>, Setup) {
    std::fs::write(path, vec![0; MIB as usize]).unwrap();
    let host = FakeHost::new(32 << 20);
    let mut backends = vec![file(&host, path)];
    if layers {
        for (name, key, value) in [
            ("throttle", "ops_per_second", Value::from(1_000_000u64)),
            ("fault", "rules", "write 100G.. error EIO".into()),
        ] {
            let options = [
                ("backing", Value::from(backends.last().unwrap())),
                ("read_only", false.into()),
                (key, value),
            ];
            let above = layer(&host, name, &options);
            backends.push(above);
        }
    }
    let options = [
        ("block_dev", Value::from(backends.last().unwrap())),
        ("modern_only", false.into()),
    ];
    let device = host
        .device(&VMM_PLUGIN, "pci-virtio-block", &options)
        .unwrap();
    device.start().unwrap();
    (backends, Setup::on(host, device))
}

/// Does what the host does on the operator's word.
fn look(backends: &[Backend], setup: &Setup) {
    for backend in backends {
        assert!(backend.look_again().unwrap().is_some(), "it follows");
    }
    assert!(setup.device.resized(), "it follows");
}

#[test]
fn capacity_generation_and_interrupt() {
    for layers in [false, true] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("disk");
        let (backends, setup) = disk(&path, layers);
        let mut disk = setup.disk();
        assert_eq!(disk.driver.config_vector(1), 1);
        assert_eq!(disk.driver.config(0, 8), SECTORS);
        let data = pattern(3, 4096);
        let (status, _) = disk.request(T_OUT, 2 * SECTORS, &data, 0);
        assert_eq!(status, S_IOERR, "behind the end");
        let generation = disk.driver.config_generation();
        // Nothing has changed: nothing is said.
        look(&backends, &setup);
        assert_eq!(disk.driver.config_generation(), generation);
        assert_eq!(setup.device.interrupts(1), 0);
        grow(&path, 3 * MIB);
        look(&backends, &setup);
        assert_eq!(setup.device.interrupts(1), 1, "a configuration change");
        assert_ne!(disk.driver.config_generation(), generation);
        assert_eq!(disk.driver.config(0, 8), 3 * SECTORS);
        assert_eq!(disk.driver.config(4, 4), 0, "the rest is as it was");
        disk.write(2 * SECTORS, &data);
        assert_eq!(disk.read(2 * SECTORS, 4096), data);
        let (status, _) = disk.request(T_IN, 3 * SECTORS, &[], 512);
        assert_eq!(status, S_IOERR, "the new end is one");
        assert_eq!(std::fs::read(&path).unwrap()[2 << 20..][..4096], data);
        assert_eq!(setup.host.faults(), Vec::<String>::new());
    }
}

#[test]
fn a_driver_with_a_pin_finds_the_reason_in_the_isr() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("disk");
    let (backends, setup) = disk(&path, false);
    setup.device.enable_msix(false);
    let disk = setup.legacy_disk(u64::MAX);
    assert_eq!(disk.driver.config(0, 8), SECTORS);
    grow(&path, 2 * MIB);
    look(&backends, &setup);
    assert_eq!(disk.driver.isr(), 2, "the configuration has changed");
    assert_eq!(disk.driver.config(0, 8), 2 * SECTORS);
}

#[test]
fn without_a_driver_nothing_interrupts() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("disk");
    let (backends, setup) = disk(&path, false);
    setup.device.enable_msix(false);
    grow(&path, 2 * MIB);
    look(&backends, &setup);
    let disk = setup.legacy_disk(u64::MAX);
    assert_eq!(disk.driver.isr(), 0, "section 2.2: not before DRIVER_OK");
    assert_eq!(disk.driver.config(0, 8), 2 * SECTORS);
}

#[test]
fn a_backend_that_keeps_its_size_is_taken_as_it_is() {
    let setup = Setup::new(Shape::default());
    let disk = setup.disk();
    assert!(setup.device.resized());
    assert_eq!(disk.driver.config(0, 8), (4 << 20) / 512);
    assert_eq!(disk.driver.config_generation(), 0);
}

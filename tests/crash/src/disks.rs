//! The disks that are tried.

use std::path::Path;

use vmm_plugin_api::Result;
use vmm_plugin_api::testing::{Backend, FakeHost, Value, load};

/// Bytes of each.
pub const BYTES: u64 = 4 << 20;

/// Opens a disk whose files are in a folder, or makes them.
pub type Open = fn(&FakeHost, &Path) -> Result<Backend>;

/// Name, and how it is opened.
pub const DISKS: &[(&str, Open)] = &[
    ("file", |host, dir| file(host, dir, "disk", false, false)),
    ("file-direct", |host, dir| {
        file(host, dir, "disk", false, true)
    }),
    ("overlay", |host, dir| {
        overlay(host, dir, file(host, dir, "base", true, false)?)
    }),
    ("overlay-throttle-fault", |host, dir| {
        let file = file(host, dir, "base", true, false)?;
        let rules = "read delay 1ms every 3";
        let options = [("rules", rules.into()), ("read_only", true.into())];
        let fault = on(host, "fault", &file, &options)?;
        let options = [
            ("ops_per_second", 20_000u64.into()),
            ("read_only", true.into()),
        ];
        overlay(host, dir, on(host, "throttle", &fault, &options)?)
    }),
];

fn text(path: &Path) -> Value {
    path.to_string_lossy().as_ref().into()
}

fn file(host: &FakeHost, dir: &Path, name: &str, read_only: bool, direct: bool) -> Result<Backend> {
    let path = dir.join(name);
    if !path.exists() {
        std::fs::File::create(&path)?.set_len(BYTES)?;
    }
    let options: [(&str, Value); 7] = [
        ("path", text(&path)),
        ("read_only", read_only.into()),
        ("block_size", 512u64.into()),
        ("workers", 4u64.into()),
        ("skip_flush", false.into()),
        ("direct", direct.into()),
        ("discard", true.into()),
    ];
    host.block(load("vmm-plugin-file")?, "file", &options)
}

fn overlay(host: &FakeHost, dir: &Path, base: Backend) -> Result<Backend> {
    let options: [(&str, Value); 4] = [
        ("path", text(&dir.join("overlay"))),
        ("keep", true.into()),
        ("read_only", false.into()),
        ("workers", 4u64.into()),
    ];
    on(host, "overlay", &base, &options)
}

/// A layer on another disk.
fn on(host: &FakeHost, layer: &str, below: &Backend, options: &[(&str, Value)]) -> Result<Backend> {
    let mut all = vec![("backing", Value::from(below))];
    all.extend_from_slice(options);
    host.block(load(format!("vmm-plugin-{layer}"))?, layer, &all)
}

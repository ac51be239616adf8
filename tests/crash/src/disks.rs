//! The disks that are tried.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use vmm_plugin_api::Result;
use vmm_plugin_api::testing::{Backend, FakeHost, Value, load};

/// Bytes of each.
pub const BYTES: u64 = 4 << 20;

/// Opens a disk whose files are in a folder, or makes them.
pub type Open = fn(&FakeHost, &Path) -> Result<Backend>;

/// What another program says to the files of a disk that nobody has open. It may leave the disk's contents as a raw image in `raw`.
pub type Judge = fn(&Path) -> Result<()>;

/// Name, how it is opened, and who else judges it.
pub const DISKS: &[(&str, Open, Judge)] = &[
    (
        "file",
        |host, dir| file(host, dir, "disk", false, false),
        nobody,
    ),
    (
        "file-direct",
        |host, dir| file(host, dir, "disk", false, true),
        nobody,
    ),
    (
        "overlay",
        |host, dir| overlay(host, dir, file(host, dir, "base", true, false)?),
        nobody,
    ),
    (
        "overlay-throttle-fault",
        |host, dir| {
            let file = file(host, dir, "base", true, false)?;
            let rules = "read delay 1ms every 3";
            let options = [("rules", rules.into()), ("read_only", true.into())];
            let fault = on(host, "fault", &file, &options)?;
            let options = [
                ("ops_per_second", 20_000u64.into()),
                ("read_only", true.into()),
            ];
            overlay(host, dir, on(host, "throttle", &fault, &options)?)
        },
        nobody,
    ),
    (
        "qcow2",
        |host, dir| qcow2(host, dir, "cluster_size=65536"),
        qemu_img,
    ),
    // Many clusters, many tables, and counts that share their bytes.
    (
        "qcow2-512",
        |host, dir| qcow2(host, dir, "cluster_size=512,refcount_bits=1"),
        qemu_img,
    ),
];

/// The file under a [`Judge`]'s folder that it may leave.
pub const RAW: &str = "raw";

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

fn qcow2(host: &FakeHost, dir: &Path, options: &str) -> Result<Backend> {
    let path = dir.join(QCOW2);
    if !path.exists() {
        let size = BYTES.to_string();
        qemu(dir, &["create", "-f", "qcow2", "-o", options, QCOW2, &size])?;
    }
    let options: [(&str, Value); 6] = [
        ("path", text(&path)),
        ("read_only", false.into()),
        ("block_size", 512u64.into()),
        ("workers", 4u64.into()),
        ("skip_flush", false.into()),
        ("discard", true.into()),
    ];
    host.block(load("vmm-plugin-qcow2")?, "qcow2", &options)
}

const QCOW2: &str = "disk.qcow2";

fn nobody(_: &Path) -> Result<()> {
    Ok(())
}

/// The image is sound for qemu-img, which then reads all of it. Clusters that are counted and not used are no damage (3).
fn qemu_img(dir: &Path) -> Result<()> {
    qemu(dir, &["check", "-q", "-f", "qcow2", QCOW2])?;
    qemu(dir, &["convert", "-f", "qcow2", "-O", "raw", QCOW2, RAW])
}

fn qemu(dir: &Path, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("qemu-img");
    let ran = command.args(arguments).current_dir(dir).output();
    let ran = ran.context("qemu-img")?;
    ensure!(
        matches!(ran.status.code(), Some(0 | 3)),
        "qemu-img {arguments:?} ({}): {}{}",
        ran.status,
        String::from_utf8_lossy(&ran.stdout),
        String::from_utf8_lossy(&ran.stderr)
    );
    Ok(())
}

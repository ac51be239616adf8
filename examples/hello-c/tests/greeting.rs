//! Builds the plugin as its Makefile says, loads it and plays its guest.

use std::path::{Path, PathBuf};
use std::process::Command;

use vmm_plugin_api::Result;
use vmm_plugin_api::abi::{MAGIC, Root};
use vmm_plugin_api::testing::{FakeDevice, FakeHost, load};

/// The plugin's file, in `dir`.
fn build(dir: &Path) -> PathBuf {
    let out = dir.join("libhello_c.so");
    let make = Command::new("make")
        .args(["--silent", "CFLAGS=-Werror -pedantic -O1"])
        .arg(format!("OUT={}", out.display()))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("this test needs make and cc");
    assert!(
        make.status.success(),
        "{}",
        String::from_utf8_lossy(&make.stderr)
    );
    out
}

fn root() -> Result<&'static Root> {
    let dir = tempfile::tempdir()?;
    load(build(dir.path()))
}

fn read(device: &FakeDevice, count: usize) -> String {
    (0..count)
        .map(|_| device.read(0, 0, 1) as u8 as char)
        .collect()
}

#[test]
fn a_plugin_in_c_works_like_one_in_rust() -> Result<()> {
    let (root, host) = (root()?, FakeHost::new(1 << 20));
    assert_eq!(root.magic, MAGIC);
    let device = host.device(
        root,
        "hello-c",
        &[("port", 0x510u64.into()), ("text", "Hi!".into())],
    )?;
    device.start()?;
    assert_eq!(
        (device.regions()[0].address, device.regions()[0].size),
        (0x510, 1)
    );
    assert_eq!(read(&device, 5), "Hi!\0\0");
    device.write(0, 0, 1, 1);
    assert_eq!(read(&device, 2), "Hi");
    device.pause()?;
    device.reset()?;
    assert!(device.save().is_err(), "it offers no saved state");
    device.resume()?;
    assert_eq!(read(&device, 3), "Hi!");

    let error = host
        .device(root, "hello-c", &[])
        .err()
        .expect("refused")
        .to_string();
    assert!(error.contains("option `port` is missing"), "{error}");
    let error = host
        .block(root, "hello-c", &[])
        .err()
        .expect("refused")
        .to_string();
    assert!(error.contains("only the driver hello-c"), "{error}");
    Ok(())
}

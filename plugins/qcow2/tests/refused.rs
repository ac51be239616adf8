//! Images and options that are refused, and what the operator is told.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::os::unix::fs::FileExt;

use support::Setup;
use vmm_plugin_api::testing::Value;

/// Overwrites bytes of an image.
fn patch(setup: &Setup, name: &str, at: u64, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(setup.path(name))
        .unwrap();
    file.write_all_at(bytes, at).unwrap();
}

#[track_caller]
fn refused(setup: &Setup, name: &str, options: &[(&str, Value)], wanted: &[&str]) {
    let Err(error) = setup.try_open(name, options) else {
        panic!("{name} is not refused");
    };
    for part in wanted.iter().chain(&[name]) {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let Some(setup) = Setup::new() else { return };
    setup.create("disk.qcow2", &[], "1049088");
    refused(
        &setup,
        "none.qcow2",
        &[],
        &["no disk image at", "qemu-img create -f qcow2"],
    );
    refused(
        &setup,
        "disk.qcow2",
        &[("block_size", 4096u64.into())],
        &[
            "no multiple of `block_size` (4096)",
            "qemu-img resize",
            "1052672",
        ],
    );
    refused(
        &setup,
        "disk.qcow2",
        &[("backing_format", "raw".into())],
        &["has no backing file", "remove `backing_format`"],
    );
    let error = setup
        .try_open("disk.qcow2", &[("block_size", 1000u64.into())])
        .err()
        .unwrap();
    assert!(error.contains("`block_size` is 1000"), "{error}");
    std::fs::write(setup.path("raw"), vec![0; 1 << 20]).unwrap();
    refused(&setup, "raw", &[], &["no qcow2 image", "type = \"file\""]);
    std::fs::write(setup.path("empty"), []).unwrap();
    refused(&setup, "empty", &[], &["no qcow2 image"]);
    std::fs::create_dir(setup.path("folder")).unwrap();
    refused(&setup, "folder", &[], &["is a directory"]);
}

#[test]
fn formats_of_backing_files_are_never_guessed() {
    let Some(setup) = Setup::new() else { return };
    setup.create("base.qcow2", &[], "1M");
    setup.qemu_io("base.qcow2", &["write -P 0x21 0 64k"]);
    for compat in ["compat=0.10", "compat=1.1"] {
        setup.create(
            "disk.qcow2",
            &["-b", "base.qcow2", "-F", "qcow2", "-o", compat],
            "1M",
        );
        assert_eq!(setup.open("disk.qcow2", &[]).read(0, 512), [0x21; 512]);
        // The extension is the first: let it be an unknown one.
        let at = if compat == "compat=1.1" { 112 } else { 72 };
        patch(&setup, "disk.qcow2", at, &[0x11, 0x22, 0x33, 0x44]);
        refused(
            &setup,
            "disk.qcow2",
            &[],
            &["`base.qcow2`, without its format", "qemu-img rebase -u -F"],
        );
        let given = |format: &'static str| [("backing_format", Value::from(format))];
        assert_eq!(
            setup.open("disk.qcow2", &given("qcow2")).read(0, 512),
            [0x21; 512]
        );
        assert_eq!(
            setup.open("disk.qcow2", &given("raw")).read(0, 512)[..4],
            *b"QFI\xfb"
        );
    }
    setup.create("disk.qcow2", &["-b", "base.qcow2", "-F", "qcow2"], "1M");
    refused(
        &setup,
        "disk.qcow2",
        &[("backing_format", "raw".into())],
        &["Qcow2", "remove that"],
    );
    setup.qemu_img(&[
        "rebase",
        "-u",
        "-F",
        "vmdk",
        "-b",
        "base.qcow2",
        "disk.qcow2",
    ]);
    refused(&setup, "disk.qcow2", &[], &["the format `vmdk`"]);
    setup.qemu_img(&[
        "rebase",
        "-u",
        "-F",
        "raw",
        "-b",
        "nbd://host/x",
        "disk.qcow2",
    ]);
    refused(&setup, "disk.qcow2", &[], &["reached by `nbd`"]);
    setup.qemu_img(&["rebase", "-u", "-F", "raw", "-b", "gone.raw", "disk.qcow2"]);
    refused(
        &setup,
        "disk.qcow2",
        &[],
        &[
            "backing file",
            "gone.raw",
            "is not there",
            "qemu-img rebase -u",
        ],
    );
}

#[test]
fn chains_end() {
    let Some(setup) = Setup::new() else { return };
    setup.create("a.qcow2", &[], "1M");
    setup.create("b.qcow2", &["-b", "a.qcow2", "-F", "qcow2"], "1M");
    setup.qemu_img(&["rebase", "-u", "-F", "qcow2", "-b", "b.qcow2", "a.qcow2"]);
    // The image itself is locked for writing, so reading it again would be refused anyhow.
    refused(
        &setup,
        "a.qcow2",
        &[("read_only", true.into())],
        &["its own backing file", "qemu-img rebase -u"],
    );
    std::os::unix::fs::symlink("a.qcow2", setup.path("again.qcow2")).unwrap();
    setup.qemu_img(&[
        "rebase",
        "-u",
        "-F",
        "qcow2",
        "-b",
        "again.qcow2",
        "a.qcow2",
    ]);
    refused(
        &setup,
        "a.qcow2",
        &[("read_only", true.into())],
        &["its own backing file"],
    );
    setup.create("0.qcow2", &[], "1M");
    for i in 0..64 {
        setup.create(
            &format!("{}.qcow2", i + 1),
            &["-u", "-b", &format!("{i}.qcow2"), "-F", "qcow2"],
            "1M",
        );
    }
    setup.open("63.qcow2", &[]).read(0, 512);
    refused(&setup, "64.qcow2", &[], &["more than 64 files"]);
}

#[test]
fn one_writes_or_many_read() {
    let Some(setup) = Setup::new() else { return };
    setup.create("base.qcow2", &[], "1M");
    setup.create("one.qcow2", &["-b", "base.qcow2", "-F", "qcow2"], "1M");
    setup.create("two.qcow2", &["-b", "base.qcow2", "-F", "qcow2"], "1M");
    let one = setup.open("one.qcow2", &[]);
    let two = setup.open("two.qcow2", &[]);
    refused(&setup, "one.qcow2", &[], &["in use by another VM"]);
    refused(
        &setup,
        "one.qcow2",
        &[("read_only", true.into())],
        &["being written to"],
    );
    refused(&setup, "base.qcow2", &[], &["in use by another VM"]);
    let (code, said) = setup.run("qemu-img", &["check", "one.qcow2"]);
    assert!(code == 1 && said.contains("lock"), "{said}");
    drop((one, two));
    let first = setup.open("one.qcow2", &[("read_only", true.into())]);
    let second = setup.open("one.qcow2", &[("read_only", true.into())]);
    drop((first, second));
    setup.open("base.qcow2", &[]);
}

#[test]
fn features_that_are_not_supported_are_refused_by_name() {
    let Some(setup) = Setup::new() else { return };
    setup.create("disk.qcow2", &["-o", "extended_l2=on"], "1M");
    refused(
        &setup,
        "disk.qcow2",
        &[],
        &["extended_l2=on", "qemu-img convert"],
    );
    setup.create("disk.qcow2", &["-o", "data_file=data.raw"], "1M");
    refused(&setup, "disk.qcow2", &[], &["external data file"]);
    // The header's crypt_method: qemu-img takes its time to make an encrypted image, and fails where it can't measure that.
    setup.create("disk.qcow2", &[], "1M");
    patch(&setup, "disk.qcow2", 32, &2u32.to_be_bytes());
    refused(&setup, "disk.qcow2", &[], &["encrypted (LUKS)"]);
    for (at, bytes, wanted) in [
        (72, [0, 0, 0, 0, 0, 0, 1, 0], "incompatible bit 8"),
        (72, [0, 0, 0, 0, 0, 0, 0, 8], ""),
        (0, *b"QFI\xfb\0\0\0\x04", "version 4"),
    ] {
        setup.create("disk.qcow2", &[], "1M");
        patch(&setup, "disk.qcow2", at, &bytes);
        // A compression type bit with the default type does no harm.
        match wanted {
            "" => drop(setup.open("disk.qcow2", &[])),
            wanted => refused(&setup, "disk.qcow2", &[], &[wanted]),
        }
    }
    // The name is in the image: bit 2 of the table is moved to bit 40.
    setup.create("disk.qcow2", &[], "1M");
    let mut file = std::fs::read(setup.path("disk.qcow2")).unwrap();
    let name = b"external data file";
    let at = file.windows(name.len()).position(|w| w == name).unwrap();
    file[at - 1] = 40;
    file[74] = 1;
    std::fs::write(setup.path("disk.qcow2"), file).unwrap();
    refused(&setup, "disk.qcow2", &[], &["external data file", "bit 40"]);
}

#[test]
fn images_that_have_to_be_checked_first_are_not_written_to() {
    let Some(setup) = Setup::new() else { return };
    for (bit, wanted) in [(1u8, "lazy refcounts"), (2, "marked as corrupt")] {
        setup.create("disk.qcow2", &["-o", "lazy_refcounts=on"], "1M");
        setup.qemu_io("disk.qcow2", &["write -P 0x21 0 64k"]);
        patch(&setup, "disk.qcow2", 79, &[bit]);
        let before = std::fs::read(setup.path("disk.qcow2")).unwrap();
        refused(
            &setup,
            "disk.qcow2",
            &[],
            &[wanted, "qemu-img check -r all"],
        );
        let mut disk = setup.open("disk.qcow2", &[("read_only", true.into())]);
        assert_eq!(disk.read(0, 512), [0x21; 512]);
        drop(disk);
        assert!(std::fs::read(setup.path("disk.qcow2")).unwrap() == before);
        setup.qemu_img(&["check", "-q", "-r", "all", "disk.qcow2"]);
        setup.open("disk.qcow2", &[]);
    }
}

#[test]
fn dirty_bitmaps_are_switched_off_by_writing() {
    let Some(setup) = Setup::new() else { return };
    setup.create("disk.qcow2", &[], "1M");
    setup.qemu_img(&["bitmap", "--add", "disk.qcow2", "backup"]);
    let autoclear = |setup: &Setup| std::fs::read(setup.path("disk.qcow2")).unwrap()[95];
    assert_eq!(autoclear(&setup), 1);
    setup.open("disk.qcow2", &[("read_only", true.into())]);
    assert_eq!(autoclear(&setup), 1);
    let mut disk = setup.open("disk.qcow2", &[]);
    disk.write(0, &[7; 512]);
    drop(disk);
    assert_eq!(autoclear(&setup), 0);
    setup.check_sound("disk.qcow2");
}

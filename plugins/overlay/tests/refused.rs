//! What an overlay refuses, and what it tells the operator to do.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests

mod support;

use std::os::unix::fs::FileExt;

use support::{MIB, Setup, WRITE};
use vmm_plugin_api::testing::Value;

fn says(result: Result<vmm_plugin_api::testing::Backend, String>, parts: &[&str]) {
    let error = result.err().expect("refused");
    println!("{error}");
    for part in parts {
        assert!(error.contains(part), "`{part}` is missing in: {error}");
    }
}

fn change(setup: &Setup, name: &str, at: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(setup.path(name));
    file.unwrap().write_all_at(bytes, at).unwrap();
}

#[test]
fn a_base_that_can_be_written_to() {
    let setup = Setup::new();
    setup.image("base", MIB);
    let base = setup.file("base", &[("read_only", false.into())]);
    says(
        setup.try_overlay(&base, "over", &[]),
        &[
            "`backing`: [block_dev.",
            "can be written to",
            "`read_only = true`",
        ],
    );
    assert!(!setup.path("over").exists());
}

#[test]
fn a_base_that_has_changed() {
    let setup = Setup::new();
    setup.image("base", MIB);
    let made = || {
        let base = setup.file("base", &[]);
        let overlay = setup.overlay(&base, "over");
        setup.disk(&overlay).write(WRITE, 4096, &[9; 512]);
    };
    made();
    made();
    // One byte in a block that is looked at.
    change(&setup, "base", 0, b"?");
    says(
        setup.try_overlay(&setup.file("base", &[]), "over", &[]),
        &[
            "over",
            "other contents",
            "changed or replaced",
            "restore the base",
        ],
    );
    setup.image("base", MIB);
    made();
    let file = std::fs::File::options()
        .write(true)
        .open(setup.path("base"))
        .unwrap();
    file.set_len(2 * MIB).unwrap();
    says(
        setup.try_overlay(&setup.file("base", &[]), "over", &[]),
        &["1048576 bytes", "2097152"],
    );
    file.set_len(MIB).unwrap();
    let base = setup.file("base", &[("block_size", 4096u64.into())]);
    says(
        setup.try_overlay(&base, "over", &[]),
        &["`block_size = 512`"],
    );
}

#[test]
fn a_file_that_is_something_else() {
    let setup = Setup::new();
    let image = setup.image("base", MIB);
    let base = setup.file("base", &[]);
    setup.image("image", MIB);
    says(
        setup.try_overlay(&base, "image", &[]),
        &["image", "is no overlay"],
    );
    assert!(
        std::fs::read(setup.path("image")).unwrap() == image,
        "left as it is"
    );
    std::fs::write(setup.path("short"), b"no").unwrap();
    says(setup.try_overlay(&base, "short", &[]), &["is no overlay"]);
    std::fs::create_dir(setup.path("folder")).unwrap();
    says(setup.try_overlay(&base, "folder", &[]), &["no plain file"]);
    says(
        setup.try_overlay(&base, "absent/over", &[]),
        &["cannot open or make"],
    );
    let lost = [("keep", Value::from(false))];
    says(
        setup.try_overlay(&base, "absent/over", &lost),
        &["cannot make a file", "absent"],
    );

    drop(setup.overlay(&base, "over"));
    change(&setup, "over", 16, &[0xff]);
    says(
        setup.try_overlay(&base, "over", &[]),
        &["header is damaged"],
    );
    change(&setup, "over", 8, &[2]);
    says(
        setup.try_overlay(&base, "over", &[]),
        &["version 2", "knows version 1"],
    );
}

#[test]
fn read_only_and_not_kept() {
    let setup = Setup::new();
    setup.image("base", MIB);
    let base = setup.file("base", &[]);
    let only = [("read_only", Value::from(true))];
    says(
        setup.try_overlay(&base, "absent", &only),
        &["absent", "read_only"],
    );
    assert!(!setup.path("absent").exists());
    std::fs::write(setup.path("empty"), b"").unwrap();
    says(setup.try_overlay(&base, "empty", &only), &["is empty"]);
    let both = [("read_only", Value::from(true)), ("keep", false.into())];
    says(
        setup.try_overlay(&base, "over", &both),
        &["`keep = false`", "remove one"],
    );
    drop(setup.overlay(&base, "over"));
    let file = std::fs::File::options()
        .write(true)
        .open(setup.path("over"))
        .unwrap();
    file.set_len(MIB).unwrap();
    says(setup.try_overlay(&base, "over", &only), &["has been cut"]);
}

#[test]
fn a_file_in_use() {
    let setup = Setup::new();
    setup.image("base", MIB);
    let base = setup.file("base", &[]);
    let first = setup.overlay(&base, "over");
    says(
        setup.try_overlay(&base, "over", &[]),
        &["over", "in use by another"],
    );
    drop(first);
    let _second = setup.overlay(&base, "over");
}

/// Fills a filesystem of about two megabytes through an overlay over 64 MiB.
fn fill(dir: &std::path::Path) {
    let setup = Setup::within(dir).unwrap();
    let zeroes = std::fs::File::create(setup.path("base")).unwrap();
    zeroes.set_len(64 * MIB).unwrap();
    let base = setup.file("base", &[]);
    let mut written = Vec::new();
    let mut full = 0;
    {
        let overlay = setup.overlay(&base, "over");
        let mut disk = setup.disk(&overlay);
        for i in 0..64u64 {
            match disk.write(WRITE, i * MIB, &[0x77; 65536]) {
                0 => written.push(i * MIB),
                code => {
                    assert_eq!(code, -libc::ENOSPC);
                    full += 1;
                }
            }
        }
        // The map may have no room either; then the flush says so, and a later one may do better.
        let code = disk.control(vmm_plugin_api::BlockOp::Flush, 0, 0);
        assert!(code == 0 || code == -libc::ENOSPC, "{code}");
        for at in &written {
            assert!(disk.read(*at, 65536).iter().all(|byte| *byte == 0x77));
        }
        if code != 0 {
            // Space comes back.
            let unmap = vmm_plugin_api::BlockOp::WriteZeroes { unmap: true };
            assert_eq!(disk.control(unmap, written.pop().unwrap(), 65536), 0);
            disk.flush();
        }
    }
    assert!(full > 0 && !written.is_empty());
    let overlay = setup.overlay(&base, "over");
    let mut disk = setup.disk(&overlay);
    for at in &written {
        assert!(disk.read(*at, 65536).iter().all(|byte| *byte == 0x77));
    }
    println!("full: {} writes done, {full} refused", written.len());
}

#[test]
fn a_full_filesystem_fails_the_write_only() {
    const NAME: &str = "a_full_filesystem_fails_the_write_only";
    if let Some(dir) = std::env::var_os("VMM_TEST_CHILD") {
        return fill(std::path::Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "mount -t tmpfs -o size=2m none \"$VMM_TEST_CHILD\" && exec \"$0\" --exact {NAME} --nocapture"
    );
    let output = std::process::Command::new("unshare")
        .args([
            if rustix::process::geteuid().is_root() {
                "-m"
            } else {
                "-rm"
            },
            "sh",
            "-c",
            &script,
        ])
        .arg(std::env::current_exe().unwrap())
        .env("VMM_TEST_CHILD", dir.path())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => return println!("SKIPPED: {NAME}: unshare: {error}"),
    };
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    if !out.contains("running 1 test") {
        return println!("SKIPPED: {NAME}: no small filesystem here: {}", err.trim());
    }
    assert!(
        output.status.success() && out.contains("full: "),
        "{out}\n{err}"
    );
    print!("{out}");
}

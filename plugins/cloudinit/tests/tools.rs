//! What programs that know FAT from elsewhere make of the volume: mtools, dosfstools and util-linux.

#![allow(clippy::expect_used)] // helpers of tests

mod support;

use std::path::Path;
use std::process::Command;

use support::{MIB, contents, disk};
use vmm_plugin_api::testing::FakeHost;

/// Runs a program that ordinary users may not have on their path; `None` if it isn't installed, which is said.
fn output(program: &str, arguments: &[&str]) -> Option<(Option<i32>, Vec<u8>, String)> {
    let path = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"]
        .iter()
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.is_file());
    let Some(path) = path else {
        println!("SKIPPED: {program} is not installed");
        return None;
    };
    let out = Command::new(path).args(arguments).output().expect("run");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    Some((out.status.code(), out.stdout, said))
}

fn sizes() -> [(usize, u64); 6] {
    [
        (0, 512),
        (700, 512),
        (700, 4096),
        (3 * MIB, 512),
        (10_000_000, 512),
        (40 * MIB, 512),
    ]
}

/// A volume in a file of its own, and what its user-data is.
fn image(folder: &Path, len: usize, block: u64) -> (String, Vec<u8>) {
    let host = FakeHost::new(2 * MIB as u64);
    let user: Vec<u8> = (0..len as u32)
        .map(|i| (i.wrapping_mul(31) >> 3) as u8)
        .collect();
    let path = folder.join("user");
    std::fs::write(&path, &user).expect("write");
    let given = [
        ("user-data-path", path.to_str().expect("UTF-8")),
        ("meta-data", "instance-id: lab\n"),
    ];
    let backend = disk(&host, &given, block).expect("create");
    let image = folder.join("image");
    std::fs::write(&image, contents(&host, &backend)).expect("write");
    (image.to_str().expect("UTF-8").to_owned(), user)
}

#[test]
fn mtools_finds_the_files() {
    for (len, block) in sizes() {
        let folder = tempfile::tempdir().expect("folder");
        let (image, user) = image(folder.path(), len, block);
        let Some((code, listed, said)) = output("mdir", &["-b", "-i", &image, "::"]) else {
            return;
        };
        assert_eq!((code, said.as_str()), (Some(0), ""), "{len}");
        let listed = String::from_utf8(listed).expect("UTF-8");
        let mut names: Vec<&str> = listed.lines().collect();
        names.sort_unstable();
        assert_eq!(names, ["::/meta-data", "::/network-config", "::/user-data"]);
        for (name, expected) in [
            ("::/user-data", &user[..]),
            ("::/meta-data", b"instance-id: lab\n"),
            ("::/network-config", b""),
        ] {
            let Some((code, found, said)) = output("mtype", &["-i", &image, name]) else {
                return;
            };
            assert_eq!((code, said.as_str()), (Some(0), ""), "{len}: {name}");
            assert!(found == expected, "{len}: {name}");
        }
    }
}

#[test]
fn fsck_finds_nothing_to_mend() {
    for (len, block) in sizes() {
        let folder = tempfile::tempdir().expect("folder");
        let (image, _) = image(folder.path(), len, block);
        let Some((code, out, said)) = output("fsck.vfat", &["-n", "-v", &image]) else {
            return;
        };
        let out = String::from_utf8_lossy(&out);
        assert_eq!((code, said.as_str()), (Some(0), ""), "{len}: {out}");
        println!("{len} in {block}: {out}");
    }
}

#[test]
fn blkid_finds_the_label() {
    for (len, block) in sizes() {
        let folder = tempfile::tempdir().expect("folder");
        let (image, _) = image(folder.path(), len, block);
        let Some((code, out, said)) = output("blkid", &["-p", "-o", "export", &image]) else {
            return;
        };
        assert_eq!((code, said.as_str()), (Some(0), ""), "{len}");
        let out = String::from_utf8_lossy(&out);
        for line in ["LABEL=cidata", "TYPE=vfat"] {
            assert!(out.lines().any(|found| found == line), "{len}: {out}");
        }
    }
}

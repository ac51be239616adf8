//! Images that can't be used are refused with what to do about it.

#![allow(clippy::expect_used)] // tests

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{MIB, Mode, Setup, child, open, run};
use vmm_plugin_api::testing::{FakeHost, Value};
use vmm_plugin_api::{Batch, BlockOp};

fn refused(path: &Path, options: &[(&str, Value)]) -> String {
    let error = open(&FakeHost::new(MIB), path, options, false)
        .err()
        .expect("refused");
    println!("{error}");
    error
}

fn assert_says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "`{part}` is missing in: {error}");
    }
}

fn setup() -> Setup {
    Setup::new(Mode::Uring).expect("a folder for images")
}

#[test]
fn a_missing_image() {
    let path = setup().path("absent.img");
    assert_says(
        &refused(&path, &[]),
        &["no disk image at", "absent.img", "truncate -s"],
    );
}

#[test]
fn memory_to_pin_without_direct_io() {
    let setup = setup();
    let path = setup.image("disk", MIB);
    assert_says(
        &refused(&path, &[("pin_memory", true.into())]),
        &["`pin_memory` is of no use", "direct = true"],
    );
}

#[test]
fn a_directory_and_a_fifo() {
    let setup = setup();
    let dir = setup.path("dir");
    std::fs::create_dir(&dir).expect("mkdir");
    assert_says(&refused(&dir, &[]), &["dir", "is a directory"]);
    let fifo = setup.path("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .expect("mkfifo")
            .success()
    );
    assert_says(&refused(&fifo, &[]), &["neither a file nor a block device"]);
    assert_says(
        &refused(Path::new("/dev/null"), &[]),
        &["neither a file nor a block device"],
    );
}

#[test]
fn sizes_that_are_no_whole_blocks() {
    let setup = setup();
    let odd = setup.image("odd", MIB + 100);
    assert_says(
        &refused(&odd, &[]),
        &[
            "1048676 bytes",
            "100 more than",
            "512",
            "truncate -s 1049088",
        ],
    );
    let small = setup.image("small", MIB + 512);
    assert_says(
        &refused(&small, &[("block_size", 4096u64.into())]),
        &["512 more than", "4096"],
    );
    assert_says(
        &refused(&setup.image("empty", 0), &[]),
        &["is empty", "truncate -s"],
    );
}

#[test]
fn block_sizes_that_no_guest_can_use() {
    let path = setup().image("disk", MIB);
    for size in [1000u64, 256, 131_072] {
        assert_says(
            &refused(&path, &[("block_size", size.into())]),
            &["power of two from 512 to 65536"],
        );
    }
}

#[test]
fn direct_where_the_filesystem_has_none() {
    // procfs has regular files, and no direct I/O.
    let error = refused(
        Path::new("/proc/self/environ"),
        &[("direct", true.into()), ("read_only", true.into())],
    );
    assert_says(&error, &["no direct I/O", "remove `direct`"]);
}

/// Root may open everything: the check runs as another user.
#[test]
fn no_permission() {
    if let Ok(dir) = std::env::var("VMM_TEST_CHILD") {
        let dir = PathBuf::from(dir);
        assert_says(
            &refused(&dir.join("readable"), &[]),
            &["can't be written to", "read_only = true", "chmod u+w"],
        );
        assert_says(
            &refused(&dir.join("secret"), &[]),
            &["no permission", "run as its owner"],
        );
        let host = FakeHost::new(MIB);
        open(
            &host,
            &dir.join("readable"),
            &[("read_only", true.into())],
            false,
        )
        .expect("reading is allowed");
        println!("child has seen it");
        return;
    }
    use std::os::unix::process::CommandExt;
    let dir = tempfile::tempdir().expect("folder");
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).expect("chmod");
    for (name, mode) in [("readable", 0o444), ("secret", 0o000)] {
        let file = std::fs::File::create(dir.path().join(name)).expect("create");
        file.set_len(MIB).expect("truncate");
        file.set_permissions(PermissionsExt::from_mode(mode))
            .expect("chmod");
    }
    let mut command = child("no_permission", dir.path().to_str().expect("UTF-8"));
    if rustix::process::geteuid().is_root() {
        // The test program may be in a folder that only root can enter.
        let copy = dir.path().join("test");
        std::fs::copy(std::env::current_exe().expect("own path"), &copy).expect("copy");
        command = Command::new(copy);
        command
            .args(["--exact", "no_permission", "--nocapture"])
            .env("VMM_TEST_CHILD", dir.path());
        command.uid(65534).gid(65534);
    }
    let output = command.output().expect("start");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("child has seen it"),
        "{text}"
    );
}

#[test]
fn a_second_writer_in_this_process() {
    let setup = setup();
    let path = setup.image("disk", MIB);
    let first = setup.open(&path, &[]);
    assert_says(
        &refused(&path, &[]),
        &["disk` is in use", "read_only = true"],
    );
    assert_says(
        &refused(&path, &[("read_only", true.into())]),
        &["is being written to"],
    );
    drop(first);
    setup.open(&path, &[]);
}

#[test]
fn a_second_writer_in_another_process() {
    if let Ok(path) = std::env::var("VMM_TEST_CHILD") {
        assert_says(&refused(Path::new(&path), &[]), &["is in use"]);
        println!("child has seen it");
        return;
    }
    let setup = setup();
    let path = setup.image("disk", MIB);
    let first = setup.open(&path, &[]);
    let output = child(
        "a_second_writer_in_another_process",
        path.to_str().expect("UTF-8"),
    )
    .output()
    .expect("start");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("child has seen it"),
        "{text}"
    );
    drop(first);
}

#[test]
fn readers_share_and_keep_writers_out() {
    let setup = setup();
    let path = setup.image("disk", MIB);
    let read_only = [("read_only", true.into())];
    let (one, two) = (setup.open(&path, &read_only), setup.open(&path, &read_only));
    assert_says(&refused(&path, &[]), &["is in use"]);
    let slice = setup.host.memory().writable(0, 512).expect("RAM");
    for backend in [&one, &two] {
        let mut queue = backend
            .as_block()
            .expect("block")
            .open_queue(4)
            .expect("queue");
        let mut batch = Batch::default();
        batch.transfer(0, BlockOp::Read, 0, &[slice]);
        batch.transfer(1, BlockOp::Write { fua: false }, 0, &[slice]);
        batch.control(2, BlockOp::Discard, 0, 512);
        batch.control(3, BlockOp::Flush, 0, 0);
        let results: Vec<i32> = run(&mut queue, &mut batch).into_values().collect();
        assert_eq!(results, [0, -libc::EROFS, -libc::EROFS, 0]);
    }
}

/// A loop device, gone with the value.
struct Loop(String);

impl Loop {
    fn new(image: &Path, block_size: &str) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", block_size])
            .arg(image)
            .output();
        match output {
            Ok(o) if o.status.success() => {
                Some(Self(String::from_utf8_lossy(&o.stdout).trim().to_owned()))
            }
            Ok(o) => {
                println!(
                    "SKIPPED: block devices: losetup: {}",
                    String::from_utf8_lossy(&o.stderr).trim()
                );
                None
            }
            Err(error) => {
                println!("SKIPPED: block devices: losetup: {error}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn block_devices() {
    let setup = setup();
    let image = setup.image("disk", 4 * MIB);
    std::fs::write(&image, vec![9u8; 4 << 20]).expect("fill");
    let Some(device) = Loop::new(&image, "4096") else {
        return;
    };
    let path = Path::new(&device.0);
    assert_says(
        &refused(path, &[]),
        &["blocks of 4096 bytes", "block_size = 4096"],
    );
    for direct in [false, true] {
        let options = [("block_size", 4096u64.into()), ("direct", direct.into())];
        let backend = setup.open(path, &options);
        let block = backend.as_block().expect("block");
        let info = block.info().expect("info");
        assert_eq!(
            (info.bytes, info.logical, info.physical),
            (4 * MIB, 4096, 4096)
        );
        assert_says(&refused(path, &options), &["is in use"]);
        let mut queue = block.open_queue(8).expect("queue");
        let memory = setup.host.memory();
        let slice = memory.writable(0, 8192).expect("RAM");
        slice.fill(0x33);
        let mut batch = Batch::default();
        batch.transfer(0, BlockOp::Write { fua: true }, 4096, &[slice]);
        batch.control(1, BlockOp::WriteZeroes { unmap: false }, MIB, MIB);
        batch.control(2, BlockOp::Discard, 2 * MIB, MIB);
        batch.control(3, BlockOp::Flush, 0, 0);
        assert!(run(&mut queue, &mut batch).values().all(|r| *r == 0));
        let (one, two) = (
            memory.writable(65536, 16384).expect("RAM"),
            memory.writable(131_072, 4096).expect("RAM"),
        );
        batch.transfer(0, BlockOp::Read, 0, &[one]);
        batch.transfer(1, BlockOp::Read, 2 * MIB - 4096, &[two]);
        assert!(run(&mut queue, &mut batch).values().all(|r| *r == 0));
        let (mut head, mut zeroes) = (vec![0; 16384], vec![1; 4096]);
        one.read(0, &mut head);
        two.read(0, &mut zeroes);
        assert!(
            head[..4096].iter().all(|b| *b == 9)
                && head[4096..12288].iter().all(|b| *b == 0x33)
                && head[12288..].iter().all(|b| *b == 9)
        );
        assert!(zeroes.iter().all(|b| *b == 0));
    }
}

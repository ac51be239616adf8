//! Images that are grown by `size`, that grow or shrink under the VM, and images of CDs.

#![allow(clippy::expect_used, unsafe_code)] // tests; a limit on file sizes is a system call

mod support;

use std::fs::OpenOptions;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use support::{MIB, Mode, Setup, child, each_mode, open, run, succeed};
use vmm_plugin_api::testing::{Backend, FakeHost, Value};
use vmm_plugin_api::{Batch, BlockOp, BlockQueueHandle, GuestSlice};

const WRITE: BlockOp = BlockOp::Write { fua: false };
const EIO: i32 = -libc::EIO;

fn setup() -> Setup {
    Setup::new(Mode::Uring).expect("a folder for images")
}

fn refused(path: &Path, options: &[(&str, Value)], parts: &[&str]) {
    let before = std::fs::metadata(path).map(|m| m.len()).ok();
    let error = open(&FakeHost::new(MIB), path, options, false)
        .err()
        .expect("refused");
    println!("{error}");
    for part in parts {
        assert!(error.contains(part), "`{part}` is missing in: {error}");
    }
    let after = std::fs::metadata(path).map(|m| m.len()).ok();
    assert_eq!(before, after, "a refused image stays as it is");
}

fn resize(path: &Path, bytes: u64) {
    let file = OpenOptions::new().write(true).open(path).expect("open");
    file.set_len(bytes).expect("resize");
}

fn bytes(backend: &Backend) -> u64 {
    backend.as_block().expect("block").bytes(0)
}

#[test]
fn a_smaller_image_is_grown_and_takes_no_space() {
    let setup = setup();
    let path = setup.path("disk");
    std::fs::write(&path, [7u8; 4096]).expect("write");
    let size = |bytes: u64| [("size", Value::from(bytes))];
    let backend = setup.open(&path, &size(64 * MIB));
    let info = backend.as_block().expect("block").info().expect("info");
    assert_eq!(info.bytes, 64 * MIB);
    drop(backend);
    let stat = std::fs::metadata(&path).expect("stat");
    assert_eq!(stat.len(), 64 * MIB);
    assert!(stat.blocks() * 512 < MIB, "{} blocks", stat.blocks());
    let data = std::fs::read(&path).expect("read");
    assert!(data[..4096].iter().all(|b| *b == 7) && data[4096..].iter().all(|b| *b == 0));
    // Of the size that is wanted already; one of no size, and one that ends inside of a block.
    setup.open(&path, &size(64 * MIB));
    for (name, len) in [("empty", 0), ("odd", 1000)] {
        let path = setup.image(name, len);
        assert_eq!(bytes(&setup.open(&path, &size(MIB))), MIB);
    }
}

#[test]
fn sizes_that_an_image_can_not_have() {
    let setup = setup();
    let path = setup.image("disk", 2 * MIB);
    let size = |bytes: u64| ("size", Value::from(bytes));
    refused(
        &path,
        &[size(MIB)],
        &["disk` has 2097152 bytes", "`size` (1048576)", "is not cut"],
    );
    for odd in [0, 2 * MIB + 1] {
        refused(
            &path,
            &[size(odd)],
            &["`size` is", "multiple of `block_size` (512)"],
        );
    }
    let read_only = ("read_only", true.into());
    refused(
        &path,
        &[size(4 * MIB), read_only.clone()],
        &["2097152 bytes", "4194304", "read_only", "truncate -s"],
    );
    setup.open(&path, &[size(2 * MIB), read_only]);
    // The filesystem has no such files.
    refused(
        &path,
        &[size(1 << 62)],
        &[
            "cannot grow",
            "from 2097152 to 4611686018427387904 bytes",
            "no files of that size",
        ],
    );
    refused(&setup.path("absent"), &[size(MIB)], &["no disk image at"]);
    let user = setup.open(&path, &[]);
    refused(&path, &[size(4 * MIB)], &["is in use by another VM"]);
    drop(user);
}

#[test]
fn a_limit_on_file_sizes() {
    if let Ok(path) = std::env::var("VMM_TEST_CHILD") {
        let limit = libc::rlimit {
            rlim_cur: 4 << 20,
            rlim_max: 4 << 20,
        };
        // SAFETY: the struct is valid for the call. The host ignores the signal in its own way.
        unsafe {
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        }
        let wanted = [("size", Value::from(8 * MIB))];
        refused(
            Path::new(&path),
            &wanted,
            &["cannot grow", "1048576 to 8388608", "ulimit -f"],
        );
        println!("child has seen it");
        return;
    }
    let setup = setup();
    let path = setup.image("disk", MIB);
    let output = child("a_limit_on_file_sizes", path.to_str().expect("UTF-8"))
        .output()
        .expect("start");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("child has seen it"),
        "{text}"
    );
}

#[test]
fn images_of_cds() {
    let setup = setup();
    let path = setup.image("cd.iso", 3 * 2048);
    let block = ("block_size", Value::from(2048u64));
    let read_only = ("read_only", Value::from(true));
    refused(
        &path,
        std::slice::from_ref(&block),
        &["block_size = 2048", "cd.iso", "add `read_only = true`"],
    );
    let backend = setup.open(&path, &[block.clone(), read_only.clone()]);
    let info = backend.as_block().expect("block").info().expect("info");
    assert_eq!((info.bytes, info.logical), (3 * 2048, 2048));
    let odd = setup.image("odd.iso", 3 * 2048 + 512);
    refused(
        &odd,
        &[block, read_only],
        &["6656 bytes", "512 more", "(2048)", "truncate -s 8192"],
    );
}

/// An open disk with a queue and 4 KiB of guest memory.
struct Disk {
    backend: Backend,
    queue: BlockQueueHandle,
    slice: GuestSlice,
}

impl Disk {
    fn open(setup: &Setup, path: &Path) -> Self {
        let backend = setup.open(path, &[("block_size", 4096u64.into())]);
        let queue = backend.as_block().expect("block").open_queue(8);
        Self {
            queue: queue.expect("queue"),
            slice: setup.host.memory().writable(0, 4096).expect("RAM"),
            backend,
        }
    }

    fn transfer(&mut self, op: BlockOp, offset: u64) -> i32 {
        let mut batch = Batch::default();
        batch.transfer(0, op, offset, &[self.slice]);
        run(&mut self.queue, &mut batch)[&0]
    }

    fn control(&mut self, op: BlockOp, offset: u64, len: u64) -> i32 {
        let mut batch = Batch::default();
        batch.control(0, op, offset, len);
        run(&mut self.queue, &mut batch)[&0]
    }
}

#[test]
fn a_disk_follows_a_file_that_grows() {
    each_mode(|setup| {
        let path = setup.image("disk", MIB);
        let mut disk = Disk::open(setup, &path);
        let info = disk.backend.as_block().expect("block").info();
        assert_eq!(disk.transfer(WRITE, MIB), -libc::EINVAL);
        resize(&path, 2 * MIB + 5000);
        assert_eq!(bytes(&disk.backend), MIB, "nobody has looked");
        assert_eq!(disk.transfer(WRITE, MIB), -libc::EINVAL);
        assert_eq!(
            disk.backend.look_again().expect("look"),
            Some(2 * MIB + 4096),
            "whole blocks"
        );
        assert_eq!(bytes(&disk.backend), 2 * MIB + 4096);
        disk.slice.fill(0x5a);
        assert_eq!(disk.transfer(WRITE, 2 * MIB), 0);
        assert_eq!(disk.transfer(BlockOp::Read, MIB), 0);
        let mut data = [1; 4096];
        disk.slice.read(0, &mut data);
        assert!(data.iter().all(|b| *b == 0), "what has come is zero");
        assert_eq!(disk.transfer(WRITE, 2 * MIB + 4096), -libc::EINVAL);
        // What a disk says of itself never changes.
        let again = disk.backend.as_block().expect("block").info();
        assert_eq!(info.expect("info").bytes, again.expect("info").bytes);
        let mut batch = Batch::default();
        batch.control(0, BlockOp::Flush, 0, 0);
        succeed(&mut disk.queue, &mut batch);
        assert_eq!(std::fs::read(&path).expect("read")[2 << 20], 0x5a);
    });
}

#[test]
fn what_is_lost_of_a_file_that_shrinks_fails_for_good() {
    each_mode(|setup| {
        let path = setup.image("disk", 2 * MIB);
        let mut disk = Disk::open(setup, &path);
        resize(&path, MIB);
        let text = disk.backend.look_again().expect_err("shrunk").to_string();
        for part in ["disk` has been cut to 1048576", "2097152", "is lost"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(bytes(&disk.backend), 2 * MIB, "the guest's view stays");
        let zero = BlockOp::WriteZeroes { unmap: false };
        let all_fail = |disk: &mut Disk| {
            for op in [BlockOp::Read, WRITE, BlockOp::Write { fua: true }] {
                assert_eq!(disk.transfer(op, MIB), EIO, "{op:?}");
            }
            assert_eq!(disk.control(zero, MIB - 4096, 8192), EIO);
            for op in [BlockOp::Read, WRITE] {
                assert_eq!(disk.transfer(op, MIB - 4096), 0, "{op:?} of what is left");
            }
        };
        all_fail(&mut disk);
        let len = std::fs::metadata(&path).expect("stat").len();
        assert_eq!(len, MIB, "a write does not make a hole of what is lost");
        // Zeroes in place of data are no data.
        resize(&path, 4 * MIB);
        disk.backend.look_again().expect_err("it is still lost");
        all_fail(&mut disk);
    });
}

#[test]
fn a_read_finds_out_that_the_file_has_shrunk() {
    each_mode(|setup| {
        let path = setup.image("disk", 2 * MIB);
        let mut disk = Disk::open(setup, &path);
        resize(&path, MIB);
        assert_eq!(disk.transfer(BlockOp::Read, MIB + 8192), EIO);
        assert_eq!(disk.transfer(WRITE, MIB + 4096), EIO, "from then on");
        assert_eq!(disk.transfer(BlockOp::Read, 0), 0);
    });
}

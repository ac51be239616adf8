//! Images in memory, which are read through a mapping: what read(2) does when they are sparse, cut, punched or grown still happens,
//! and a bus error that is no image's is not swallowed.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::expect_used, unsafe_code)] // tests; signals and mappings are system calls

mod support;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use support::{MIB, Mode, Random, Setup, child, run};
use vmm_plugin_api::testing::{Backend, Value};
use vmm_plugin_api::{Batch, BlockOp, BlockQueueHandle, GuestSlice};

const WRITE: BlockOp = BlockOp::Write { fua: false };
const EIO: i32 = -libc::EIO;
const KIB: u64 = 1 << 10;

/// A disk on an image in memory, with a queue.
struct Disk {
    backend: Backend,
    queue: BlockQueueHandle,
}

impl Disk {
    fn open(setup: &Setup, path: &Path, options: &[(&str, Value)]) -> Self {
        let backend = setup.open(path, options);
        let queue = backend.as_block().expect("block").open_queue(8);
        Self {
            queue: queue.expect("queue"),
            backend,
        }
    }

    /// Reads so much that the kernel is asked what is in memory. Only then does the mapping serve smaller reads.
    fn warm(&mut self, setup: &Setup, bytes: u64) {
        let slice = setup.host.memory().writable(8 * MIB, MIB).expect("RAM");
        for offset in (0..bytes).step_by(1 << 20) {
            let part = slice.part(0, (bytes - offset) as usize);
            assert_eq!(self.transfer(BlockOp::Read, offset, &[part]), 0);
        }
    }

    fn transfer(&mut self, op: BlockOp, offset: u64, list: &[GuestSlice]) -> i32 {
        let mut batch = Batch::default();
        batch.transfer(0, op, offset, list);
        run(&mut self.queue, &mut batch)[&0]
    }

    fn control(&mut self, op: BlockOp, offset: u64, len: u64) -> i32 {
        let mut batch = Batch::default();
        batch.control(0, op, offset, len);
        run(&mut self.queue, &mut batch)[&0]
    }
}

/// `None` where there is no /dev/shm.
fn setup() -> Option<Setup> {
    Setup::new(Mode::Memory)
}

/// An image of `bytes` bytes that are all `byte`.
fn full(setup: &Setup, name: &str, bytes: u64, byte: u8) -> PathBuf {
    let path = setup.path(name);
    std::fs::write(&path, vec![byte; bytes as usize]).expect("an image");
    path
}

fn cut(path: &Path, bytes: u64) {
    let file = OpenOptions::new().write(true).open(path).expect("open");
    file.set_len(bytes).expect("resize");
}

fn bytes_of(slice: &GuestSlice) -> Vec<u8> {
    let mut data = vec![0; slice.len()];
    slice.read(0, &mut data);
    data
}

/// KiB of the file that this process has in its page tables by a mapping; `None` if there is no mapping.
fn mapped_kib(path: &Path) -> Option<u64> {
    let maps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let mut lines = maps.lines();
    lines.find(|line| line.ends_with(path.to_str().expect("UTF-8")))?;
    let rss = lines.find(|line| line.starts_with("Rss:")).expect("Rss");
    rss.split_whitespace().nth(1).expect("figure").parse().ok()
}

fn blocks(path: &Path) -> u64 {
    std::fs::metadata(path).expect("stat").blocks()
}

#[test]
fn pieces_of_all_lengths_at_all_places() {
    let Some(setup) = setup() else { return };
    let mut random = Random(7);
    let data: Vec<u8> = (0..4 * MIB).map(|_| random.below(256) as u8).collect();
    let path = setup.path("disk");
    std::fs::write(&path, &data).expect("an image");
    let mut disk = Disk::open(&setup, &path, &[]);
    let memory = setup.host.memory();
    for _ in 0..3000 {
        let offset = random.below(4 * MIB / 512) * 512;
        let len = (512 * (1 + random.below(300))).min(4 * MIB - offset);
        let (mut list, mut done, mut gpa) = (Vec::new(), 0, 0);
        while done < len {
            // Apart from each other, and aligned to nothing.
            let count = (1500 + random.below(5000)).min(len - done);
            gpa += random.below(30);
            list.push(memory.writable(gpa, count).expect("RAM"));
            (done, gpa) = (done + count, gpa + count);
        }
        assert_eq!(disk.transfer(BlockOp::Read, offset, &list), 0);
        let read: Vec<u8> = list.iter().flat_map(bytes_of).collect();
        assert!(
            read == data[offset as usize..][..len as usize],
            "{offset} {len}"
        );
    }
    assert!(
        mapped_kib(&path).expect("a mapping") > 3 * KIB,
        "not read through it"
    );
}

#[test]
fn a_sparse_image_stays_sparse() {
    let Some(setup) = setup() else { return };
    let path = setup.image("disk", 16 * MIB);
    let file = OpenOptions::new().write(true).open(&path).expect("open");
    for page in [0, 77, 1000, 4095] {
        file.write_all_at(&[9; 4096], page * 4096).expect("write");
    }
    // Half of what one question to the kernel covers, and all of it.
    file.write_all_at(&vec![9; 128 << 10], 8 * MIB)
        .expect("write");
    file.write_all_at(&vec![9; 256 << 10], 9 * MIB)
        .expect("write");
    let before = blocks(&path);
    let mut disk = Disk::open(&setup, &path, &[]);
    let slice = setup.host.memory().writable(0, 128 * KIB).expect("RAM");
    for (round, unit) in [4096, 128 * KIB, 4096].into_iter().enumerate() {
        let expected = std::fs::read(&path).expect("read");
        for offset in (0..16 * MIB).step_by(unit as usize) {
            let part = slice.part(0, unit as usize);
            assert_eq!(disk.transfer(BlockOp::Read, offset, &[part]), 0);
            let there = &expected[offset as usize..][..unit as usize];
            assert!(bytes_of(&part) == there, "{round}: {offset}");
        }
        assert_eq!(blocks(&path), before, "round {round}");
    }
    assert!(mapped_kib(&path).expect("a mapping") >= 384);

    // What the guest frees is a hole again, whether it was read before or not; what it writes is none.
    for op in [BlockOp::Discard, BlockOp::WriteZeroes { unmap: true }] {
        slice.fill(3);
        assert_eq!(disk.transfer(WRITE, MIB, &[slice]), 0);
        assert_eq!(disk.transfer(BlockOp::Read, MIB, &[slice]), 0);
        assert!(bytes_of(&slice).iter().all(|b| *b == 3));
        assert!(blocks(&path) > before);
        assert_eq!(disk.control(op, MIB, 128 * KIB), 0);
        assert_eq!(blocks(&path), before, "{op:?} frees");
        assert_eq!(disk.transfer(BlockOp::Read, MIB, &[slice]), 0);
        assert!(bytes_of(&slice).iter().all(|b| *b == 0));
        assert_eq!(blocks(&path), before, "{op:?}, read");
    }
    let resident = mapped_kib(&path).expect("a mapping");
    slice.fill(4);
    assert_eq!(disk.transfer(WRITE, 12 * MIB, &[slice]), 0);
    assert_eq!(disk.transfer(BlockOp::Read, 12 * MIB, &[slice]), 0);
    assert!(
        mapped_kib(&path).expect("a mapping") >= resident + 128,
        "a hole that was filled"
    );
    let zero = BlockOp::WriteZeroes { unmap: false };
    assert_eq!(disk.control(zero, 12 * MIB, 8192), 0);
    assert_eq!(disk.transfer(BlockOp::Read, 12 * MIB, &[slice]), 0);
    let data = bytes_of(&slice);
    assert!(data[..8192].iter().all(|b| *b == 0) && data[8192..].iter().all(|b| *b == 4));
}

#[test]
fn the_last_page_may_be_part_of_one() {
    let Some(setup) = setup() else { return };
    let path = full(&setup, "disk", MIB + 512, 6);
    let mut disk = Disk::open(&setup, &path, &[]);
    disk.warm(&setup, MIB);
    let slice = setup.host.memory().writable(0, 1024).expect("RAM");
    for (offset, len) in [(MIB, 512), (MIB - 512, 1024)] {
        slice.fill(0);
        let part = slice.part(0, len);
        assert_eq!(disk.transfer(BlockOp::Read, offset, &[part]), 0);
        assert!(bytes_of(&part).iter().all(|b| *b == 6));
    }
    assert_eq!(disk.transfer(BlockOp::Read, MIB, &[slice]), -libc::EINVAL);
}

#[test]
fn a_file_that_is_cut_while_it_is_read() {
    let Some(setup) = setup() else { return };
    for round in 0..40 {
        let path = full(&setup, &format!("disk{round}"), 4 * MIB, 5);
        let disk = Disk::open(&setup, &path, &[]);
        let slice = setup.host.memory().writable(0, 64 * KIB).expect("RAM");
        let stop = AtomicBool::new(false);
        let lost = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let (mut disk, mut lost) = (disk, 0);
                while !stop.load(Ordering::Relaxed) || lost == 0 {
                    for offset in (0..4 * MIB).step_by(64 << 10) {
                        slice.fill(0);
                        match disk.transfer(BlockOp::Read, offset, &[slice]) {
                            0 => assert!(bytes_of(&slice).iter().all(|b| *b == 5), "{offset}"),
                            code => {
                                assert_eq!(code, EIO);
                                assert!(offset >= MIB);
                                lost += 1;
                            }
                        }
                    }
                }
                lost
            });
            std::thread::sleep(std::time::Duration::from_millis(round % 5));
            cut(&path, MIB);
            stop.store(true, Ordering::Relaxed);
            reader.join().expect("the reader")
        });
        assert!(lost > 0);
        std::fs::remove_file(path).expect("remove");
    }
}

#[test]
fn zeros_behind_the_cut_are_no_data() {
    let Some(setup) = setup() else { return };
    for (at, places) in [
        (2 * MIB + 100, [2 * MIB, 2 * MIB + 512, 2 * MIB + 3584]),
        (
            2 * MIB + 512,
            [2 * MIB + 512, 2 * MIB + 1024, 2 * MIB + 4096],
        ),
        // No page is behind this.
        (
            4 * MIB - 2048,
            [4 * MIB - 2048, 4 * MIB - 1024, 4 * MIB - 512],
        ),
    ] {
        let path = full(&setup, "disk", 4 * MIB, 5);
        let mut disk = Disk::open(&setup, &path, &[]);
        let slice = setup.host.memory().writable(0, 4096).expect("RAM");
        let block = slice.part(0, 512);
        // Zeros that are data.
        slice.fill(0);
        assert_eq!(disk.transfer(WRITE, MIB, &[slice]), 0);
        disk.warm(&setup, 4 * MIB);
        assert!(mapped_kib(&path).expect("a mapping") >= 4 * KIB);
        cut(&path, at);
        assert_eq!(disk.transfer(BlockOp::Read, MIB, &[slice]), 0);
        assert_eq!(disk.transfer(BlockOp::Read, 2 * MIB - 512, &[block]), 0);
        for place in places {
            assert_eq!(
                disk.transfer(BlockOp::Read, place, &[block]),
                EIO,
                "{place}"
            );
        }
        // From the intact part into the lost one.
        assert_eq!(
            disk.transfer(BlockOp::Read, places[0] - 2048, &[slice]),
            EIO
        );
        assert_eq!(disk.control(BlockOp::Flush, 0, 0), EIO);
    }
}

#[test]
fn a_hole_that_is_punched_while_it_is_read() {
    let Some(setup) = setup() else { return };
    let path = full(&setup, "disk", 4 * MIB, 5);
    let mut disk = Disk::open(&setup, &path, &[]);
    let slice = setup.host.memory().writable(0, 64 * KIB).expect("RAM");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = OpenOptions::new().write(true).open(&path).expect("open");
            use rustix::fs::FallocateFlags as Flags;
            let punch = Flags::PUNCH_HOLE | Flags::KEEP_SIZE;
            let mut random = Random(11);
            while !stop.load(Ordering::Relaxed) {
                let page = random.below(1024);
                rustix::fs::fallocate(&file, punch, page * 4096, 4096).expect("punch");
                file.write_all_at(&[5; 4096], page * 4096).expect("write");
            }
        });
        for round in 0..50 {
            for offset in (0..4 * MIB).step_by(64 << 10) {
                assert_eq!(disk.transfer(BlockOp::Read, offset, &[slice]), 0, "{round}");
                assert!(bytes_of(&slice).iter().all(|b| matches!(b, 0 | 5)));
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_file_that_grows_is_read_behind_its_mapping() {
    let Some(setup) = setup() else { return };
    let path = full(&setup, "disk", MIB, 5);
    let mut disk = Disk::open(&setup, &path, &[]);
    let slice = setup.host.memory().writable(0, 64 * KIB).expect("RAM");
    cut(&path, 8 * MIB);
    assert_eq!(disk.backend.look_again().expect("look"), Some(8 * MIB));
    for (at, byte) in [(7 * MIB, 1), (MIB - 32 * KIB, 2), (8 * MIB - 64 * KIB, 3)] {
        slice.fill(byte);
        assert_eq!(disk.transfer(WRITE, at, &[slice]), 0);
        slice.fill(0);
        assert_eq!(disk.transfer(BlockOp::Read, at, &[slice]), 0);
        assert!(bytes_of(&slice).iter().all(|b| *b == byte));
        assert_eq!(disk.control(BlockOp::Discard, at, 64 * KIB), 0);
        assert_eq!(disk.transfer(BlockOp::Read, at, &[slice]), 0);
        assert!(bytes_of(&slice).iter().all(|b| *b == 0));
    }
}

#[test]
fn guest_memory_that_is_gone_is_an_error_of_the_read() {
    let Some(setup) = setup() else { return };
    let path = full(&setup, "disk", MIB, 5);
    let mut disk = Disk::open(&setup, &path, &[]);
    disk.warm(&setup, MIB);
    let memory = setup.path("memory");
    let slice = GuestSlice::leak(8192, 4096).expect("memory");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&memory);
    let file = file.expect("create");
    file.set_len(8192).expect("resize");
    // SAFETY: the memory is leaked and of whole pages, and nothing but the disk below uses it.
    unsafe {
        use rustix::mm::{MapFlags, ProtFlags};
        let (read_write, fixed) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::FIXED);
        let there = slice.as_ptr().cast();
        rustix::mm::mmap(there, 8192, read_write, MapFlags::SHARED | fixed, &file, 0).expect("map");
    }
    assert_eq!(disk.transfer(BlockOp::Read, 0, &[slice]), 0);
    file.set_len(4096).expect("cut");
    assert_eq!(disk.transfer(BlockOp::Read, 0, &[slice]), -libc::EFAULT);
    assert_eq!(disk.transfer(BlockOp::Read, 0, &[slice.part(0, 4096)]), 0);
}

/// To who neither owns a file nor may write to it the kernel does not say what of it is in memory.
#[test]
fn an_image_of_somebody_else() {
    const NOBODY: u32 = 65534;
    if let Ok(path) = std::env::var("VMM_TEST_CHILD") {
        // SAFETY: system calls without pointers.
        assert_eq!(unsafe { libc::setuid(NOBODY) }, 0);
        let (path, host) = (
            Path::new(&path),
            vmm_plugin_api::testing::FakeHost::new(MIB),
        );
        let backend = support::open(&host, path, &[("read_only", true.into())], false);
        let backend = backend.expect("open");
        let queue = backend
            .as_block()
            .expect("block")
            .open_queue(8)
            .expect("queue");
        let mut disk = Disk { backend, queue };
        let slice = host.memory().writable(0, MIB).expect("RAM");
        assert_eq!(disk.transfer(BlockOp::Read, 0, &[slice]), 0);
        assert_eq!(mapped_kib(path), None);
        println!("child has seen it");
        return;
    }
    let Some(setup) = setup() else { return };
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root can be somebody else");
        return;
    }
    let path = setup.image("disk", MIB);
    let folder = path.parent().expect("a folder");
    for (path, mode) in [(folder, 0o755), (path.as_path(), 0o644)] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("chmod");
    }
    let output = child("an_image_of_somebody_else", path.to_str().expect("UTF-8"))
        .output()
        .expect("start");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("child has seen it"),
        "{text}"
    );
    assert_eq!(blocks(&path), 0);
}

extern "C" fn with_information(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: a handler with SA_SIGINFO gets one; `_exit` is safe in a handler.
    unsafe { libc::_exit(if (*info).si_signo == signal { 41 } else { 1 }) }
}

extern "C" fn without_information(_: i32) {
    // SAFETY: `_exit` is safe in a handler.
    unsafe { libc::_exit(42) }
}

/// What a child does before it opens a disk, and how it then gets a bus error that is not the disk's.
const CASES: [(&str, &str); 9] = [
    ("rust", "fault"),
    ("default", "fault"),
    ("default", "sent"),
    ("ignored", "fault"),
    ("ignored", "sent"),
    ("with", "fault"),
    ("with", "sent"),
    ("without", "fault"),
    ("without", "sent"),
];

fn bus_error(before: &str, how: &str, folder: &Path) {
    let action = |handler: usize, flags| {
        // SAFETY: all-zero is a valid action; the handlers take what the flags say.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            (action.sa_sigaction, action.sa_flags) = (handler, flags);
            assert_eq!(
                libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()),
                0
            );
        }
    };
    match before {
        "default" => action(libc::SIG_DFL, 0),
        "ignored" => action(libc::SIG_IGN, 0),
        "with" => action(with_information as *const () as usize, libc::SA_SIGINFO),
        "without" => action(without_information as *const () as usize, 0),
        _ => {}
    }
    let host = vmm_plugin_api::testing::FakeHost::new(MIB);
    let path = folder.join("disk");
    let backend = support::open(&host, &path, &[], false).expect("open");
    let queue = backend
        .as_block()
        .expect("block")
        .open_queue(8)
        .expect("queue");
    let mut disk = Disk { backend, queue };
    let slice = host.memory().writable(0, 64 * KIB).expect("RAM");
    // One that is.
    assert_eq!(disk.transfer(BlockOp::Read, MIB, &[slice]), 0);
    cut(&path, MIB);
    assert_eq!(disk.transfer(BlockOp::Read, MIB, &[slice]), EIO);
    println!("alive");
    std::io::stdout().flush().expect("flush");
    if how == "sent" {
        // SAFETY: a system call without pointers.
        unsafe { libc::raise(libc::SIGBUS) };
    } else {
        let file = File::open(&path).expect("open");
        // SAFETY: a new mapping over nothing, which is read as bytes that nobody changes.
        unsafe {
            use rustix::mm::{MapFlags, ProtFlags};
            let len = 2 << 20;
            let there = std::ptr::null_mut();
            let start = rustix::mm::mmap(there, len, ProtFlags::READ, MapFlags::SHARED, &file, 0);
            start
                .expect("map")
                .cast::<u8>()
                .add(len - 1)
                .read_volatile();
        }
    }
    println!("survived");
}

#[test]
fn bus_errors_of_others_go_where_they_went_before() {
    if let Ok(argument) = std::env::var("VMM_TEST_CHILD") {
        let mut words = argument.splitn(3, ':');
        let mut word = || words.next().expect("a word");
        return bus_error(word(), word(), Path::new(word()));
    }
    let Some(setup) = setup() else { return };
    for (before, how) in CASES {
        let path = full(&setup, "disk", 2 * MIB, 5);
        let folder = path.parent().expect("a folder").to_str().expect("UTF-8");
        let argument = format!("{before}:{how}:{folder}");
        let output = child("bus_errors_of_others_go_where_they_went_before", &argument)
            .output()
            .expect("start");
        let text = String::from_utf8_lossy(&output.stdout);
        let status = output.status;
        assert!(text.contains("alive"), "{argument}: {status}: {text}");
        match (before, how) {
            ("with", _) => assert_eq!(status.code(), Some(41), "{argument}"),
            ("without", _) => assert_eq!(status.code(), Some(42), "{argument}"),
            ("ignored", "sent") => {
                assert!(
                    status.success() && text.contains("survived"),
                    "{argument}: {status}"
                );
            }
            _ => assert_eq!(
                status.signal(),
                Some(libc::SIGBUS),
                "{argument}: {status}: {text}"
            ),
        }
    }
}

/// Whether a page is in memory is a question that single reads, far from each other, are not worth.
#[test]
fn few_small_reads_are_left_to_the_kernel() {
    let Some(setup) = setup() else { return };
    let path = full(&setup, "disk", 4 * MIB, 5);
    let mut disk = Disk::open(&setup, &path, &[]);
    let slice = setup.host.memory().writable(0, 4096).expect("RAM");
    for page in 0..15 {
        assert_eq!(disk.transfer(BlockOp::Read, page * 4096, &[slice]), 0);
        assert_eq!(disk.transfer(BlockOp::Read, MIB, &[slice]), 0);
    }
    assert_eq!(mapped_kib(&path), Some(0));
    assert_eq!(disk.transfer(BlockOp::Read, 0, &[slice]), 0);
    assert!(mapped_kib(&path).expect("a mapping") > 0);
}

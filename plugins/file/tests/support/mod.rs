//! Disks on every engine, as a device sees them through the ABI.

#![allow(clippy::expect_used, unsafe_code, dead_code)] // helpers of several test programs; the filter below is a system call

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_plugin_api::testing::{Backend, FakeHost, Value};
use vmm_plugin_api::{Batch, BlockDone, BlockQueueHandle};
use vmm_plugin_file::VMM_PLUGIN;

pub const MIB: u64 = 1 << 20;

/// How a disk does its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// io_uring through the page cache.
    Uring,
    /// io_uring around the page cache.
    Direct,
    /// The same with guest memory registered.
    Pinned,
    /// Threads, because a filter forbids io_uring.
    Threads,
    /// At once, on tmpfs.
    Memory,
}

/// A folder for images, and the mode of disks on them.
pub struct Setup {
    pub mode: Mode,
    pub host: FakeHost,
    dir: tempfile::TempDir,
}

impl Setup {
    pub fn new(mode: Mode) -> Option<Self> {
        let parent = if mode == Mode::Memory {
            Path::new("/dev/shm")
        } else {
            Path::new(env!("CARGO_TARGET_TMPDIR"))
        };
        let dir = match tempfile::tempdir_in(parent) {
            Ok(dir) => dir,
            Err(error) => {
                println!(
                    "SKIPPED: {mode:?}: {} can't be used: {error}",
                    parent.display()
                );
                return None;
            }
        };
        let setup = Self {
            mode,
            host: FakeHost::new(16 * MIB),
            dir,
        };
        if matches!(mode, Mode::Direct | Mode::Pinned) {
            let path = setup.image("probe", MIB);
            if let Err(error) = setup.try_open(&path, &[]) {
                println!("SKIPPED: {mode:?}: {error}");
                return None;
            }
        }
        Some(setup)
    }

    /// A new image of `bytes` zeroes.
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        std::fs::File::create(&path)
            .and_then(|f| f.set_len(bytes))
            .expect("create an image");
        path
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn try_open(&self, path: &Path, options: &[(&str, Value)]) -> Result<Backend, String> {
        let mut options = options.to_vec();
        options.push(("pin_memory", (self.mode == Mode::Pinned).into()));
        let direct = matches!(self.mode, Mode::Direct | Mode::Pinned);
        open(&self.host, path, &options, direct)
    }

    pub fn open(&self, path: &Path, options: &[(&str, Value)]) -> Backend {
        self.try_open(path, options).expect("open the image")
    }
}

/// Opens an image with the manifest's defaults where `options` says nothing.
pub fn open(
    host: &FakeHost,
    path: &Path,
    options: &[(&str, Value)],
    direct: bool,
) -> Result<Backend, String> {
    let path = path.to_str().expect("UTF-8");
    let defaults: [(&str, Value); 7] = [
        ("path", path.into()),
        ("read_only", false.into()),
        ("block_size", 512u64.into()),
        ("workers", 3u64.into()),
        ("skip_flush", false.into()),
        ("direct", direct.into()),
        ("discard", true.into()),
    ];
    let given = |key: &str| options.iter().find(|o| o.0 == key).map(|o| o.1.clone());
    let all = defaults.map(|(key, value)| (key, given(key).unwrap_or(value)));
    // Options without a default, as far as they are given.
    let more = options.iter().filter(|o| all.iter().all(|a| a.0 != o.0));
    let all: Vec<_> = all.iter().chain(more).cloned().collect();
    host.block(&VMM_PLUGIN, "file", &all)
        .map_err(|e| format!("{e:#}"))
}

/// Runs `test` once in each mode that this machine has.
pub fn each_mode(test: impl Fn(&Setup) + Sync) {
    for mode in [
        Mode::Uring,
        Mode::Direct,
        Mode::Pinned,
        Mode::Threads,
        Mode::Memory,
    ] {
        let Some(setup) = Setup::new(mode) else {
            continue;
        };
        std::thread::scope(|scope| {
            let (setup, test) = (&setup, &test);
            scope.spawn(move || {
                if mode == Mode::Threads {
                    forbid_io_uring();
                }
                test(setup);
            });
        });
        println!("{mode:?}: done");
    }
}

/// Elsewhere there is no io_uring to forbid.
#[cfg(not(target_os = "linux"))]
pub fn forbid_io_uring() {}

/// Makes io_uring_setup fail with EPERM in this thread and its children, as container runtimes do.
#[cfg(target_os = "linux")]
pub fn forbid_io_uring() {
    const fn filter(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter {
            code: code as u16,
            jt,
            jf,
            k,
        }
    }
    let allow = filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW);
    let refuse = filter(
        libc::BPF_RET | libc::BPF_K,
        0,
        0,
        libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
    );
    let mut program = [
        filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        filter(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        refuse,
        allow,
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program is valid for the call, which copies it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program
            ),
            0
        );
    }
}

/// Submits the whole batch and waits for it; token and result of each, in order of tokens.
pub fn run(queue: &mut BlockQueueHandle, batch: &mut Batch) -> BTreeMap<u64, i32> {
    let (mut results, mut done) = (BTreeMap::new(), [BlockDone::default(); 7]);
    let mut expected = 0;
    loop {
        expected += queue.submit(batch);
        loop {
            let count = queue.reap(&mut done);
            for one in &done[..count] {
                assert!(
                    results.insert(one.token, one.result).is_none(),
                    "token {} came twice",
                    one.token
                );
            }
            if count < done.len() {
                break;
            }
        }
        if batch.is_empty() && results.len() == expected {
            return results;
        }
        if results.len() < expected {
            wait(queue);
        }
    }
}

/// Sleeps until the queue's descriptor is readable, as a device does.
pub fn wait(queue: &BlockQueueHandle) {
    let fd = queue
        .fd()
        .expect("a queue without a descriptor completes inside submit");
    let limit = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)).expect("poll");
    assert_eq!(ready, 1, "no completion and no signal in 20 s");
    queue.drain();
}

/// Asserts that every request of the batch succeeds.
pub fn succeed(queue: &mut BlockQueueHandle, batch: &mut Batch) {
    for (token, result) in run(queue, batch) {
        assert_eq!(result, 0, "request {token}");
    }
}

/// Deterministic random numbers (xorshift64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Runs this test program's test `name` in a process of its own, with `VMM_TEST_CHILD` set to `argument`.
pub fn child(name: &str, argument: &str) -> std::process::Command {
    let mut command = std::process::Command::new(std::env::current_exe().expect("own path"));
    command
        .args(["--exact", name, "--nocapture", "--include-ignored"])
        .env("VMM_TEST_CHILD", argument);
    command
}

//! Disks in qcow2 images as a device sees them through the ABI, and qemu-img as the judge of what they leave.

#![allow(clippy::expect_used, clippy::unwrap_used, dead_code)] // helpers of several test programs

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_plugin_api::testing::{Backend, FakeHost, Value};
use vmm_plugin_api::{Batch, BlockDone, BlockOp, BlockQueueHandle, GuestSlice};
use vmm_plugin_qcow2::VMM_PLUGIN;

pub const MIB: u64 = 1 << 20;
pub const SECTOR: u64 = 512;

/// Tests of a program take turns: a child that one of them has forked holds the others' locks until it has become qemu-img.
static TURN: Mutex<()> = Mutex::new(());

/// A folder for images.
pub struct Setup {
    pub host: FakeHost,
    _turn: MutexGuard<'static, ()>,
    dir: tempfile::TempDir,
}

impl Setup {
    /// `None`, and it is said so, if there is no qemu-img.
    pub fn new() -> Option<Self> {
        let there = Command::new("qemu-img").arg("--version").output();
        if !there.is_ok_and(|output| output.status.success()) {
            println!("SKIPPED: qcow2 images: no qemu-img on this machine");
            return None;
        }
        Some(Self {
            host: FakeHost::new(16 * MIB),
            _turn: TURN.lock().unwrap_or_else(PoisonError::into_inner),
            dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder"),
        })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a program in the folder; its exit code and what it said.
    pub fn run(&self, program: &str, arguments: &[&str]) -> (i32, String) {
        let mut command = Command::new(program);
        let output = command
            .args(arguments)
            .current_dir(self.dir.path())
            .output()
            .expect(program);
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    /// Runs qemu-img, which must succeed.
    pub fn qemu_img(&self, arguments: &[&str]) -> String {
        let (code, said) = self.run("qemu-img", arguments);
        assert_eq!(code, 0, "qemu-img {arguments:?}: {said}");
        said
    }

    /// Runs commands of qemu-io on an image.
    pub fn qemu_io(&self, image: &str, commands: &[&str]) {
        let mut arguments = vec!["-f", "qcow2"];
        commands
            .iter()
            .for_each(|command| arguments.extend(["-c", command]));
        arguments.push(image);
        let (code, said) = self.run("qemu-io", &arguments);
        assert!(
            code == 0 && !said.contains("failed"),
            "qemu-io {commands:?}: {said}"
        );
    }

    /// Makes an image.
    pub fn create(&self, name: &str, options: &[&str], size: &str) {
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        arguments.extend(options);
        arguments.extend([name, size]);
        self.qemu_img(&arguments);
    }

    /// No damage and nothing leaked.
    pub fn check(&self, name: &str) {
        self.qemu_img(&["check", "-q", name]);
    }

    /// No damage.
    pub fn check_sound(&self, name: &str) {
        let (code, said) = self.run("qemu-img", &["check", "-q", name]);
        assert!(code == 0 || code == 3, "{name}: {said}");
    }

    /// The image reads as `bytes` through qemu-img.
    pub fn compare(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path("expected.raw"), bytes).unwrap();
        self.qemu_img(&[
            "compare",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            name,
            "expected.raw",
        ]);
    }

    pub fn try_open(&self, name: &str, options: &[(&str, Value)]) -> Result<Backend, String> {
        open(&self.host, &self.path(name), options)
    }

    pub fn open(&self, name: &str, options: &[(&str, Value)]) -> Disk {
        Disk::new(
            &self.host,
            self.try_open(name, options)
                .unwrap_or_else(|e| panic!("{e}")),
            0,
        )
    }
}

/// Opens an image with the manifest's defaults where `options` says nothing.
pub fn open(host: &FakeHost, path: &Path, options: &[(&str, Value)]) -> Result<Backend, String> {
    let defaults: [(&str, Value); 6] = [
        ("path", path.to_str().expect("UTF-8").into()),
        ("read_only", false.into()),
        ("block_size", 512u64.into()),
        ("workers", 3u64.into()),
        ("skip_flush", false.into()),
        ("discard", true.into()),
    ];
    let given = |key: &str| options.iter().find(|o| o.0 == key).map(|o| o.1.clone());
    let mut all: Vec<(&str, Value)> = defaults
        .map(|(key, value)| (key, given(key).unwrap_or(value)))
        .into();
    all.extend(given("backing_format").map(|value| ("backing_format", value)));
    host.block(&VMM_PLUGIN, "qcow2", &all)
        .map_err(|e| format!("{e:#}"))
}

/// A queue on a disk, with a megabyte of guest memory.
pub struct Disk {
    pub queue: BlockQueueHandle,
    pub memory: GuestSlice,
    pub size: u64,
    backend: Backend,
}

impl Disk {
    /// The queue number `number` of the backend.
    pub fn new(host: &FakeHost, backend: Backend, number: u64) -> Self {
        let block = backend.as_block().expect("block");
        Self {
            size: block.info().expect("info").bytes,
            queue: block.open_queue(32).expect("queue"),
            memory: host.memory().writable(number * MIB, MIB).expect("RAM"),
            backend,
        }
    }

    pub fn request(&mut self, op: BlockOp, offset: u64, len: u64) -> i32 {
        let mut batch = Batch::default();
        match op {
            BlockOp::Read | BlockOp::Write { .. } => {
                // Three pieces, so that parts of lists are used.
                let (a, len) = (len as usize / 3, len as usize);
                let list = [
                    self.memory.part(0, a),
                    self.memory.part(a, a),
                    self.memory.part(2 * a, len - 2 * a),
                ];
                batch.transfer(1, op, offset, &list);
            }
            _ => batch.control(1, op, offset, len),
        }
        run(&mut self.queue, &mut batch)[&1]
    }

    pub fn try_read(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, i32> {
        self.memory.fill(0x5a);
        match self.request(BlockOp::Read, offset, len) {
            0 => {
                let mut bytes = vec![0; len as usize];
                self.memory.read(0, &mut bytes);
                Ok(bytes)
            }
            code => Err(code),
        }
    }

    pub fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        self.try_read(offset, len)
            .unwrap_or_else(|code| panic!("read at {offset}: {code}"))
    }

    /// All of it.
    pub fn contents(&mut self) -> Vec<u8> {
        let pieces = (0..self.size).step_by(MIB as usize);
        let size = self.size;
        pieces
            .flat_map(|at| self.read(at, MIB.min(size - at)))
            .collect()
    }

    pub fn try_write(&mut self, offset: u64, bytes: &[u8]) -> i32 {
        self.memory.write(0, bytes);
        self.request(BlockOp::Write { fua: false }, offset, bytes.len() as u64)
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        assert_eq!(self.try_write(offset, bytes), 0, "write at {offset}");
    }

    pub fn flush(&mut self) {
        assert_eq!(self.request(BlockOp::Flush, 0, 0), 0, "flush");
    }
}

/// Random writes, zeroes, discards and reads, which `model` follows.
pub fn exercise(disk: &mut Disk, model: &mut [u8], random: &mut Random, steps: usize) {
    let sectors = disk.size / SECTOR;
    for step in 0..steps {
        let from = random.below(sectors);
        let longest = if step % 8 == 0 { 1500 } else { 40 };
        let count = (1 + random.below(longest)).min(sectors - from);
        let (offset, len) = (from * SECTOR, count * SECTOR);
        let range = offset as usize..(offset + len) as usize;
        match random.below(16) {
            0 => disk.flush(),
            1 | 2 => {
                let op = BlockOp::WriteZeroes {
                    unmap: step % 2 == 0,
                };
                assert_eq!(disk.request(op, offset, len), 0);
                model[range].fill(0);
            }
            3 | 4 => {
                assert_eq!(disk.request(BlockOp::Discard, offset, len), 0);
                let now = disk.read(offset, len);
                let old = &mut model[range];
                for (now, old) in now.chunks(512).zip(old.chunks(512)) {
                    assert!(
                        now == old || now.iter().all(|b| *b == 0),
                        "a discarded sector"
                    );
                }
                old.copy_from_slice(&now);
            }
            5..9 => {
                let found = disk.read(offset, len);
                assert!(
                    found == model[range],
                    "step {step}: {count} sectors from {from}"
                );
            }
            _ => {
                let bytes = random.bytes(len as usize);
                disk.write(offset, &bytes);
                model[range].copy_from_slice(&bytes);
            }
        }
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
                let first = results.insert(one.token, one.result).is_none();
                assert!(first, "token {} came twice", one.token);
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
    let fd = queue.fd().expect("a descriptor");
    let limit = Timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)).expect("poll");
    assert_eq!(ready, 1, "no completion and no signal in 60 s");
    queue.drain();
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

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let words = (0..len.div_ceil(8)).flat_map(|_| {
            self.below(1);
            self.0.to_le_bytes()
        });
        words.take(len).collect()
    }
}

//! What was acknowledged is there, whatever happens; what can't be kept is reported.

#![allow(clippy::expect_used)] // tests

mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::{MIB, child, each_mode, forbid_io_uring, open, run, succeed};
use vmm_plugin_api::testing::FakeHost;
use vmm_plugin_api::{Batch, BlockOp};

const WRITE: BlockOp = BlockOp::Write { fua: false };

/// Writes block after block, each with its number, and says so after a flush; never ends.
fn write_until_killed(path: &Path, direct: bool) {
    let host = FakeHost::new(MIB);
    let backend = open(&host, path, &[], direct).expect("open");
    let mut queue = backend
        .as_block()
        .expect("block")
        .open_queue(32)
        .expect("queue");
    let slices: Vec<_> = (0..8u64)
        .map(|i| host.memory().writable(i * 4096, 4096).expect("RAM"))
        .collect();
    let mut batch = Batch::default();
    for round in 0..u64::MAX {
        for (i, slice) in (0u64..).zip(&slices) {
            slice.fill((round % 251) as u8 + 1);
            batch.transfer(i, WRITE, (round * 8 + i) % 4096 * 4096, &[*slice]);
        }
        succeed(&mut queue, &mut batch);
        batch.control(0, BlockOp::Flush, 0, 0);
        succeed(&mut queue, &mut batch);
        println!("flushed {round}");
    }
}

#[test]
fn flushed_writes_survive_kill_9() {
    if let Ok(argument) = std::env::var("VMM_TEST_CHILD") {
        let (mode, path) = argument.split_once(':').expect("mode and path");
        if mode == "Threads" {
            forbid_io_uring();
        }
        return write_until_killed(Path::new(path), matches!(mode, "Direct" | "Pinned"));
    }
    each_mode(|setup| {
        let path = setup.image("disk", 16 * MIB);
        let argument = format!("{:?}:{}", setup.mode, path.display());
        let mut process = child("flushed_writes_survive_kill_9", &argument)
            .stdout(Stdio::piped())
            .spawn()
            .expect("start");
        let lines = BufReader::new(process.stdout.take().expect("stdout")).lines();
        let mut last = None;
        for line in lines.map_while(Result::ok) {
            if let Some(round) = line.strip_prefix("flushed ") {
                last = round.parse::<u64>().ok();
            }
            if last >= Some(40) {
                break;
            }
        }
        process.kill().expect("kill");
        process.wait().expect("wait");
        let last = last.expect("the child has flushed something");
        let data = std::fs::read(&path).expect("read");
        for round in 0..=last.min(511) {
            let at = (round * 8 * 4096) as usize;
            let expected = (round % 251) as u8 + 1;
            assert!(
                data[at..at + 8 * 4096].iter().all(|b| *b == expected),
                "{:?}: round {round} of {last}",
                setup.mode
            );
        }
        // The lock has gone with the process.
        setup.open(&path, &[]);
    });
}

/// The file loses its end under the disk: what is left can be read, the rest fails, and nobody is told that it is safe.
#[test]
fn a_file_that_is_cut_short_fails_reads_beyond_and_all_flushes() {
    each_mode(|setup| {
        let path = setup.image("disk", MIB);
        let backend = setup.open(&path, &[]);
        let mut queue = backend
            .as_block()
            .expect("block")
            .open_queue(32)
            .expect("queue");
        let slices: Vec<_> = (0..8u64)
            .map(|i| setup.host.memory().writable(i * 4096, 4096).expect("RAM"))
            .collect();
        let mut batch = Batch::default();
        batch.control(0, BlockOp::Flush, 0, 0);
        succeed(&mut queue, &mut batch);
        std::fs::File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(MIB / 2))
            .expect("cut it");
        // One batch over both sides of the new end, and across it.
        for (i, slice) in (0u64..).zip(&slices) {
            batch.transfer(i, BlockOp::Read, MIB / 2 + i * 4096 - 4 * 4096, &[*slice]);
        }
        batch.transfer(8, BlockOp::Read, MIB / 2 - 4096, &slices[..2]);
        for (token, result) in run(&mut queue, &mut batch) {
            let expected = if token < 4 { 0 } else { -libc::EIO };
            assert_eq!(result, expected, "{:?}: {token}", setup.mode);
        }
        batch.transfer(0, WRITE, 0, &[slices[0]]);
        succeed(&mut queue, &mut batch);
        for _ in 0..2 {
            batch.control(0, BlockOp::Flush, 0, 0);
            assert_eq!(run(&mut queue, &mut batch)[&0], -libc::EIO);
        }
        assert_eq!(setup.host.faults(), Vec::<String>::new());
    });
}

/// Fills `dir`, a filesystem of about a megabyte, from a disk that promises more.
fn fill(dir: &Path, direct: bool) {
    let path = dir.join("disk");
    std::fs::File::create(&path)
        .and_then(|f| f.set_len(64 * MIB))
        .expect("a sparse image");
    let host = FakeHost::new(MIB);
    let backend = open(&host, &path, &[("block_size", 4096u64.into())], direct).expect("open");
    let mut queue = backend
        .as_block()
        .expect("block")
        .open_queue(32)
        .expect("queue");
    let slice = host.memory().writable(0, 65536).expect("RAM");
    slice.fill(0x77);
    let mut batch = Batch::default();
    let (mut written, mut full) = (Vec::new(), 0);
    for i in 0..64u64 {
        for j in 0..4 {
            batch.transfer(j, WRITE, (i * 4 + j) * 65536, &[slice]);
        }
        for (token, result) in run(&mut queue, &mut batch) {
            match result {
                0 => written.push((i * 4 + token) * 65536),
                code => {
                    assert_eq!(code, -libc::ENOSPC);
                    full += 1;
                }
            }
        }
    }
    assert!(
        full > 0 && !written.is_empty(),
        "{} written, {full} refused",
        written.len()
    );
    // What was acknowledged is there, and the disk works on.
    batch.control(0, BlockOp::Flush, 0, 0);
    succeed(&mut queue, &mut batch);
    for offset in &written {
        slice.fill(0);
        batch.transfer(0, BlockOp::Read, *offset, &[slice]);
        succeed(&mut queue, &mut batch);
        let mut got = vec![0; 65536];
        slice.read(0, &mut got);
        assert!(got.iter().all(|b| *b == 0x77));
    }
    println!("full: {} writes done, {full} refused", written.len());
}

/// Runs the test `name` as child in mount and user namespaces of its own, where `mount` has put a small filesystem on a folder.
fn on_small_filesystem(name: &str, mount: &str) {
    let dir = tempfile::tempdir().expect("folder");
    let script = format!("{mount} && exec \"$0\" --exact {name} --nocapture");
    let mut command = if rustix::process::geteuid().is_root() {
        let mut c = Command::new("unshare");
        c.arg("-m");
        c
    } else {
        let mut c = Command::new("unshare");
        c.arg("-rm");
        c
    };
    let output = command
        .args(["sh", "-c", &script])
        .arg(std::env::current_exe().expect("own path"))
        .env("VMM_TEST_CHILD", dir.path())
        .env("DIR", dir.path())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => return println!("SKIPPED: {name}: unshare: {error}"),
    };
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    if !out.contains("running 1 test") {
        return println!("SKIPPED: {name}: no small filesystem here: {}", err.trim());
    }
    assert!(
        output.status.success() && out.contains("full: "),
        "{out}\n{err}"
    );
    out.lines()
        .filter(|l| l.starts_with("full: "))
        .for_each(|l| println!("{l}"));
}

fn small_dir() -> Option<PathBuf> {
    std::env::var_os("VMM_TEST_CHILD").map(PathBuf::from)
}

#[test]
fn a_full_tmpfs_fails_the_write_only() {
    match small_dir() {
        Some(dir) => fill(&dir, false),
        None => on_small_filesystem(
            "a_full_tmpfs_fails_the_write_only",
            "mount -t tmpfs -o size=1m none \"$DIR\"",
        ),
    }
}

const EXT4: &str = "truncate -s 4M \"$DIR.img\" && mke2fs -q -t ext4 -O ^has_journal \"$DIR.img\" && mount -o loop \"$DIR.img\" \"$DIR\" && rm \"$DIR.img\"";

#[test]
fn a_full_ext4_fails_the_write_only() {
    match small_dir() {
        Some(dir) => fill(&dir, false),
        None => on_small_filesystem("a_full_ext4_fails_the_write_only", EXT4),
    }
}

#[test]
fn a_full_ext4_fails_the_write_only_in_io_uring() {
    match small_dir() {
        Some(dir) => fill(&dir, true),
        None => on_small_filesystem("a_full_ext4_fails_the_write_only_in_io_uring", EXT4),
    }
}

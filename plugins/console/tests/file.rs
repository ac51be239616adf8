//! `type = "file"`, with real files.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends where its helpers fail

use std::path::Path;
use std::time::{Duration, Instant};

use vmm_plugin_api::Result;
use vmm_plugin_api::testing::{Backend, FakeHost};
use vmm_plugin_console::VMM_PLUGIN;

fn create(host: &FakeHost, path: &Path, append: bool) -> Result<Backend> {
    let options = [
        ("path", path.to_str().unwrap().into()),
        ("append", append.into()),
    ];
    host.char(&VMM_PLUGIN, "file", &options)
}

#[test]
fn output_is_in_the_file_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let host = FakeHost::new(4096);
    for (append, expected) in [(false, "one"), (true, "oneone"), (false, "one")] {
        let backend = create(&host, &path, append).unwrap();
        let device = backend.as_char().unwrap();
        assert!(device.fd().is_none());
        assert_eq!(device.read(&mut [0; 8]), None);
        for byte in b"one" {
            assert_eq!(device.write(&[*byte]), 1);
        }
        drop(backend);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
    }
}

#[test]
fn output_gets_there_while_the_guest_runs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let host = FakeHost::new(4096);
    let backend = create(&host, &path, false).unwrap();
    let device = backend.as_char().unwrap();
    let line = [b'x'; 1 << 10];
    for _ in 0..4 << 10 {
        assert_eq!(device.write(&line), line.len());
        std::thread::sleep(Duration::from_micros(20));
    }
    let end = Instant::now() + Duration::from_secs(10);
    while path.metadata().unwrap().len() + backend.counter("lost_bytes") < 4 << 20 {
        assert!(
            Instant::now() < end,
            "{} bytes are there",
            path.metadata().unwrap().len()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_full_disk_costs_output_and_nothing_else() {
    let host = FakeHost::new(4096);
    let backend = create(&host, Path::new("/dev/full"), false).unwrap();
    let device = backend.as_char().unwrap();
    let start = Instant::now();
    for _ in 0..3 << 10 {
        assert_eq!(device.write(&[b'x'; 1 << 10]), 1 << 10);
    }
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "the guest waits for the disk"
    );
    let end = Instant::now() + Duration::from_secs(10);
    while backend.counter("lost_bytes") == 0 {
        assert!(Instant::now() < end, "nothing is counted");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(250));
    drop(backend);
    let logs: Vec<String> = host
        .logs()
        .into_iter()
        .filter(|l| l.contains("/dev/full: No space left"))
        .collect();
    assert_eq!(logs.len(), 1, "{:?}", host.logs());
}

#[test]
fn files_that_can_not_be_opened() {
    let dir = tempfile::tempdir().unwrap();
    let host = FakeHost::new(4096);
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    for (path, why) in [
        (dir.path(), "Is a directory"),
        (&dir.path().join("no/log"), "No such file"),
        (&fifo, "No such device"),
    ] {
        let error = format!("{:#}", create(&host, path, false).map(drop).unwrap_err());
        assert!(
            error.contains(path.to_str().unwrap()) && error.contains(why),
            "{error}"
        );
    }
}

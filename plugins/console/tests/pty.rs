//! `type = "pty"`, with real pseudo terminals.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends where its helpers fail

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::OFlags;
use vmm_plugin_api::CharDevice;
use vmm_plugin_api::testing::{Backend, FakeHost};
use vmm_plugin_console::VMM_PLUGIN;

struct Console {
    host: FakeHost,
    device: CharDevice,
    backend: Backend,
}

impl Console {
    fn new(link: &Path) -> Self {
        let host = FakeHost::new(4096);
        let options = [
            ("link", link.to_str().unwrap().into()),
            ("buffer", (64u64 << 10).into()),
        ];
        let backend = host.char(&VMM_PLUGIN, "pty", &options).unwrap();
        Self {
            host,
            device: backend.as_char().unwrap(),
            backend,
        }
    }

    fn name(&self) -> PathBuf {
        let logs = self.host.logs();
        let log = logs
            .iter()
            .find(|l| l.contains("the console is on"))
            .expect("the name is logged");
        log.rsplit(' ').next().unwrap().into()
    }

    fn wait(&self, what: &str, done: impl FnMut() -> bool) {
        assert!(
            self.host.poll_until(Duration::from_secs(20), done),
            "waited in vain for {what}"
        );
    }

    /// Reads until `end` has come.
    fn expect(&self, terminal: &mut File, end: &[u8]) -> Vec<u8> {
        let (mut got, mut buf) = (Vec::new(), [0; 4096]);
        self.wait("output", || {
            while let Ok(len) = terminal.read(&mut buf) {
                got.extend(&buf[..len]);
            }
            got.ends_with(end)
        });
        got
    }
}

/// Opens a terminal as a program would, without waiting in reads.
fn open(path: &Path) -> File {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        .unwrap()
        .into()
}

#[test]
fn programs_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("console");
    let console = Console::new(&link);
    assert_eq!(std::fs::read_link(&link).unwrap(), console.name());
    console.device.write(b"booting\r\n");
    for round in 0..3 {
        let mut terminal = open(&link);
        let expected: &[u8] = if round == 0 {
            b"booting\r\n"
        } else {
            b"unseen\r\n"
        };
        assert_eq!(console.expect(&mut terminal, expected), expected);
        terminal.write_all(b"ls\r\x03").unwrap();
        let mut typed: Vec<u8> = Vec::new();
        console.wait("input", || {
            let mut buf = [0; 16];
            while let Some(len) = console.device.read(&mut buf) {
                typed.extend(&buf[..len]);
            }
            typed.len() >= 4
        });
        assert_eq!(
            typed, b"ls\r\x03",
            "keys arrive as typed, and output does not come back as input"
        );
        drop(terminal);
        console.device.write(b"unseen\r\n");
        (0..10).for_each(|_| {
            console.host.poll(Duration::from_millis(1));
        });
    }
}

#[test]
fn nobody_reads_and_nobody_waits() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("console");
    let console = Console::new(&link);
    for i in 0..20_000 {
        assert_eq!(
            console.device.write(format!("line {i:10}\r\n").as_bytes()),
            17
        );
        if i % 100 == 0 {
            console.host.poll(Duration::ZERO);
        }
    }
    console.wait("rest", || console.host.poll(Duration::from_millis(10)) == 0);
    let mut terminal = open(&link);
    let got = String::from_utf8(console.expect(&mut terminal, b"line      19999\r\n")).unwrap();
    assert!(got.starts_with("line          0\r\n"), "{:?}", &got[..100]);
    assert!(got.contains("bytes of console output are lost"));
    assert!(console.backend.counter("lost_bytes") > 100_000);
}

#[test]
fn the_link_goes_with_the_vm_and_replaces_only_links() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("console");
    std::os::unix::fs::symlink("/nowhere", &link).unwrap();
    let console = Console::new(&link);
    assert_eq!(std::fs::read_link(&link).unwrap(), console.name());
    drop(console);
    assert!(link.symlink_metadata().is_err());

    std::fs::write(&link, "keep me").unwrap();
    let host = FakeHost::new(4096);
    let options = [
        ("link", link.to_str().unwrap().into()),
        ("buffer", 4096u64.into()),
    ];
    let error = host
        .char(&VMM_PLUGIN, "pty", &options)
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(error.contains("is no symbolic link"), "{error}");
    assert_eq!(std::fs::read_to_string(&link).unwrap(), "keep me");
}

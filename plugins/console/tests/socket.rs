//! `type = "socket"`, with real sockets.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends where its helpers fail

use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_plugin_api::testing::{Backend, FakeHost};
use vmm_plugin_api::{CharDevice, Result};
use vmm_plugin_console::VMM_PLUGIN;

const BUFFER: usize = 1 << 20;

struct Console {
    host: FakeHost,
    backend: Backend,
    device: CharDevice,
}

fn create(host: &FakeHost, path: &Path, wait: bool) -> Result<Backend> {
    let options = [
        ("path", path.to_str().unwrap().into()),
        ("wait", wait.into()),
        ("buffer", (BUFFER as u64).into()),
    ];
    host.char(&VMM_PLUGIN, "socket", &options)
}

impl Console {
    fn new(path: &Path) -> Self {
        let host = FakeHost::new(4096);
        let backend = create(&host, path, false).unwrap();
        let device = backend.as_char().unwrap();
        Self {
            host,
            backend,
            device,
        }
    }

    fn wait(&self, what: &str, done: impl FnMut() -> bool) {
        assert!(
            self.host.poll_until(Duration::from_secs(20), done),
            "waited in vain for {what}"
        );
    }

    fn rest(&self) {
        (0..20).for_each(|_| {
            self.host.poll(Duration::from_millis(1));
        });
    }

    /// Reads `len` bytes of what a client gets.
    fn expect(&self, client: &mut UnixStream, len: usize) -> Vec<u8> {
        client.set_nonblocking(true).unwrap();
        let mut got = vec![0; len];
        let mut at = 0;
        self.wait("output", || {
            while at < len {
                match client.read(&mut got[at..]) {
                    Ok(0) => panic!("the console closed the connection after {at} bytes"),
                    Ok(n) => at += n,
                    Err(error) => {
                        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                        break;
                    }
                }
            }
            at == len
        });
        got
    }

    fn input_waits(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(
            self.device.fd().unwrap(),
            PollFlags::IN,
        )];
        poll(
            &mut fds,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        )
        .unwrap()
            == 1
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

#[test]
fn output_is_kept_for_clients_that_come_one_after_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tty");
    let console = Console::new(&path);
    assert_eq!(console.device.write(b"before anybody came\r\n"), 21);

    let mut first = UnixStream::connect(&path).unwrap();
    assert_eq!(console.expect(&mut first, 21), b"before anybody came\r\n");
    console.device.write(b"first\r\n");
    assert_eq!(console.expect(&mut first, 7), b"first\r\n");
    drop(first);
    console.rest();
    console.device.write(b"alone\r\n");

    let mut second = UnixStream::connect(&path).unwrap();
    assert_eq!(
        console.expect(&mut second, 35),
        b"before anybody came\r\nfirst\r\nalone\r\n"
    );
}

#[test]
fn several_clients_see_everything_and_may_type() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tty");
    let console = Console::new(&path);
    let mut clients: Vec<UnixStream> = (0..10)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    console.rest();
    console.device.write(b"to all");
    for client in &mut clients[..8] {
        assert_eq!(console.expect(client, 6), b"to all");
    }
    assert!(!console.input_waits());
    assert_eq!(console.device.read(&mut [0; 4]), None);
    for (i, client) in clients[..8].iter_mut().enumerate() {
        client.write_all(&[b'0' + i as u8]).unwrap();
        console.wait("a key", || console.input_waits());
        let mut key = [0; 4];
        assert_eq!(console.device.read(&mut key), Some(1));
        assert_eq!(key[0], b'0' + i as u8);
        assert!(!console.input_waits());
    }
    // The ninth and tenth wait for a place.
    drop(clients.remove(3));
    assert_eq!(console.expect(&mut clients[7], 6), b"to all");
}

#[test]
fn a_client_that_does_not_read_loses_output_and_nobody_waits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tty");
    let console = Console::new(&path);
    let mut lazy = UnixStream::connect(&path).unwrap();
    console.host.poll(Duration::ZERO);
    let text = pattern(10 << 20);
    let mut slowest = Duration::ZERO;
    for (i, chunk) in text.chunks(1000).enumerate() {
        let start = Instant::now();
        assert_eq!(console.device.write(chunk), chunk.len());
        slowest = slowest.max(start.elapsed());
        if i % 50 == 0 {
            console.host.poll(Duration::ZERO);
        }
    }
    assert!(slowest < Duration::from_secs(1), "a write took {slowest:?}");

    let mut got = Vec::new();
    lazy.set_nonblocking(true).unwrap();
    console.wait("the end of the output", || {
        let _ = lazy.read_to_end(&mut got);
        got.ends_with(&text[text.len() - 1000..])
    });
    let (mut rest, mut at, mut lost) = (&got[..], 0, 0);
    while !rest.is_empty() {
        let same = rest
            .iter()
            .zip(&text[at..])
            .take_while(|(a, b)| a == b)
            .count();
        // A notice can begin as the output would have gone on.
        let gap =
            (0..=same.min(3)).find_map(|back| Some((same - back, notice(&rest[same - back..])?)));
        let (taken, skip) = match gap {
            Some((before, (len, bytes))) => (before + len, before + bytes),
            None => (same, same),
        };
        assert!(
            gap.is_some() || same == rest.len(),
            "wrong output after {at} bytes"
        );
        lost += skip
            - if let Some((before, _)) = gap {
                before
            } else {
                skip
            };
        rest = &rest[taken..];
        at += skip;
    }
    assert_eq!(at, text.len());
    assert!(lost > 8 << 20, "{lost}");
    assert_eq!(console.backend.counter("lost_bytes"), lost as u64);
    let warnings = console
        .host
        .logs()
        .iter()
        .filter(|l| l.contains("reads too slowly"))
        .count();
    assert_eq!(warnings, 1);
}

/// A notice about lost output at the start of `text`: its length, and how many bytes are lost.
fn notice(text: &[u8]) -> Option<(usize, usize)> {
    let text = text.strip_prefix(b"\r\n[")?;
    let digits = text.iter().take_while(|b| b.is_ascii_digit()).count();
    let lost = std::str::from_utf8(&text[..digits]).ok()?.parse().ok()?;
    let words = b" bytes of console output are lost: read too slowly]\r\n";
    text[digits..]
        .starts_with(words)
        .then_some((3 + digits + words.len(), lost))
}

/// Input that the guest does not take stays with the client; all of it arrives, also that of a client which has gone.
#[test]
fn a_large_paste_waits_for_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tty");
    let console = Console::new(&path);
    let mut client = UnixStream::connect(&path).unwrap();
    let sent = pattern(300_000);
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || client.write_all(&sent)
    });
    console.rest();
    let calls: usize = (0..50)
        .map(|_| console.host.poll(Duration::from_millis(1)))
        .sum();
    assert_eq!(
        calls, 0,
        "the I/O thread is called while the guest takes nothing"
    );
    let (mut got, mut buf) = (Vec::<u8>::new(), [0; 16]);
    console.wait("the paste", || {
        while let Some(len) = console.device.read(&mut buf) {
            got.extend(&buf[..len]);
        }
        got.len() == sent.len()
    });
    assert!(got == sent);
    writer.join().unwrap().unwrap();
    console.rest();
    assert!(!console.input_waits());
    let calls: usize = (0..50)
        .map(|_| console.host.poll(Duration::from_millis(1)))
        .sum();
    assert_eq!(calls, 0, "the client that has gone is still watched");
}

#[test]
fn a_client_that_only_stops_sending_still_sees_output() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tty");
    let console = Console::new(&path);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"uname\n").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    console.wait("input", || console.input_waits());
    console.rest();
    console.device.write(b"Linux\r\n");
    assert_eq!(console.expect(&mut client, 7), b"Linux\r\n");
}

/// A guest that writes byte by byte costs few system calls: the I/O thread lets output gather.
#[test]
fn output_gathers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tty");
    let console = Console::new(&path);
    let mut client = UnixStream::connect(&path).unwrap();
    console.rest();
    let start = Instant::now();
    let mut calls = 0;
    for _ in 0..10_000 {
        console.device.write(b".");
        calls += console.host.poll(Duration::ZERO);
    }
    let intervals = start.elapsed().as_millis() / 2 + 1;
    assert!(
        (calls as u128) <= 2 * intervals + 2,
        "{calls} calls in {intervals} intervals of 2 ms"
    );
    assert_eq!(console.expect(&mut client, 10_000), [b'.'; 10_000]);
}

#[test]
fn start_is_held_until_the_first_client() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tty");
    let host = FakeHost::new(4096);
    let backend = create(&host, &path, true).unwrap();
    (0..5).for_each(|_| {
        host.poll(Duration::from_millis(1));
    });
    let holds = host.holds();
    assert_eq!(holds.len(), 1);
    assert!(
        holds[0].contains(&format!("unix-connect:{}", path.display())),
        "{holds:?}"
    );

    // Somebody who looks whether the name is taken is no client.
    let error = create(&host, &path, false)
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(error.contains("another process listens on"), "{error}");
    (0..5).for_each(|_| {
        host.poll(Duration::from_millis(1));
    });
    assert_eq!(host.holds().len(), 1);

    let _client = UnixStream::connect(&path).unwrap();
    assert!(host.poll_until(Duration::from_secs(5), || host.holds().is_empty()));
    drop(backend);
}

#[test]
fn the_socket_is_private_and_goes_with_the_vm() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tty");
    let console = Console::new(&path);
    let meta = path.metadata().unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    let mut client = UnixStream::connect(&path).unwrap();
    console.rest();
    console.device.write(b"last words");
    drop(console);
    assert!(!path.exists());
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"last words");
}

#[test]
fn a_left_over_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tty");
    drop(UnixListener::bind(&path).unwrap());
    let before = path.symlink_metadata().unwrap().ino();
    let console = Console::new(&path);
    drop(UnixStream::connect(&path).unwrap());

    let error = create(&console.host, &path, false)
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(path.to_str().unwrap()) && error.contains("running already"),
        "{error}"
    );
    drop(UnixStream::connect(&path).expect("the first VM keeps its socket"));

    // Whoever has taken the name meanwhile keeps it.
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(console);
    assert!(path.exists(), "inode {before}");
}

#[test]
fn paths_that_can_not_be_a_socket() {
    let dir = tempfile::tempdir().unwrap();
    let host = FakeHost::new(4096);
    let file = dir.path().join("file");
    std::fs::write(&file, "keep me").unwrap();
    let refuse = |path: &Path| {
        create(&host, path, false)
            .map(drop)
            .map_err(|e| format!("{e:#}"))
            .unwrap_err()
    };
    let error = refuse(&file);
    assert!(error.contains("is no socket"), "{error}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "keep me");
    let error = refuse(&dir.path().join("x".repeat(200)));
    assert!(error.contains("shorter `path`"), "{error}");
    let error = refuse(&dir.path().join("missing").join("tty"));
    assert!(
        error.contains("missing/tty") && error.contains("No such file"),
        "{error}"
    );
    assert_eq!(host.holds(), Vec::<String>::new());
}

//! `type = "stdio"`, in child processes with terminals and pipes of their own.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends where its helpers fail

use std::fs::File;
use std::io::{PipeReader, Read, Write, pipe};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, OutputModes, Termios, tcgetattr};
use vmm_plugin_api::testing::FakeHost;
use vmm_plugin_console::VMM_PLUGIN;

const MODE: &str = "VMM_CONSOLE_TEST";
/// Output of the guest that prints much.
const MUCH: usize = 4 << 20;

/// The VM: answers each byte typed with its number in brackets, until it is asked to end.
#[test]
#[ignore = "the child process of the other tests here"]
fn child() {
    let mode = std::env::var(MODE).expect("started by another test");
    let host = FakeHost::new(4096);
    let backend = host
        .char(&VMM_PLUGIN, "stdio", &[("escape", "ctrl-a".into())])
        .unwrap();
    let again = host.char(&VMM_PLUGIN, "stdio", &[("escape", "none".into())]);
    assert!(again.map(drop).unwrap_err().to_string().contains("already"));
    let device = backend.as_char().unwrap();
    device.write(b"ready;");
    if mode == "much" {
        let start = Instant::now();
        (0..MUCH / 1024).for_each(|_| assert_eq!(device.write(&[b'~'; 1024]), 1024));
        assert!(
            start.elapsed() < Duration::from_secs(1),
            "output makes the guest wait"
        );
    }
    let end = Instant::now() + Duration::from_secs(20);
    while host.requests().is_empty() && Instant::now() < end {
        let mut buf = [0; 16];
        match device.read(&mut buf) {
            Some(len) => buf[..len].iter().for_each(|b| {
                device.write(format!("[{b}]").as_bytes());
            }),
            None => std::thread::sleep(Duration::from_millis(1)),
        }
        if mode == "panic" && buf[0] == b'p' {
            panic!("as asked");
        }
        if mode != "tty" && buf.contains(&b'q') {
            break;
        }
    }
    assert_eq!(host.faults(), Vec::<String>::new());
    device.write(b"bye;");
}

fn spawn(mode: &str, stdin: impl Into<Stdio>, stdout: impl Into<Stdio>) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "child",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(MODE, mode)
        .stdin(stdin)
        .stdout(stdout)
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Reads until `end` has come.
fn expect(from: &mut (impl Read + std::os::fd::AsFd), end: &str) -> String {
    let (mut got, mut buf) = (String::new(), [0; 65536]);
    let last = Instant::now() + Duration::from_secs(20);
    while !got.contains(end) {
        assert!(
            Instant::now() < last,
            "waited in vain for `{end}`; got {got:?}"
        );
        let mut fds = [PollFd::new(from, PollFlags::IN)];
        if poll(
            &mut fds,
            Some(&Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            }),
        )
        .unwrap()
            == 1
        {
            let len = from.read(&mut buf).unwrap();
            got.push_str(&String::from_utf8_lossy(&buf[..len]));
        }
    }
    got
}

fn terminal() -> (File, OwnedFd) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let slave = rustix::fs::open(
        name.as_c_str(),
        OFlags::RDWR | OFlags::NOCTTY,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    (master.into(), slave)
}

fn modes(terminal: &OwnedFd) -> String {
    let Termios {
        input_modes,
        output_modes,
        control_modes,
        local_modes,
        special_codes,
        ..
    } = tcgetattr(terminal).unwrap();
    format!("{input_modes:?} {output_modes:?} {control_modes:?} {local_modes:?} {special_codes:?}")
}

#[test]
fn a_terminal_is_raw_while_the_vm_runs_and_restored_after() {
    let (mut master, slave) = terminal();
    let before = modes(&slave);
    let mut child = spawn(
        "tty",
        slave.try_clone().unwrap(),
        slave.try_clone().unwrap(),
    );
    expect(&mut master, "ready;");
    let during = tcgetattr(&slave).unwrap();
    assert!(
        !during
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    );
    assert!(
        during.output_modes.contains(OutputModes::OPOST),
        "log messages on the same terminal need it"
    );
    master.write_all(b"a\x03\r\x01\x01q\x13\x11").unwrap();
    expect(&mut master, "[97][3][13][1][113][19][17]");
    master.write_all(b"\x01x").unwrap();
    expect(&mut master, "bye;");
    assert!(child.wait().unwrap().success());
    assert_eq!(modes(&slave), before);
}

#[test]
fn a_terminal_is_restored_when_the_vm_panics() {
    let (mut master, slave) = terminal();
    let before = modes(&slave);
    let mut child = spawn(
        "panic",
        slave.try_clone().unwrap(),
        slave.try_clone().unwrap(),
    );
    expect(&mut master, "ready;");
    assert_ne!(modes(&slave), before);
    master.write_all(b"p").unwrap();
    expect(&mut master, "[112]");
    assert!(!child.wait().unwrap().success());
    assert_eq!(modes(&slave), before);
}

#[test]
fn pipes_work_and_the_end_of_input_is_not_the_end() {
    let (from_vm, to_us) = pipe().unwrap();
    let (from_us, mut to_vm) = pipe().unwrap();
    let mut child = spawn("pipe", from_us, to_us);
    let mut from_vm: PipeReader = from_vm;
    expect(&mut from_vm, "ready;");
    to_vm.write_all(b"\x01xz").unwrap();
    expect(&mut from_vm, "[1][120][122]");
    to_vm.write_all(&[b'.'; 9000]).unwrap();
    to_vm.write_all(b"q").unwrap();
    drop(to_vm);
    let got = expect(&mut from_vm, "bye;");
    assert_eq!(
        got.matches("[46]").count(),
        9000,
        "input waits for the guest"
    );
    assert!(child.wait().unwrap().success());
}

/// Standard output that nobody reads for a while is neither waited for nor made nonblocking, which others would inherit.
#[test]
fn a_slow_reader_of_standard_output_makes_nobody_wait() {
    let (mut from_vm, to_us) = pipe().unwrap();
    let (from_us, mut to_vm) = pipe().unwrap();
    let watched = to_us.try_clone().unwrap();
    let mut child = spawn("much", from_us, to_us);
    to_vm.write_all(b"q").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(
        !rustix::fs::fcntl_getfl(&watched)
            .unwrap()
            .contains(OFlags::NONBLOCK)
    );
    drop(watched);
    let got = expect(&mut from_vm, "bye;");
    let notices = got.split("\r\n[").skip(1);
    let lost: usize = notices
        .map(|n| n.split(' ').next().unwrap().parse::<usize>().unwrap())
        .sum();
    assert!(
        lost > 1 << 20,
        "the ring holds 1 MiB, the pipe 64 KiB; lost {lost}"
    );
    let printed = got.matches('~').count();
    let ready = if got.contains("ready;") {
        0
    } else {
        "ready;".len()
    };
    assert_eq!(printed + lost, MUCH + ready);
    assert!(child.wait().unwrap().success());
}

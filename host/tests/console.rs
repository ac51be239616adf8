//! The guest's console as its user meets it: socket, standard input and output, pty, file.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod run;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use run::{STDIO, Scene, disk, host_by, kvm, vm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::tcgetattr;

/// The socket without a wait for its first client.
const NO_WAIT: &str = "[char_dev.ttya]\nwait = false\n";

fn read_until(stream: &mut (impl Read + AsFd), what: &str) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let so_far = String::from_utf8_lossy(&text).into_owned();
        if so_far.contains(what) {
            return so_far;
        }
        let mut fds = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)];
        let limit = Timespec::try_from(run::PATIENCE).unwrap();
        let ready = poll(&mut fds, Some(&limit)).unwrap();
        assert!(ready > 0, "no {what:?} in time after {so_far}");
        match stream.read(&mut buffer) {
            Ok(len) if len > 0 => text.extend(&buffer[..len]),
            other => panic!("no {what:?}: {other:?} after {so_far}"),
        }
    }
}

#[test]
fn the_implicit_port_waits_for_a_client_and_says_so() {
    if !kvm("the_implicit_port_waits_for_a_client_and_says_so") {
        return;
    }
    let scene = Scene::new();
    let running = scene.start(&vm("mode=poweroff", "", ""));
    running.expect_log("the guest starts after a client on the unix socket ./ttya");
    running.expect_log("socat");
    let mode = scene.path("ttya").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "others may not type on the console");
    let mut client = scene.connect("ttya");
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert!(text.contains("vmm-selftest"), "{text}");
    running.wait().exited(0);
    assert!(scene.files().is_empty(), "{:?}", scene.files());
}

#[test]
fn signals_end_the_wait_for_a_client() {
    if !kvm("signals_end_the_wait_for_a_client") {
        return;
    }
    for signal in [Signal::INT, Signal::TERM] {
        let scene = Scene::new();
        let running = scene.start(&vm("mode=hang", "exit_on_halt = 4", ""));
        running.expect_log("the guest starts after");
        running.signal(signal);
        running
            .wait()
            .exited(4)
            .logged("ends before the guest has started");
        assert!(scene.files().is_empty(), "{:?}", scene.files());
    }
}

#[test]
fn the_socket_is_removed_however_the_vm_ends() {
    if !kvm("the_socket_is_removed_however_the_vm_ends") {
        return;
    }
    let broken = format!(
        "{NO_WAIT}{}",
        disk("type = \"mem-async\"\nsize = \"1M\"").replace(
            "block_dev = \"disk\"",
            "block_dev = \"disk\"\nqueue_size = 5"
        )
    )
    .replace(STDIO, "");
    let ends = [
        ("mode=poweroff", NO_WAIT, "", 0),
        ("mode=reboot", NO_WAIT, "exit_on_reboot = 2", 2),
        ("mode=bad-jump", NO_WAIT, "", 1),
        ("mode=halt", NO_WAIT, "", 0),
        ("mode=poweroff", broken.as_str(), "", 1),
        ("mode=poweroff", NO_WAIT, "kernel = \"vm0.toml\"", 1),
    ];
    for (number, (cmdline, rest, main, code)) in ends.into_iter().enumerate() {
        let scene = Scene::new();
        scene.write("vm0.toml", "no kernel");
        let _ran = scene.run(&vm(cmdline, main, rest)).exited(code);
        assert!(scene.files().is_empty(), "{number}: {:?}", scene.files());
    }
}

#[test]
fn a_socket_left_by_a_killed_host_is_replaced_and_a_live_one_is_not() {
    if !kvm("a_socket_left_by_a_killed_host_is_replaced_and_a_live_one_is_not") {
        return;
    }
    let scene = Scene::new();
    let first = scene.start(&vm("mode=hang", "", NO_WAIT));
    first.until("a socket", || scene.path("ttya").exists());
    let mut client = scene.connect("ttya");
    read_until(&mut client, "hanging");
    scene
        .run(&vm("mode=poweroff", "", NO_WAIT))
        .exited(1)
        .logged("another process listens on ./ttya");
    first.signal(Signal::KILL);
    drop(first);
    assert_eq!(scene.files(), ["ttya"]);
    let _ran = scene.run(&vm("mode=poweroff", "", NO_WAIT)).exited(0);
    assert!(scene.files().is_empty(), "{:?}", scene.files());
}

#[test]
fn a_late_client_gets_earlier_output_and_can_type() {
    if !kvm("a_late_client_gets_earlier_output_and_can_type") {
        return;
    }
    let scene = Scene::new();
    let running = scene.start(&vm("mode=echo", "", NO_WAIT));
    running.until("a socket", || scene.path("ttya").exists());
    let mut first = scene.connect("ttya");
    read_until(&mut first, "ready");
    drop(first);
    let mut late = scene.connect("ttya");
    let text = read_until(&mut late, "ready");
    assert!(text.contains("vmm-selftest"), "{text}");
    let mut other = scene.connect("ttya");
    late.write_all(b"all of you\n").unwrap();
    read_until(&mut other, "echo all of you");
    read_until(&mut late, "echo all of you");
    other.write_all(b"quit\n").unwrap();
    let mut rest = String::new();
    late.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("bye"), "{rest}");
    running.wait().exited(0);
}

/// How much to paste: 256 KiB, unless this machine's hypervisor takes so long for an exit that this would take minutes. In a nested
/// one that interprets the guest, an exit costs 70000 cycles instead of 2000.
fn paste_bytes(scene: &Scene) -> u32 {
    let ran = scene
        .run(&vm("mode=bench-exits count=500", "", STDIO))
        .exited(0);
    let (_, rest) = ran.out.split_once("no device: ").expect("a figure");
    let cycles: u64 = rest.split(' ').next().unwrap().parse().unwrap();
    let bytes = if cycles > 20_000 { 12 << 10 } else { 256 << 10 };
    println!("{cycles} cycles for an exit: a paste of {bytes} bytes");
    bytes
}

#[test]
fn a_large_paste_arrives_whole() {
    if !kvm("a_large_paste_arrives_whole") {
        return;
    }
    let scene = Scene::new();
    let paste: Vec<u8> = (0..paste_bytes(&scene))
        .map(|i| 32 + ((i * 7 + i / 95) % 95) as u8)
        .collect();
    let sum = paste
        .iter()
        .fold(0u32, |sum, &byte| sum.rotate_left(1) ^ u32::from(byte));
    let running = scene.start(&vm("mode=sum-input", "", ""));
    running.expect_log("the guest starts after");
    let mut client = scene.connect("ttya");
    // Before this the guest empties the receiver, as drivers do when they set a port up.
    read_until(&mut client, "ready");
    // The client has to wait for the guest, however small the paste is.
    rustix::net::sockopt::set_socket_send_buffer_size(&client, 4096).unwrap();
    client.write_all(&paste).unwrap();
    client.write_all(&[4]).unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    let expected = format!("received {} bytes, sum {sum:#010x}", paste.len());
    assert!(text.contains(&expected), "no {expected}: {text}");
    running.wait().exited(0);
}

#[test]
fn standard_input_and_output_may_be_pipes() {
    if !kvm("standard_input_and_output_may_be_pipes") {
        return;
    }
    let scene = Scene::new();
    let mut running = scene.start(&vm("mode=echo", "", STDIO));
    running.expect("ready");
    // Nothing is special on a pipe, not the escape key either.
    running.write(b"through\x01x a pipe\nquit\n");
    running.end_input();
    running
        .wait()
        .exited(0)
        .said("echo through\u{1}x a pipe")
        .said("bye");
}

#[test]
fn the_end_of_input_is_not_the_end_of_the_guest() {
    if !kvm("the_end_of_input_is_not_the_end_of_the_guest") {
        return;
    }
    let scene = Scene::new();
    let mut running = scene.start(&vm("mode=flood bytes=100000", "", STDIO));
    running.end_input();
    let ran = running.wait().exited(0).said("end after 1852 lines");
    for line in [0, 1, 999, 1851] {
        assert!(ran.out.contains(&format!("line {line:010} abc")), "{line}");
    }
}

#[test]
fn a_pty_is_a_console() {
    if !kvm("a_pty_is_a_console") {
        return;
    }
    let scene = Scene::new();
    let pty = "[char_dev.ttya]\ntype = \"pty\"\nlink = \"console\"\n";
    let running = scene.start(&vm("mode=echo", "", pty));
    running.expect_log("the console is on /dev/");
    let mut terminal = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(scene.path("console"))
        .unwrap();
    let text = read_until(&mut terminal, "ready");
    assert!(text.contains("vmm-selftest"), "{text}");
    terminal.write_all(b"typed\n").unwrap();
    read_until(&mut terminal, "echo typed");
    // What is said after this may be lost with the terminal.
    terminal.write_all(b"quit\n").unwrap();
    drop(terminal);
    running.wait().exited(0);
    assert!(scene.files().is_empty(), "{:?}", scene.files());
}

#[test]
fn a_file_gets_the_output() {
    if !kvm("a_file_gets_the_output") {
        return;
    }
    let scene = Scene::new();
    let file = "[char_dev.ttya]\ntype = \"file\"\npath = \"log\"\nappend = true\n";
    scene.write("log", "before\n");
    for _ in 0..2 {
        let _ran = scene.run(&vm("mode=poweroff", "", file)).exited(0);
    }
    let log = std::fs::read_to_string(scene.path("log")).unwrap();
    assert!(log.starts_with("before\n"), "{log}");
    assert_eq!(log.matches("vmm-selftest").count(), 2, "{log}");
}

/// `vmm-host vm.toml | head -1`
#[test]
fn output_that_nobody_reads_ends_nothing() {
    if !kvm("output_that_nobody_reads_ends_nothing") {
        return;
    }
    let scene = Scene::new();
    let flood = "mode=flood bytes=100000";
    scene
        .start_with(host_by("\"$@\" | head -c 10"), &vm(flood, "", STDIO), &[])
        .wait()
        .exited(0)
        .logged("the guest has turned its power off");
    // A client that never reads.
    let running = scene.start(&vm(flood, "", ""));
    running.expect_log("the guest starts after");
    let client = scene.connect("ttya");
    running.wait().exited(0);
    drop(client);
}

/// A terminal of our own: the side that a person is at, and the name of the other.
fn terminal() -> (std::fs::File, PathBuf) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    (master.into(), name.into_string().unwrap().into())
}

#[test]
fn a_terminal_is_restored_however_the_vm_ends() {
    if !kvm("a_terminal_is_restored_however_the_vm_ends") {
        return;
    }
    let scene = Scene::new();
    let (mut person, name) = terminal();
    // Held open, or the settings would go with the host.
    let slave = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&name)
        .unwrap();
    let settings = || {
        let modes = tcgetattr(&slave).unwrap();
        (modes.input_modes, modes.output_modes, modes.local_modes)
    };
    let before = settings();
    let script = format!("exec \"$@\" <{0} >{0}", name.display());
    for (cmdline, typed, code) in [
        ("mode=echo", "over the\x01\x01terminal\rquit\r", 0),
        ("mode=echo", "\x01x", 0),
        ("mode=bad-jump", "", 1),
        ("mode=hang", "", 0),
    ] {
        let running = scene.start_with(host_by(&script), &vm(cmdline, "", STDIO), &[]);
        let said = read_until(&mut person, if typed.is_empty() { "ing" } else { "ready" });
        assert!(said.contains("vmm-selftest"), "{said}");
        if code == 0 {
            assert_ne!(settings(), before, "{cmdline}: raw");
        }
        person.write_all(typed.as_bytes()).unwrap();
        if cmdline == "mode=hang" {
            running.signal(Signal::INT);
        }
        let _ran = running.wait().exited(code);
        assert_eq!(settings(), before, "{cmdline} {typed:?}");
        if typed.contains("over") {
            let said = read_until(&mut person, "bye");
            assert!(said.contains("echo over the\x01terminal"), "{said}");
        }
    }
}

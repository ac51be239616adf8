//! What qemu-nbd serves of an image that this plugin has written, and what the plugin finds after a client of it has written.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use support::{MIB, Random, Setup, exercise};

/// A server of one image; `None`, and it is said so, if there is no qemu-nbd.
fn serve(setup: &Setup, socket: &str) -> Option<Child> {
    let started = Command::new("qemu-nbd")
        .args(["--persistent", "-f", "qcow2", "-k", socket])
        .arg(setup.path("disk.qcow2"))
        .spawn();
    let Ok(mut server) = started else {
        println!("SKIPPED: qcow2 images over NBD: no qemu-nbd on this machine");
        return None;
    };
    let start = Instant::now();
    while !std::fs::exists(socket).unwrap() {
        if let Some(status) = server.try_wait().unwrap() {
            panic!("qemu-nbd: {status}");
        }
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "qemu-nbd is mute"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Some(server)
}

#[test]
fn images_go_to_qemu_nbd_and_back() {
    let Some(setup) = Setup::new() else { return };
    // A socket's path has 108 bytes at most, and the build's folder may have more.
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd");
    let socket = socket.to_str().unwrap();
    let url = format!("nbd+unix:///?socket={socket}");
    setup.create("disk.qcow2", &["-o", "cluster_size=65536"], "6M");
    let (mut model, mut random) = (vec![0; 6 * MIB as usize], Random(80));
    for fill in [0x44, 0x55] {
        let mut disk = setup.open("disk.qcow2", &[]);
        assert!(disk.contents() == model, "what a client has written");
        exercise(&mut disk, &mut model, &mut random, 100);
        drop(disk);
        let Some(mut server) = serve(&setup, socket) else {
            return;
        };
        std::fs::write(setup.path("expected.raw"), &model).unwrap();
        let compared = setup.run(
            "qemu-img",
            &["compare", "-f", "raw", "-F", "raw", &url, "expected.raw"],
        );
        let write = format!("write -P {fill:#x} 3M 100k");
        let commands = ["-f", "raw", "-c", &write, "-c", "flush", &url];
        let written = setup.run("qemu-io", &commands);
        let (ended, said) = setup.run("kill", &[&server.id().to_string()]);
        assert_eq!(ended, 0, "{said}");
        server.wait().unwrap();
        assert_eq!(compared.0, 0, "qemu-img: {}", compared.1);
        let good = written.0 == 0 && !written.1.contains("failed");
        assert!(good, "qemu-io: {}", written.1);
        model[3 * MIB as usize..][..100 << 10].fill(fill);
        setup.check("disk.qcow2");
    }
}

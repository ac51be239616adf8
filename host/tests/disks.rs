//! Disks in files: who may use them, what is refused, and that nothing is lost or pretended when writing fails.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod run;

use std::os::unix::fs::{FileExt, PermissionsExt};

use run::{Scene, disk, host, host_by, host_by_mounting, kvm, vm};
use rustix::process::{Signal, geteuid};

const FILE: &str = "type = \"file\"\npath = \"disk.img\"";
const SHARED: &str = "type = \"file\"\npath = \"disk.img\"\nread_only = true";

#[test]
fn two_vms_cannot_write_to_one_image() {
    if !kvm("two_vms_cannot_write_to_one_image") {
        return;
    }
    let scene = Scene::new();
    scene.image("disk.img", 1 << 20);
    let first = scene.start(&vm("mode=hang", "", &disk(FILE)));
    first.expect("hanging");
    for backend in [FILE, SHARED] {
        scene
            .run(&vm("mode=poweroff", "", &disk(backend)))
            .exited(1)
            .logged("block_dev.disk")
            .logged("disk.img")
            .logged("another");
    }
    first.signal(Signal::TERM);
    first.wait().exited(0);
    // The lock has ended with its holder.
    let _ran = scene.run(&vm("mode=poweroff", "", &disk(FILE))).exited(0);
}

#[test]
fn readers_share_an_image_and_keep_writers_out() {
    if !kvm("readers_share_an_image_and_keep_writers_out") {
        return;
    }
    let scene = Scene::new();
    scene.image("disk.img", 1 << 20);
    let first = scene.start(&vm("mode=hang", "", &disk(SHARED)));
    first.expect("hanging");
    let ran = scene
        .run(&vm("checks=pci,block", "exit_on_reboot = 1", &disk(SHARED)))
        .exited(0)
        .said("PASS");
    assert!(ran.out.contains("read-only"), "{ran}");
    scene
        .run(&vm("mode=poweroff", "", &disk(FILE)))
        .exited(1)
        .logged("disk.img");
    first.signal(Signal::TERM);
    first.wait().exited(0);
}

#[test]
fn the_self_test_passes_on_a_file() {
    if !kvm("the_self_test_passes_on_a_file") {
        return;
    }
    let scene = Scene::new();
    scene.image("disk.img", 16 << 20);
    for more in ["", "\ndirect = true"] {
        let backend = disk(&format!("{FILE}{more}"));
        let ran = scene.run(&vm("checks=block", "exit_on_reboot = 1", &backend));
        if ran.err.contains("direct I/O") {
            println!("SKIPPED: the_self_test_passes_on_a_file: direct: not here in blocks of 512");
            continue;
        }
        let ran = ran.exited(0).said("PASS");
        assert!(!ran.out.contains("FAIL"), "{more}: {ran}");
    }
    let mut image = vec![0; 512];
    let file = std::fs::File::open(scene.path("disk.img")).unwrap();
    file.read_exact_at(&mut image, 0).unwrap();
    assert!(image.iter().any(|&byte| byte != 0), "the guest's mark");
}

#[test]
fn the_self_test_passes_on_a_volume_for_cloud_init() {
    if !kvm("the_self_test_passes_on_a_volume_for_cloud_init") {
        return;
    }
    let scene = Scene::new();
    scene.write("user-data", vec![b'\xff'; 10_000_000]);
    let backend = disk("type = \"cloudinit\"");
    let seed = "[cloudinit]\nuser-data-path = \"user-data\"\n";
    let file = vm(
        "checks=pci,block",
        "exit_on_reboot = 1",
        &format!("{backend}{seed}"),
    );
    let ran = scene.run(&file).exited(0).said("PASS");
    assert!(ran.out.contains("read-only"), "{ran}");
    std::fs::remove_file(scene.path("user-data")).unwrap();
    scene
        .run(&file)
        .exited(3)
        .logged("`user-data-path` in [cloudinit]: user-data can't be read: No such file");
}

#[test]
fn images_that_cannot_be_used_are_named() {
    if !kvm("images_that_cannot_be_used_are_named") {
        return;
    }
    let scene = Scene::new();
    let run = || scene.run(&vm("mode=poweroff", "", &disk(FILE))).exited(1);
    run()
        .logged("block_dev.disk")
        .logged("disk.img")
        .logged("No such file or directory");
    scene.image("disk.img", 1000);
    run()
        .logged("disk.img` has 1000 bytes, 488 more than a multiple")
        .logged("truncate -s 1024");
    scene.image("disk.img", 0);
    run().logged("disk.img");
    std::fs::remove_file(scene.path("disk.img")).unwrap();
    std::fs::create_dir(scene.path("disk.img")).unwrap();
    run().logged("disk.img").logged("directory");
}

#[test]
fn a_file_that_may_only_be_read_is_refused_unless_read_only() {
    const NAME: &str = "a_file_that_may_only_be_read_is_refused_unless_read_only";
    if !kvm(NAME) {
        return;
    }
    let scene = Scene::new();
    scene.image("disk.img", 1 << 20);
    let read_only = std::fs::Permissions::from_mode(0o444);
    std::fs::set_permissions(scene.path("disk.img"), read_only).unwrap();
    // Root may write to it all the same, but not to what is mounted for reading.
    let script = if geteuid().is_root() {
        "mount --bind disk.img disk.img && mount -o remount,ro,bind disk.img && exec \"$@\""
    } else {
        "exec \"$@\""
    };
    let run = |backend: &str| {
        let command = if geteuid().is_root() {
            host_by_mounting(NAME, script)?
        } else {
            host_by(script)
        };
        let vm = vm("mode=poweroff", "", &disk(backend));
        Some(scene.start_with(command, &vm, &[]).wait())
    };
    let (Some(refused), Some(taken)) = (run(FILE), run(SHARED)) else {
        return;
    };
    refused
        .exited(1)
        .logged("disk.img")
        .logged("read_only = true");
    taken.exited(0);
}

/// What the guest of mode=fill says in the end: pieces of 64 KiB written, errors.
fn filled(out: &str) -> (u64, u64) {
    let (_, rest) = out.split_once("fill: ").expect("the guest's result");
    let mut numbers = rest
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|word| word.parse().ok());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// A filesystem without room is the guest's I/O error, and nobody's end.
#[test]
fn a_full_filesystem_is_an_io_error_in_the_guest() {
    const NAME: &str = "a_full_filesystem_is_an_io_error_in_the_guest";
    if !kvm(NAME) {
        return;
    }
    let scene = Scene::new();
    std::fs::create_dir(scene.path("small")).unwrap();
    let script =
        "mount -t tmpfs -o size=1M none small && truncate -s 4M small/disk.img && exec \"$@\"";
    let Some(command) = host_by_mounting(NAME, script) else {
        return;
    };
    let rest = disk("type = \"file\"\npath = \"small/disk.img\"");
    let ran = scene
        .start_with(command, &vm("mode=fill", "exit_on_halt = 6", &rest), &[])
        .wait()
        .exited(6);
    let (written, errors) = filled(&ran.out);
    assert_eq!(written + errors, 64, "{ran}");
    assert!(written <= 16 && errors >= 48, "{ran}");
}

/// As above where the limit is the process's, which io_uring and a signal come to know in their own ways.
#[test]
fn a_file_size_limit_is_an_io_error_in_the_guest() {
    if !kvm("a_file_size_limit_is_an_io_error_in_the_guest") {
        return;
    }
    let scene = Scene::new();
    scene.image("disk.img", 20 << 20);
    // In units of 512 bytes: 17 MiB, since the guest's memory is a file too.
    let command = host_by("ulimit -f 34816 && exec \"$@\"");
    let vm = vm("mode=fill", "memory = 16\nexit_on_halt = 6", &disk(FILE));
    let ran = scene.start_with(command, &vm, &[]).wait().exited(6);
    assert_eq!(filled(&ran.out), (17 * 16, 3 * 16), "{ran}");
}

/// The image is emptied under a guest: that has I/O errors and lives, and the log names the image.
#[test]
fn an_image_that_is_cut_short_is_an_io_error_in_the_guest() {
    if !kvm("an_image_that_is_cut_short_is_an_io_error_in_the_guest") {
        return;
    }
    let scene = Scene::new();
    for more in ["", "\ndirect = true"] {
        scene.image("disk.img", 1 << 20);
        let vm = vm("mode=watch", "", &disk(&format!("{FILE}{more}")));
        let running = scene.start(&vm);
        running.until("the guest's disk or its refusal", || {
            let err = running.log();
            running.said("watching") || err.contains("direct I/O")
        });
        if running.log().contains("direct I/O") {
            println!("SKIPPED: direct: not here in blocks of 512");
            continue;
        }
        scene.image("disk.img", 0);
        running
            .wait()
            .exited(0)
            .said("watch: a read failed, then a flush failed")
            .logged("disk.img` has been cut to 0 bytes under the VM, whose disk has 1048576");
    }
}

/// A deleted image works to the end, and the end tells.
#[test]
fn an_image_that_is_deleted_is_told_of_at_the_end() {
    if !kvm("an_image_that_is_deleted_is_told_of_at_the_end") {
        return;
    }
    let scene = Scene::new();
    scene.image("disk.img", 1 << 20);
    let running = scene.start(&vm("mode=watch", "", &disk(FILE)));
    running.expect("watching");
    std::fs::remove_file(scene.path("disk.img")).unwrap();
    running.signal(Signal::TERM);
    let ran = running.wait().exited(0).logged(
        "disk.img` was deleted while it was in use: what the guest has written is gone with it",
    );
    assert!(!ran.out.contains("failed"), "{ran}");
}

/// The number in a line "durable NUMBER" of mode=journal.
fn last_durable(out: &str) -> u64 {
    let complete = &out[..out.rfind('\n').unwrap_or(0)];
    let line = complete.lines().rfind(|line| line.starts_with("durable "));
    line.expect("a durable write")["durable ".len()..]
        .trim()
        .parse()
        .unwrap()
}

#[test]
fn what_was_flushed_survives_a_killed_host() {
    if !kvm("what_was_flushed_survives_a_killed_host") {
        return;
    }
    const SECTORS: u64 = 256;
    let scene = Scene::new();
    scene.image("disk.img", SECTORS * 512);
    for least in [1, 40, 300] {
        let running = scene.start(&vm("mode=journal", "", &disk(FILE)));
        running.expect(&format!("durable {least}\r\n"));
        running.signal(Signal::KILL);
        let out = running.wait().out;
        let last = last_durable(&out);
        assert!(last >= least);
        let image = std::fs::read(scene.path("disk.img")).unwrap();
        assert_eq!(image.len() as u64, SECTORS * 512);
        for number in last.saturating_sub(SECTORS - 1).max(1)..=last {
            let at = (number % SECTORS * 512) as usize;
            let found = u64::from_le_bytes(image[at..at + 8].try_into().unwrap());
            // The write after the last one reported may have begun.
            let ahead = found == number + SECTORS && found <= last + 1;
            assert!(
                found == number || ahead,
                "{found} instead of {number} of {last}"
            );
        }
    }
}

#[test]
fn disks_that_have_grown_are_found_on_sigwinch() {
    if !kvm("disks_that_have_grown_are_found_on_sigwinch") {
        return;
    }
    const ABOVE: &str = "
[dev.block1]
driver = \"pci-virtio-block\"
pci-path = \"0.9.0\"
block_dev = \"above\"
[block_dev.above]
type = \"overlay\"
path = \"above.overlay\"
backing = \"base\"
[block_dev.base]
type = \"file\"
path = \"base.img\"
read_only = true
";
    let scene = Scene::new();
    scene.image("disk.img", 1 << 20);
    scene.image("base.img", 1 << 20);
    let vm = vm("mode=hang", "", &(disk(FILE) + ABOVE));
    let running = scene.start_with(host(), &vm, &["--log-level", "debug"]);
    running.expect("hanging");
    running.signal(Signal::WINCH);
    running.expect_log("no disk has grown");
    scene.image("disk.img", 2 << 20);
    scene.image("base.img", 3 << 20);
    running.signal(Signal::WINCH);
    running.expect_log("block_dev.disk has grown from 1048576 to 2097152 bytes");
    running.expect_log("block_dev.base has grown from 1048576 to 3145728 bytes");
    running.expect_log("block_dev.above keeps its size, although what it stands on has grown");
    scene.image("disk.img", 1 << 20);
    running.signal(Signal::WINCH);
    running.expect_log("block_dev.disk keeps its size");
    running.signal(Signal::TERM);
    running
        .wait()
        .exited(0)
        .logged("disk.img` has been cut to 1048576 bytes under the VM, whose disk has 2097152");
}

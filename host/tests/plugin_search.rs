//! What is found where, and what is said about files and directories that are no good.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod fixture;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use fixture::{Ran, Scene, plugin, shared_object};

const VM: &str = r#"
[main]
name = "vm"
cpus = 1
memory = 64
kernel = "builtin:selftest"
profile = "none"

[dev.thing]
driver = "thing"
"#;

/// The manifest of a plugin with one driver on no bus.
fn manifest(name: &str, driver: &str) -> String {
    format!(
        "abi = \"1.0\"\nname = \"{name}\"\nversion = \"1.2.3\"\n[[driver]]\nname = \"{driver}\"\nbus = \"isa\"\n"
    )
}

fn scene_with(file: &str, contents: impl AsRef<[u8]>) -> Scene {
    let scene = Scene::new();
    scene.write("vm.toml", VM);
    scene.write(file, contents);
    scene
}

fn check(scene: &Scene) -> Ran {
    scene.run(&["check", "vm.toml", "--plugin-path", "plugins"])
}

/// Asserts that the file is skipped for this reason, both by `check` and by `plugins`.
fn skipped(contents: impl AsRef<[u8]>, reason: &str) {
    let scene = scene_with("plugins/libx.so", contents);
    let expected = format!("plugins/libx.so: {reason}");
    let ran = check(&scene);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert!(
        ran.stderr
            .contains("no plugin provides the driver \"thing\""),
        "{}",
        ran.stderr
    );
    assert!(
        ran.stderr.contains(&format!("skipped {expected}")),
        "{expected}\n{}",
        ran.stderr
    );
    let ran = scene.run(&["plugins", "--plugin-path", "plugins"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(
        ran.stdout.contains(&format!("Skipped:\n  {expected}")),
        "{}",
        ran.stdout
    );
}

#[test]
fn a_missing_plugin_is_named_with_where_it_was_looked_for() {
    let scene = scene_with("plugins/readme.txt", "");
    let ran = check(&scene);
    assert_eq!(ran.code, Some(3));
    assert_eq!(
        ran.stderr,
        "vm.toml:10:10: error: no plugin provides the driver \"thing\"\n\
         \u{20}  10 | driver = \"thing\"\n\
         \u{20}     |          ^^^^^^^\n\n\
         searched plugins (--plugin-path): nothing\n\
         searched DIR/bin (beside the binary): nothing\n\
         no plugin was found at all: name their directory with --plugin-path\n\n\
         vm.toml: 1 error\n"
    );
}

#[test]
fn files_that_are_no_plugin_are_skipped_with_the_reason() {
    let good = plugin(&manifest("x", "thing"));
    let patched = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    skipped("", "not an ELF shared library");
    skipped("#!/bin/sh\nexit 1\n", "not an ELF shared library");
    skipped(b"\x7fELF", "truncated: the file ends before");
    skipped(&good[..good.len() / 2], "truncated: the file ends before");
    skipped(&good[..good.len() - 1], "truncated: the file ends before");
    skipped(
        patched(4, &[1]),
        "built for a 32-bit processor, this host runs on x86_64",
    );
    skipped(
        patched(18, &[183, 0]),
        "built for aarch64, this host runs on x86_64",
    );
    skipped(patched(16, &[1, 0]), "an ELF file, but no shared library");
    skipped(
        shared_object(".data", "x"),
        "not a vmm-host plugin (no .vmm.plugin section)",
    );
    skipped(
        plugin("abi = \"1.0\"\nname = 5\n"),
        "its manifest is malformed, line 2: `name` in [manifest]: expected a string, found the integer 5",
    );
    skipped(
        plugin("abi = \"2.0\"\n"),
        "built for plugin ABI 2.0, this host has ABI 1.0: it needs a newer vmm-host",
    );
    skipped(
        plugin("abi = \"0.4\"\n"),
        "built for plugin ABI 0.4, this host has ABI 1.0: build it against a newer vmm-plugin-api",
    );
}

#[test]
fn a_systems_own_library_is_no_plugin() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let libc = maps
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .find(|path| path.contains("/libc.so") || path.contains("/libc-"));
    let Some(libc) = libc else {
        println!("SKIPPED: a_systems_own_library_is_no_plugin: no libc.so is mapped here");
        return;
    };
    skipped(
        std::fs::read(libc).unwrap(),
        "not a vmm-host plugin (no .vmm.plugin section)",
    );
}

#[test]
fn every_truncation_and_many_damages_of_a_plugin_are_survived() {
    let good = plugin(&manifest("x", "thing"));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("x.so");
    let read = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        vmm_host::plugins::manifest::Manifest::read(&file)
    };
    assert!(read(&good).is_ok());
    for end in 0..good.len() {
        assert!(read(&good[..end]).is_err(), "cut at {end}");
    }
    for at in 0..good.len() {
        let mut damaged = good.clone();
        damaged[at] ^= 0xff;
        // Some bytes don't matter, such as those of the entry point. All that counts is that this returns.
        let _ = read(&damaged);
    }
}

#[test]
fn a_fifo_does_not_hold_up_the_search() {
    let scene = scene_with("plugins/libx.so", plugin(&manifest("x", "thing")));
    let fifo = scene.path("plugins/liba.so");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    if !made.is_ok_and(|status| status.success()) {
        println!("SKIPPED: a_fifo_does_not_hold_up_the_search: mkfifo failed");
        return;
    }
    let mut child = scene
        .host()
        .args(["check", "vm.toml", "--plugin-path", "plugins"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let limit = Instant::now() + Duration::from_secs(20);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > limit {
            child.kill().unwrap();
            panic!("the host waits for the other end of a FIFO");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(status.code(), Some(0));
}

#[test]
fn two_plugins_of_one_directory_with_one_driver_are_refused() {
    let scene = scene_with("plugins/liba.so", plugin(&manifest("a", "thing")));
    scene.write("plugins/libb.so", plugin(&manifest("b", "thing")));
    let ran = check(&scene);
    assert_eq!(ran.code, Some(3));
    for expected in [
        "error: driver \"thing\" is claimed by two plugins in one directory",
        "claimed by plugins/liba.so",
        "claimed by plugins/libb.so",
    ] {
        assert!(ran.stderr.contains(expected), "{}", ran.stderr);
    }
    let ran = scene.run(&["plugins", "--plugin-path", "plugins"]);
    assert!(
        ran.stdout.contains("driver thing: plugins/libb.so"),
        "{}",
        ran.stdout
    );
}

#[test]
fn the_earlier_directory_decides_between_two_plugins() {
    let scene = scene_with("one/liba.so", plugin(&manifest("a", "thing")));
    scene.write("two/libb.so", plugin(&manifest("b", "thing")));
    for (first, second) in [
        ("one/liba.so", "two/libb.so"),
        ("two/libb.so", "one/liba.so"),
    ] {
        let directory = |file: &str| file[..3].to_string();
        let ran = scene.run(&[
            "check",
            "vm.toml",
            "--plugin-path",
            &directory(first),
            "--plugin-path",
            &directory(second),
        ]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let logged =
            format!("info: driver thing comes from {first}, which is searched before {second}");
        assert!(ran.stderr.contains(&logged), "{}", ran.stderr);
    }
}

#[test]
fn the_search_path_is_flag_variable_file_binary_library() {
    let scene = Scene::new();
    let vm = format!("{VM}\n[plugins]\npath = \"in-file\"\n");
    scene.write("sub/vm.toml", vm);
    let places = [
        "flag/libf.so",
        "variable/libv.so",
        "sub/in-file/libi.so",
        "bin/libb.so",
        "lib/vmm-host/plugins/libl.so",
    ];
    for place in places {
        scene.write(place, plugin(&manifest("x", "thing")));
    }
    // Each in turn is the first, once those before it are gone.
    for (index, place) in places.iter().enumerate() {
        let output = scene
            .host()
            .args(["check", "sub/vm.toml", "--plugin-path", "flag"])
            .env("VMM_PLUGIN_PATH", ":variable:")
            .output()
            .unwrap();
        let ran = scene.ran(output);
        assert_eq!(ran.code, Some(0), "{place}: {ran:?}");
        if index + 1 < places.len() {
            let file = ran.stderr.lines().next().unwrap_or_default().to_string();
            assert!(
                file.contains(&format!("{place}, which is searched before")),
                "{}",
                ran.stderr
            );
        }
        std::fs::remove_file(scene.path(place)).unwrap();
    }
    assert_eq!(check_code(&scene), Some(3));
}

fn check_code(scene: &Scene) -> Option<i32> {
    let output = scene
        .host()
        .args(["check", "sub/vm.toml", "--plugin-path", "flag"])
        .output()
        .unwrap();
    output.status.code()
}

#[test]
fn one_file_by_two_paths_is_one_plugin() {
    let scene = scene_with("plugins/liba.so", plugin(&manifest("a", "thing")));
    std::os::unix::fs::symlink("liba.so", scene.path("plugins/libb.so")).unwrap();
    std::fs::hard_link(scene.path("plugins/liba.so"), scene.path("plugins/libc.so")).unwrap();
    std::os::unix::fs::symlink("plugins", scene.path("again")).unwrap();
    // What is below a directory is not searched.
    scene.write("plugins/deps/libd.so", plugin(&manifest("d", "thing")));
    let ran = scene.run(&[
        "check",
        "vm.toml",
        "--plugin-path",
        "plugins",
        "--plugin-path",
        "again",
    ]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
}

#[test]
fn a_named_directory_that_cannot_be_searched_is_an_error() {
    let scene = scene_with("plugins/libx.so", plugin(&manifest("x", "thing")));
    for (path, why) in [
        ("absent", "No such file or directory"),
        ("vm.toml", "Not a directory"),
    ] {
        for command in [["check", "vm.toml"].as_slice(), &["plugins"]] {
            let ran = scene.run(
                &[
                    command,
                    &["--plugin-path", "plugins", "--plugin-path", path],
                ]
                .concat(),
            );
            assert_ne!(ran.code, Some(0), "{ran:?}");
            let expected =
                format!("error: plugin directory {path} (--plugin-path) can't be searched: {why}");
            assert!(ran.stderr.contains(&expected), "{}", ran.stderr);
        }
    }
}

#[test]
fn a_directory_without_permission_is_an_error() {
    let name = "a_directory_without_permission_is_an_error";
    let scene = scene_with("locked/libx.so", plugin(&manifest("x", "thing")));
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(&scene.path("locked"), 0o000);
    let arguments = ["plugins", "--plugin-path", "locked"];
    let output = if std::fs::read_dir(scene.path("locked")).is_err() {
        scene.host().args(arguments).output().unwrap()
    } else {
        // A privileged user may read everything: run the host as somebody else.
        mode(&scene.path(""), 0o755);
        let mut command = scene.command(Path::new("setpriv"));
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(scene.path("bin/vmm-host"))
            .args(arguments);
        match command.output() {
            Ok(output) if output.status.code() != Some(127) => output,
            _ => {
                println!(
                    "SKIPPED: {name}: runs as root and there is no setpriv to be somebody else"
                );
                return;
            }
        }
    };
    mode(&scene.path("locked"), 0o755);
    let ran = scene.ran(output);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains(
            "error: plugin directory locked (--plugin-path) can't be searched: Permission denied"
        ),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_plugin_can_be_described_by_any_of_its_names() {
    let scene = scene_with("plugins/libx.so", plugin(&manifest("x", "thing")));
    for name in ["x", "thing"] {
        let ran = scene.run(&["plugins", name, "--plugin-path", "plugins"]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(
            ran.stdout
                .starts_with("Plugin x 1.2.3, ABI 1.0\n  plugins/libx.so\n"),
            "{}",
            ran.stdout
        );
        assert!(
            ran.stdout.contains("driver = \"thing\"  in [dev.NAME]"),
            "{}",
            ran.stdout
        );
    }
    let ran = scene.run(&["plugins", "thimg", "--plugin-path", "plugins"]);
    assert_eq!(ran.code, Some(1));
    assert!(
        ran.stderr
            .contains("is called \"thimg\"; did you mean `thing`?"),
        "{}",
        ran.stderr
    );
}

/// As for any other command: options mean the same on both sides of it.
#[test]
fn options_may_stand_before_the_command() {
    let scene = scene_with("plugins/libx.so", plugin(&manifest("x", "thing")));
    let before = scene.run(&["--plugin-path", "plugins", "plugins", "thing"]);
    assert_eq!(before.code, Some(0), "{before:?}");
    let after = scene.run(&["plugins", "thing", "--plugin-path", "plugins"]);
    assert_eq!(before.stdout, after.stdout);
    let both = scene.run(&["vm.toml", "check", "vm.toml"]);
    assert_eq!(both.code, Some(2), "{both:?}");
    assert!(
        both.stderr.contains("a VM file to run and a command"),
        "{}",
        both.stderr
    );
}

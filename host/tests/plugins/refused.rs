//! Files that are no plugins of this host, each with its own reason.

use std::path::Path;

use tempfile::TempDir;
use vmm_host::plugins::manifest::{Manifest, ManifestError};
use vmm_host::plugins::section::SectionError;

use crate::objects::{Stage, built, compile, workspace};
use crate::vm;

/// Builds the plugin that is wrong in this way.
fn wrong(dir: &Path, defines: &[&str]) -> std::path::PathBuf {
    let out = dir.join("libwrong.so");
    compile(&workspace("host/tests/plugins/refused.c"), defines, &out);
    out
}

/// What the host says of the plugin with these defines, without the part that all have in common.
fn refusal(defines: &[&str]) -> String {
    let dir = TempDir::new().unwrap();
    let path = wrong(dir.path(), defines);
    let error = Stage::new().device(&path, &[]).err().unwrap();
    let text = format!("{error:#}");
    let common = format!("plugin {} can't be loaded: ", path.display());
    text.strip_prefix(&common)
        .map_or(text.clone(), ToOwned::to_owned)
}

#[test]
fn each_wrong_root_has_its_own_message() {
    for (defines, expected) in [
        (
            "-DNO_ROOT",
            "it exports no VMM_PLUGIN: it is not a vmm-host plugin",
        ),
        (
            "-DMAGIC=\"VMMPLUS\"",
            "its root does not start with the plugin magic: it is not a vmm-host plugin",
        ),
        (
            "-DMAJOR=2",
            "it is built for plugin ABI 2.0, this host speaks 1.0: install a build for this host",
        ),
        (
            "-DROOT_NAME=\"other\"",
            "its manifest is not the text in its section .vmm.plugin: build it again; if it was replaced meanwhile, run again",
        ),
        (
            "-DNO_MANIFEST",
            "its root carries no manifest: it has to be the text that the file's section holds",
        ),
        (
            "-DINIT_CODE=-ENOMEM",
            "its init fails: Cannot allocate memory (os error 12)",
        ),
        (
            "-DCREATE_CODE=-ENODEV",
            "create: No such device (os error 19)",
        ),
        (
            "-DCREATE_CODE=0",
            "create: the plugin created an object without a base table",
        ),
    ] {
        assert_eq!(refusal(&[defines]), expected, "{defines}");
    }
}

/// All of a plugin's symbols are resolved when it is loaded, not when a guest happens to reach one.
#[test]
fn a_plugin_that_needs_an_unknown_symbol_is_refused_at_once() {
    let text = refusal(&["-DMISSING_SYMBOL"]);
    assert!(text.contains("undefined symbol: nobody_has_this"), "{text}");
}

/// The constructor of this file would end the test.
#[test]
fn a_plugin_of_another_abi_is_refused_without_being_loaded() {
    let dir = TempDir::new().unwrap();
    for (abi, remedy) in [
        ("2.0", "it needs a newer vmm-host"),
        ("0.9", "build it against a newer vmm-plugin-api"),
    ] {
        let define = format!("-DABI=\"{abi}\"");
        let path = wrong(dir.path(), &[&define, "-DABORTS_ON_LOAD"]);
        let error = Manifest::read(&path).unwrap_err();
        let expected = format!("built for plugin ABI {abi}, this host has ABI 1.0: {remedy}");
        assert_eq!(error.to_string(), expected);
    }
}

/// To inspect a plugin of our ABI is not to load it either.
#[test]
fn commands_that_list_and_check_load_nothing() {
    let scene = vm::scene(&[]);
    let define = ["-DABORTS_ON_LOAD"];
    compile(
        &workspace("host/tests/plugins/refused.c"),
        &define,
        &scene.path("plugins/libwrong.so"),
    );
    scene.write(
        "vm.toml",
        "[main]\nname = \"t\"\ncpus = 1\nmemory = 64\nkernel = \"builtin:selftest\"\nprofile = \"none\"\n[dev.x]\ndriver = \"refused\"\n",
    );
    for arguments in [
        &["check", "vm.toml"][..],
        &["plugins"],
        &["plugins", "refused"],
    ] {
        let ran = scene.run(&[arguments, &["--plugin-path", "plugins"]].concat());
        assert_eq!(ran.code, Some(0), "{ran:?}");
    }
}

/// Damage anywhere is found before the file is loaded, since the table of sections is the last thing in it.
#[test]
fn a_plugin_cut_short_anywhere_is_refused() {
    let dir = TempDir::new().unwrap();
    let whole = std::fs::read(built("vmm-test-plugin-older")).unwrap();
    let cut = dir.path().join("libcut.so");
    for length in (20..whole.len()).step_by(whole.len() / 97) {
        std::fs::write(&cut, &whole[..length]).unwrap();
        let error = Manifest::read(&cut).unwrap_err();
        assert_eq!(
            error,
            ManifestError::Section(SectionError::Truncated),
            "{length}"
        );
    }
    std::fs::write(&cut, &whole).unwrap();
    assert_eq!(Manifest::read(&cut).unwrap().name, "test-older");
}

/// What else lies in a plugin directory: broken files are warned about, libraries that are no plugins are nobody's concern,
/// and the VM runs.
#[test]
fn other_files_in_a_plugin_directory_do_no_harm() {
    let name = "other_files_in_a_plugin_directory_do_no_harm";
    if !vm::possible(name) {
        return;
    }
    let scene = vm::scene(&["hello-device"]);
    let whole = std::fs::read(built("hello-backend")).unwrap();
    scene.write("plugins/libcut.so", &whole[..whole.len() / 2]);
    scene.write("plugins/libnoise.so", [0x5a; 4096]);
    let library = c_library();
    std::fs::copy(&library, scene.path("plugins/libc.so")).unwrap();
    let ended = vm::run(&scene, "mode=poweroff", "[dev.a]\ndriver = \"hello\"");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for expected in [
        "warn: skipped plugins/libcut.so: truncated: the file ends before its section table or manifest; copy or build it again",
        "warn: skipped plugins/libnoise.so: not an ELF shared library",
    ] {
        assert!(ended.log.contains(expected), "{}", ended.log);
    }
    assert!(!ended.log.contains("libc.so"), "{}", ended.log);
}

/// The C library that this test runs on.
fn c_library() -> std::path::PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.contains("/libc.so")).unwrap();
    line.split_whitespace().last().unwrap().into()
}

#[test]
fn a_driver_that_nobody_provides_is_refused_with_what_there_is() {
    let scene = vm::scene(&["hello-device"]);
    let ended = vm::run(&scene, "mode=poweroff", "[dev.a]\ndriver = \"hallo\"");
    assert_eq!(ended.code, Some(3), "{ended:?}");
    for expected in [
        "no plugin provides the driver \"hallo\"",
        "did you mean `hello`",
        "searched plugins (--plugin-path)",
    ] {
        assert!(ended.log.contains(expected), "{}", ended.log);
    }
}

/// Two real plugins with one driver name: in one directory nobody has it, across directories the earlier one has.
#[test]
fn two_plugins_with_one_driver() {
    let name = "two_plugins_with_one_driver";
    if !vm::possible(name) {
        return;
    }
    let scene = vm::scene(&["vmm-test-plugin-older"]);
    let device = format!("[dev.a]\ndriver = \"test-older\"\n{}", vm::PORT);
    std::fs::copy(
        built("vmm-test-plugin-older"),
        scene.path("plugins/libsecond.so"),
    )
    .unwrap();
    let ended = vm::run(&scene, "mode=poweroff", &device);
    assert_eq!(ended.code, Some(3), "{ended:?}");
    assert!(
        ended
            .log
            .contains("driver \"test-older\" is claimed by two plugins in one directory")
    );

    std::fs::create_dir(scene.path("later")).unwrap();
    std::fs::rename(
        scene.path("plugins/libsecond.so"),
        scene.path("later/libsecond.so"),
    )
    .unwrap();
    let later = format!("{device}\n[plugins]\npath = \"later\"");
    let ended = vm::run(&scene, "mode=poweroff", &later);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let decided = "info: driver test-older comes from plugins/libvmm_test_plugin_older.so, which is searched before";
    assert!(ended.log.contains(decided), "{}", ended.log);
}

//! `docs/tracing.md`: it lists the probes that are there, and what it shows works.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod run;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use run::{Scene, kvm};
use rustix::process::{Pid, Signal, kill_process};

const HOST: &str = env!("CARGO_BIN_EXE_vmm-host");
/// Whose `vmm_block` is looked at.
const PLUGIN: &str = "libvmm_plugin_memory.so";

fn workspace(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn page() -> String {
    fs::read_to_string(workspace("docs/tracing.md")).unwrap()
}

fn built() -> &'static Path {
    Path::new(HOST).parent().unwrap()
}

/// The commands that the page shows under `heading`, a block each, for the files that are built.
fn commands(heading: &str) -> Vec<String> {
    let page = page();
    let (_, section) = page.split_once(&format!("\n## {heading}\n")).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let blocks = section.split("```sh\n").skip(1).map(|rest| {
        let hello = workspace("configs/hello.toml");
        let block = rest.split("```").next().unwrap();
        block
            .replace("target/release", built().to_str().unwrap())
            .replace("configs/hello.toml", hello.to_str().unwrap())
    });
    blocks.collect()
}

/// Whether `program` is there and may set probes. If not, says that `test` is skipped and why.
fn can_trace(test: &str, program: &str, look: &[&str]) -> bool {
    let why = match Command::new(program).args(look).output() {
        Ok(output) if output.status.success() => return kvm(test),
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    println!("SKIPPED: {test}: {program}: {}", why.trim());
    false
}

/// `provider:name` of each probe in the file, and how many arguments it has.
fn probes(file: &Path) -> Option<BTreeSet<(String, usize)>> {
    let output = Command::new("readelf").arg("-nW").arg(file).output().ok()?;
    let text = String::from_utf8(output.stdout).unwrap();
    let value = |line: &str, key: &str| Some(line.split_once(key)?.1.trim().to_owned());
    let (mut found, mut provider, mut name) = (BTreeSet::new(), String::new(), String::new());
    for line in text.lines() {
        if let Some(it) = value(line, "Provider: ") {
            provider = it;
        } else if let Some(it) = value(line, "Name: ") {
            name = it;
        } else if let Some(it) = value(line, "Arguments: ") {
            found.insert((format!("{provider}:{name}"), it.split(' ').count()));
        }
    }
    Some(found)
}

#[test]
fn the_page_lists_the_probes_that_are_there() {
    let _scene = Scene::new();
    let (Some(mut there), Some(of_plugin)) =
        (probes(Path::new(HOST)), probes(&built().join(PLUGIN)))
    else {
        println!("SKIPPED: the_page_lists_the_probes_that_are_there: there is no readelf");
        return;
    };
    there.extend(of_plugin);
    let page = page();
    let rows = page.lines().filter_map(|line| {
        let (name, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
        let arguments = rest.split(" | ").next()?;
        Some((name.to_owned(), arguments.split(", ").count()))
    });
    assert_eq!(rows.collect::<BTreeSet<_>>(), there);
}

#[test]
fn plugins_with_block_backends_have_probes() {
    let page = page();
    let (_, rest) = page.split_once("provides a block backend: ").unwrap();
    let list = rest.split('.').next().unwrap().replace(" and ", ", ");
    let listed: BTreeSet<_> = list.split(", ").map(str::trim).collect();
    let manifests = fs::read_dir(workspace("plugins")).unwrap().map(|entry| {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let read = |file: &str| fs::read_to_string(folder.join(file)).unwrap();
        (name, read("src/plugin.toml"), read("Cargo.toml"))
    });
    let mut providing = BTreeSet::new();
    for (name, manifest, cargo) in manifests {
        let manifest: toml::Table = manifest.parse().unwrap();
        if manifest.contains_key("block") {
            assert!(cargo.contains("features = [\"probes\"]"), "{name}");
            providing.insert(name);
        }
    }
    assert_eq!(listed, providing.iter().map(String::as_str).collect());
}

/// Runs a block of commands; returns what they print.
fn shell(scene: &Scene, commands: &str) -> String {
    // Not a pipe: perf would write what it records there.
    let out = scene.path("out");
    let output = Command::new("sh")
        .args(["-e", "-c", commands])
        .current_dir(scene.path(""))
        .stdout(fs::File::create(&out).unwrap())
        // perf keeps what it knows of files there.
        .env("HOME", scene.path(""))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{commands}\n{said}");
    String::from_utf8_lossy(&fs::read(out).unwrap()).into_owned()
}

#[test]
fn perf_sees_what_the_guest_does() {
    if !can_trace("perf_sees_what_the_guest_does", "perf", &["probe", "-l"]) {
        return;
    }
    let scene = Scene::new();
    let [commands] = &commands("perf")[..] else {
        panic!("another number of examples");
    };
    // A run that failed may have left some.
    let end = commands.lines().last().unwrap();
    shell(&scene, &format!("{end} 2>/dev/null || true"));
    let seen = shell(&scene, commands);
    let has = |parts: &[&str]| {
        seen.lines()
            .any(|line| parts.iter().all(|part| line.contains(part)))
    };
    // The guest's banner: v, m, m on the first serial port.
    for letter in ["arg3=118", "arg3=109"] {
        let banner = ["vcpu-0", "pio_write", "arg1=1016", "arg2=1", letter];
        assert!(has(&banner), "no {letter}");
    }
    for probe in ["pio_read", "mmio_read", "mmio_write", "vcpu_exit"] {
        assert!(has(&[&format!("sdt_vmm_host:{probe}:")]), "no {probe}");
    }

    let reboot = run::vm("mode=reboot-once", "", run::STDIO);
    scene.write("reboot.toml", reboot);
    let commands = commands.replace(
        workspace("configs/hello.toml").to_str().unwrap(),
        "reboot.toml",
    );
    let seen = shell(&scene, &commands);
    for probe in ["reset", "reset_done"] {
        let count = seen.matches(&format!("sdt_vmm_host:{probe}:")).count();
        assert_eq!(count, 1, "{probe}");
    }
}

#[test]
fn bpftrace_counts_what_the_guest_does() {
    let test = "bpftrace_counts_what_the_guest_does";
    if !can_trace(test, "bpftrace", &["-e", "BEGIN { exit(); }"]) {
        return;
    }
    let scene = Scene::new();
    let [host, plugin] = &commands("bpftrace")[..] else {
        panic!("another number of examples");
    };
    let seen = shell(&scene, host);
    assert!(seen.contains("@writes[1016]: "), "{seen}");

    let disk = run::disk("type = \"mem-async\"\nsize = \"16M\"");
    let disk = run::vm("checks=block", "", &disk);
    // It does not tell when it is ready.
    for seconds in [1, 2, 5, 10] {
        let mut child = Command::new("sh")
            .args(["-c", &format!("exec {plugin}")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut seen = String::new();
        out.read_line(&mut seen).unwrap();
        std::thread::sleep(Duration::from_secs(seconds));
        scene.run(&disk).exited(0).said("PASS");
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        out.read_to_string(&mut seen).unwrap();
        child.wait().unwrap();
        // A histogram of the disk.
        if seen.contains("@us[block_dev.disk]:") && seen.contains("@@@@") {
            return;
        }
        println!("after {seconds} s:\n{seen}");
    }
    panic!("no request was seen");
}

//! `cargo xtask test`: everything that shows that the project works.

use crate::report::Report;
use crate::workspace::{self, Profile};
use crate::{docs, illumos, lab, packages, process, selftest};
use anyhow::Result;
use std::process::Command;
use std::time::Duration;

/// Arguments of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only the named parts: fmt, clippy, units, docs, illumos, guest, lab
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

const PARTS: &[&str] = &["fmt", "clippy", "units", "docs", "illumos", "guest", "lab"];
const BUILD: Duration = Duration::from_secs(3600);
/// For all tests of cargo's, which take a quarter of it: whatever waits for ever is to be told, not to take all of the time there is.
const UNITS: Duration = Duration::from_secs(1800);

/// Runs the parts; true if nothing failed.
pub fn run(arguments: &Arguments) -> Result<bool> {
    for name in &arguments.only {
        anyhow::ensure!(
            PARTS.contains(&name.as_str()),
            "there is no part {name:?}; the parts are {}",
            PARTS.join(", ")
        );
    }
    let wanted =
        |part: &str| arguments.only.is_empty() || arguments.only.iter().any(|name| name == part);
    let mut report = Report::default();
    if wanted("fmt") {
        report.section("formatting");
        formatting(&mut report);
    }
    if wanted("clippy") {
        report.section("lints");
        lints(&mut report);
    }
    if wanted("units") {
        report.section("unit tests");
        units(&mut report);
    }
    if wanted("docs") {
        report.section("documents");
        docs::test(&mut report);
    }
    if wanted("illumos") {
        report.section("illumos");
        illumos::test(&mut report);
    }
    if (wanted("guest") || wanted("lab"))
        && let Err(error) = workspace::build(Profile::Debug)
    {
        report.fail("build", &format!("{error:#}"));
        return Ok(report.close());
    }
    if wanted("guest") {
        report.section("the self-test guest");
        selftest::test(&mut report);
    }
    if wanted("lab") {
        report.section("the lab");
        if let Err(error) = lab::test(Profile::Debug, &mut report) {
            report.fail("lab", &format!("{error:#}"));
        }
    }
    Ok(report.close())
}

fn has_cargo_command(name: &str) -> bool {
    let outcome = process::bounded(&mut workspace::cargo(&[name, "--version"]), BUILD, false);
    outcome.is_ok_and(|outcome| outcome.code() == Some(0))
}

fn formatting(report: &mut Report) {
    if !has_cargo_command("fmt") {
        report.skip("rustfmt", "cargo fmt is not installed");
        return;
    }
    report.command(
        "cargo fmt --check",
        process::bounded(&mut workspace::cargo(&["fmt", "--check"]), BUILD, false),
    );
    // No cargo target: it is compiled by vmm-selftest's build script.
    let mut guest = Command::new("rustfmt");
    guest
        .args([
            "--edition",
            "2024",
            "--check",
            "guests/selftest/guest/main.rs",
        ])
        .current_dir(workspace::root());
    report.command(
        "rustfmt --check of the guest",
        process::bounded(&mut guest, BUILD, false),
    );
}

fn lints(report: &mut Report) {
    if !has_cargo_command("clippy") {
        report.skip("clippy", "cargo clippy is not installed");
        return;
    }
    let mut command = workspace::cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]);
    report.command(
        "cargo clippy -D warnings",
        process::bounded(&mut command, BUILD, false),
    );
    guest_lints(report);
}

/// The guest is no cargo target, so clippy is run on it by hand.
fn guest_lints(report: &mut Report) {
    const NAME: &str = "clippy of the guest";
    if packages::find_program("clippy-driver").is_none() {
        report.skip(NAME, "clippy-driver is not on the search path");
        return;
    }
    let mut command = Command::new("clippy-driver");
    command
        .args([
            "guests/selftest/guest/main.rs",
            "--edition",
            "2024",
            "--crate-type",
            "bin",
        ])
        .args(["-C", "panic=abort", "--emit=metadata", "-o"])
        .arg(workspace::target().join("selftest-guest.rmeta"))
        .args(["-D", "warnings", "-D", "clippy::undocumented_unsafe_blocks"])
        .env("SELFTEST_VERSION", "0")
        .current_dir(workspace::root());
    report.command(NAME, process::bounded(&mut command, BUILD, false));
}

/// Programs that unit tests use as independent judges, with their packages.
const JUDGES: &[(&str, &str)] = &[
    ("iasl", "acpica-tools"),
    ("dmidecode", "dmidecode"),
    ("cpio", "cpio"),
    ("cc", "gcc"),
    ("mdir", "mtools"),
    ("fsck.vfat", "dosfstools"),
    ("qemu-img", "qemu-utils"),
    ("readelf", "binutils"),
    ("perf", "linux-perf"),
    ("bpftrace", "bpftrace"),
];

/// What a failed test wrote: cargo's tests print it below a line of its name.
fn said_by(name: &str, output: &str) -> String {
    let heading = format!("---- {name} stdout ----");
    let below = output.split_once(&heading).map_or("", |(_, below)| below);
    let own = below.lines().take_while(|line| !line.starts_with("---- "));
    own.take(80).map(|line| format!("\n    | {line}")).collect()
}

/// Runs cargo's tests, says what each says, and takes their counts over.
fn units(report: &mut Report) {
    for (program, package) in JUDGES {
        if let Err(error) = packages::program(program, package) {
            // The test that wants it says that it is skipped.
            println!("{error:#}");
        }
    }
    if let Err(error) = workspace::build(Profile::Debug) {
        report.fail("build", &format!("{error:#}"));
        return;
    }
    let mut command = workspace::cargo(&[
        "test",
        "--workspace",
        "--no-fail-fast",
        "--",
        "--show-output",
    ]);
    let outcome = match process::bounded(&mut command, UNITS, false) {
        Ok(outcome) => outcome,
        Err(error) => return report.fail("cargo test", &format!("{error:#}")),
    };
    let mut passed = 0;
    for line in outcome.output.lines() {
        if let Some(rest) = line.strip_prefix("test result: ") {
            // "ok. 5 passed; 0 failed; ..."
            let words: Vec<&str> = rest.split_whitespace().collect();
            let count = words
                .windows(2)
                .find(|pair| pair[1].starts_with("passed"))
                .and_then(|pair| pair[0].parse::<u32>().ok());
            passed += count.unwrap_or(0);
        } else if let Some(rest) = line.trim_start().strip_prefix("SKIPPED: ") {
            report.skip("unit test", rest);
        } else if line.starts_with("test ") && line.ends_with("FAILED") {
            let name = line.trim_start_matches("test ");
            let name = name.trim_end_matches(" ... FAILED");
            report.fail(name, &said_by(name, &outcome.output));
        }
    }
    report.add_passed(passed);
    println!(
        "  {passed} unit tests passed in {:.0} s",
        outcome.elapsed.as_secs_f64()
    );
    report.command("cargo test --workspace", Ok(outcome));
}

//! `cargo xtask illumos`: type-checks the workspace for the other operating system.
//!
//! rustup has no standard library for it to check against with every compiler, and building one
//! needs compiler and library source of one version. Debian has both, as packages made for
//! building browsers: they are unpacked below `target/illumos-sysroot`, the library is compiled
//! once there, and checks are plain `cargo check` from then on. Nothing is linked or run. clippy comes
//! along, since the lints that the workspace denies see nothing of the other system's files otherwise.

use crate::report::Report;
use crate::{packages, process, workspace};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const TARGET: &str = "x86_64-unknown-illumos";
const PATIENCE: Duration = Duration::from_secs(3600);

/// Checks; true if it compiles.
pub fn run() -> Result<bool> {
    let compiler = Compiler::prepare()?;
    let outcome = check(&compiler, true)?;
    println!("illumos: {}", outcome.ending());
    Ok(outcome.code() == Some(0))
}

/// The same as a test.
pub fn test(report: &mut Report) {
    const NAME: &str = "type-check for illumos";
    match Compiler::prepare() {
        Ok(compiler) => {
            report.command(NAME, check(&compiler, false));
        }
        // Where the packages are Debian's, they can be had.
        Err(error) if packages::find_program("apt-get").is_some() => {
            report.fail(NAME, &format!("{error:#}"));
        }
        Err(error) => report.skip(NAME, &format!("{error:#}")),
    }
}

fn check(compiler: &Compiler, show: bool) -> Result<process::Outcome> {
    // Every crate, with tests, examples and benches.
    let mut command = workspace::cargo(&["check", "--workspace", "--all-targets"]);
    command.args(["--target", TARGET]);
    command
        .env("CARGO_TARGET_DIR", workspace::target().join("illumos"))
        .env("RUSTC_WORKSPACE_WRAPPER", compiler.linter());
    process::bounded(compiler.select(&mut command), PATIENCE, show)
}

/// Debian's compiler, unpacked.
struct Compiler {
    root: PathBuf,
}

impl Compiler {
    /// Unpacks it and gives it a standard library for the target, on first use.
    fn prepare() -> Result<Self> {
        let base = workspace::target().join("illumos-sysroot");
        let compiler = Compiler {
            root: base.join("root"),
        };
        let done = base.join("ready");
        if done.exists() && compiler.linter().exists() {
            return Ok(compiler);
        }
        println!("preparing a standard library for {TARGET} (some minutes, once)");
        // Names in lists that are older than what is downloaded would not belong together.
        packages::update()?;
        let library = packages::dependency("libstd-rust-web-dev", "libstd-rust-web-1")?;
        let llvm = packages::dependency("rustc-web", "libllvm")
            .or_else(|_| packages::dependency(&library, "libllvm"))?;
        let wanted = [
            "rustc-web",
            "rust-web-src",
            "rust-web-clippy",
            "libstd-rust-web-dev",
            &library,
            &llvm,
        ];
        packages::unpack(&wanted, &compiler.root)?;
        let libraries = compiler.standard_library(&base)?;
        let into = compiler
            .root
            .join("usr/lib/rustlib")
            .join(TARGET)
            .join("lib");
        fs::create_dir_all(&into)?;
        for file in libraries {
            fs::copy(&file, into.join(file.file_name().unwrap_or_default()))
                .with_context(|| format!("cannot copy {}", file.display()))?;
        }
        fs::write(&done, "")?;
        Ok(compiler)
    }

    /// The compiler that also says what breaks a lint.
    fn linter(&self) -> PathBuf {
        self.root.join("usr/bin/clippy-driver")
    }

    /// Makes cargo use it. Not by a shell script as RUSTC: a shell drops variables such as
    /// `CARGO_BIN_EXE_vmm-host`, whose names are no shell names.
    fn select<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("RUSTC", self.root.join("usr/bin/rustc")).env(
            "LD_LIBRARY_PATH",
            self.root.join("usr/lib/x86_64-linux-gnu"),
        )
    }

    /// Compiles the library as a dependency of an empty crate; the files that make it up.
    fn standard_library(&self, base: &Path) -> Result<Vec<PathBuf>> {
        let seed = base.join("seed");
        fs::create_dir_all(seed.join("src"))?;
        let manifest =
            "[package]\nname = \"seed\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[workspace]\n";
        fs::write(seed.join("Cargo.toml"), manifest)?;
        fs::write(seed.join("src/lib.rs"), "")?;
        let mut command = workspace::cargo(&["check", "-Zbuild-std=std,panic_abort,test"]);
        command
            .args(["--target", TARGET])
            .current_dir(&seed)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_TARGET_DIR", seed.join("target"))
            .env("CARGO_PROFILE_DEV_DEBUG", "0");
        let outcome = process::bounded(self.select(&mut command), PATIENCE, false)?;
        if outcome.code() != Some(0) {
            let (ending, tail) = (outcome.ending(), outcome.tail(30));
            bail!("the standard library for {TARGET} does not compile ({ending}):\n{tail}");
        }
        let mut files = Vec::new();
        for entry in fs::read_dir(seed.join("target").join(TARGET).join("debug/deps"))? {
            let file = entry?.path();
            let name = file
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let library = name.ends_with(".rlib") || name.ends_with(".rmeta");
            if library && name.starts_with("lib") && !name.starts_with("libseed") {
                files.push(file);
            }
        }
        Ok(files)
    }
}

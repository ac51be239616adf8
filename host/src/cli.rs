//! The command line: what can be typed, and what each command prints and returns.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use log::LevelFilter;

use crate::config::source::Severity;
use crate::config::{self, Loaded};
use crate::hypervisor::{Kind, Vm};
use crate::plugins::inspect;
use crate::plugins::registry::Registry;
use crate::plugins::search::{SearchOptions, search};
use crate::probes;
use crate::vm::{self, Launch, Making};

/// The exit code of a VM that could not be built or failed while it ran.
pub const EXIT_FAILURE: u8 = 1;
/// The exit code for a VM file that is refused. (2 is a wrong command line, by clap.)
pub const EXIT_CONFIG: u8 = 3;
pub use crate::vm::EXIT_DESTROYED;

const USAGE: &str = "vmm-host [OPTIONS] <VM.toml>...\n       vmm-host [OPTIONS] <COMMAND>";

const EXAMPLES: &str = "\
Examples:
  vmm-host configs/hello.toml          run the self-test guest, console on this terminal
  vmm-host check vm.toml               check a VM file and its plugins, create nothing
  vmm-host vm.toml site.toml           run vm.toml with what site.toml changes
  vmm-host plugins                     list the plugins that are found, and what was skipped
  vmm-host cpuid >> vm.toml            add this machine's CPUID profile, [cpuid.host], to a VM file
  vmm-host plugins NAME                the options of a plugin, driver or backend type
  vmm-host --plugin-path ./mine vm.toml

Plugins are looked for in --plugin-path, then in the directories of VMM_PLUGIN_PATH, then in
`[plugins] path` of the VM file, then beside this binary, then in ../lib/vmm-host/plugins from
there. Where two directories provide one name, the earlier has it.

Exit codes:
  0  the guest halted (or what `exit_on_halt` or `exit_on_reboot` of the VM file say)
  1  the VM could not be built, or failed
  2  wrong command line
  3  the VM file is refused
  4  another process destroyed the VM (bhyve)";

const CPUID_NOTE: &str = "\
# What guests see here without a profile; with `cpuid_profile = \"host\"` in [main] they see it anywhere.
# Leaves that say where a CPU is (b, 1f, 8000001e) and the hypervisor's own (40000000) are made by the host.
";

/// Runs a virtual machine whose every device and backend is a plugin.
#[derive(Debug, Parser)]
#[command(name = "vmm-host", version = version(), override_usage = USAGE, after_help = EXAMPLES, subcommand_negates_reqs = true, arg_required_else_help = true, max_term_width = 100)]
pub struct Arguments {
    /// The VM file to run; those that follow are laid over it
    #[arg(value_name = "VM.toml", required = true)]
    files: Vec<PathBuf>,

    #[command(subcommand)]
    command: Option<Command>,

    /// Search this directory for plugins, before all others; may be repeated
    #[arg(long, value_name = "DIR", global = true)]
    plugin_path: Vec<PathBuf>,

    /// Print what devices and backends have counted on stderr when the VM ends; SIGUSR1 does so at any time
    #[arg(long)]
    stats: bool,

    /// Destroy a VM of the same name that is there already, for instance one that another program left behind (bhyve)
    #[arg(long)]
    force: bool,

    /// How much to log on stderr; overrides RUST_LOG [default: info]
    #[arg(long, value_name = "LEVEL", global = true, ignore_case = true)]
    log_level: Option<LogLevel>,
}

/// What to do instead of running a VM.
#[derive(Debug, Subcommand)]
enum Command {
    /// Check a VM file against the plugins found; nothing is created and no plugin is loaded
    Check {
        /// The VM file to check; those that follow are laid over it
        #[arg(value_name = "VM.toml", required = true)]
        files: Vec<PathBuf>,
    },
    /// Print what this machine's CPUs tell a guest, as a CPUID profile to paste into a VM file
    Cpuid,
    /// List the plugins found, or show everything about one of them
    Plugins {
        /// A plugin, a driver or a backend type
        name: Option<String>,
        /// Print the option reference as Markdown
        #[arg(long, hide = true, conflicts_with = "name")]
        markdown: bool,
    },
}

/// The levels of the log.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogLevel {
    Error,
    #[value(alias = "warning")]
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> LevelFilter {
        match level {
            LogLevel::Error => LevelFilter::Error,
            LogLevel::Warn => LevelFilter::Warn,
            LogLevel::Info => LevelFilter::Info,
            LogLevel::Debug => LevelFilter::Debug,
            LogLevel::Trace => LevelFilter::Trace,
        }
    }
}

fn version() -> String {
    format!(
        "{} (plugin ABI {})",
        env!("CARGO_PKG_VERSION"),
        crate::plugins::manifest::HOST_ABI
    )
}

/// Does what the process's command line asks, with this hypervisor.
#[must_use]
pub fn main<H: Vm>() -> ExitCode {
    let started = Instant::now();
    let arguments = Arguments::parse();
    refuse_both(&arguments);
    start_log(arguments.log_level, started);
    probes::register();
    let launch = Launch {
        started,
        statistics: arguments.stats,
    };
    let options = SearchOptions::of_process(arguments.plugin_path);
    let code = match arguments.command {
        Some(Command::Check { files }) => check(&files, &options, H::KIND),
        Some(Command::Cpuid) => cpuid::<H>(),
        Some(Command::Plugins { name, markdown }) => plugins(name.as_deref(), markdown, &options),
        None => {
            let making = Making::<H>::begin(arguments.force);
            accepted(&arguments.files, &options, H::KIND).map_or(EXIT_CONFIG, |loaded| {
                loaded.registry.log_skipped();
                vm::run(making, loaded, launch).unwrap_or_else(|error| {
                    log::error!("{error:#}");
                    EXIT_FAILURE
                })
            })
        }
    };
    ExitCode::from(code)
}

/// Ends the process if there are files to run and a command, which clap could forbid only together with options before a
/// command. Behind a file, clap takes the command's name for that of another.
fn refuse_both(arguments: &Arguments) {
    if arguments.command.is_none() && arguments.files.len() < 2 {
        return;
    }
    let mut command = Arguments::command();
    let named = |file: &PathBuf| command.find_subcommand(file).is_some();
    let both = arguments.command.is_some() && !arguments.files.is_empty();
    if both || arguments.files.iter().any(named) {
        let text = "a VM file to run and a command: give one of them";
        command.error(ErrorKind::ArgumentConflict, text).exit();
    }
}

/// Lines such as `[  0.004] warn: text`: seconds since the start, which with `debug` make a timeline of the boot.
fn start_log(level: Option<LogLevel>, started: Instant) {
    let mut builder = match level {
        Some(level) => {
            let mut builder = env_logger::Builder::new();
            builder.filter_level(level.into());
            builder
        }
        None => env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")),
    };
    builder.format(move |out, record| {
        let style = out.default_level_style(record.level());
        let level = record.level().as_str().to_ascii_lowercase();
        writeln!(
            out,
            "[{:7.3}] {style}{level}{style:#}: {}",
            started.elapsed().as_secs_f64(),
            record.args()
        )
    });
    builder.init();
}

/// Reads the VM files, prints what is wrong with them on stderr, and returns them if they can be run.
fn accepted(files: &[PathBuf], options: &SearchOptions, hypervisor: Kind) -> Option<Loaded> {
    match config::load(files, options, hypervisor) {
        Ok(loaded) => {
            if loaded.warnings.count(Severity::Warning) > 0 {
                eprint!("{}", loaded.warnings);
            }
            Some(loaded)
        }
        Err(report) => {
            eprint!("{report}");
            None
        }
    }
}

fn check(files: &[PathBuf], options: &SearchOptions, hypervisor: Kind) -> u8 {
    let Some(loaded) = accepted(files, options, hypervisor) else {
        return EXIT_CONFIG;
    };
    let config = &loaded.config;
    print(&format!(
        "{}: good: VM {}, vCPUs {}, memory {} MiB, devices {}, backends {}\n",
        config::title(files),
        config.name,
        config.cpus,
        config.memory_bytes >> 20,
        config.devices.len(),
        config.backends.len()
    ))
}

fn cpuid<H: Vm>() -> u8 {
    match H::host_cpuid() {
        Ok(profile) => print(&format!(
            "{CPUID_NOTE}{}",
            config::cpuid::to_toml("host", &profile.portable())
        )),
        Err(error) => {
            eprintln!("error: {error:#}");
            EXIT_FAILURE
        }
    }
}

fn plugins(name: Option<&str>, markdown: bool, options: &SearchOptions) -> u8 {
    let registry = Registry::new(search(options.directories(&[])));
    for refused in registry.unsearchable() {
        eprintln!("error: {refused}");
    }
    if !registry.unsearchable().is_empty() {
        return EXIT_FAILURE;
    }
    match name {
        _ if markdown => print(&inspect::markdown(&registry)),
        None => print(&inspect::list(&registry)),
        Some(name) => match inspect::describe(&registry, name) {
            Ok(text) => print(&text),
            Err(text) => {
                eprintln!("error: {text}");
                EXIT_FAILURE
            }
        },
    }
}

/// Writes to stdout. A reader that went away (`| head`) is no failure.
fn print(text: &str) -> u8 {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("error: can't write to stdout: {error}");
            EXIT_FAILURE
        }
        _ => 0,
    }
}

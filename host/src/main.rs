//! Runs virtual machines whose every device and backend is a plugin.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm_host::cli::main(|loaded| {
        anyhow::bail!("can't run {} yet", loaded.config.name)
    })
}

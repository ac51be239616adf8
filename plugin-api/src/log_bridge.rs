//! Carries what a plugin logs to the host.

#![allow(unsafe_code)] // calls the host's log table

use log::{Level, LevelFilter, Metadata, Record};
use vmm_abi::Str;
use vmm_abi::host::{LOG, LogTable};

use crate::iface::service;

struct Bridge {
    host: vmm_abi::Host,
    table: &'static LogTable,
}

// SAFETY: the ABI allows log calls from any thread.
unsafe impl Send for Bridge {}
// SAFETY: as above.
unsafe impl Sync for Bridge {}

impl log::Log for Bridge {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let text = match record.args().as_str() {
                Some(text) => text.into(),
                None => std::borrow::Cow::Owned(record.args().to_string()),
            };
            let level = record.level() as u32;
            // SAFETY: a call by the table's contract.
            unsafe {
                (self.table.log)(
                    self.host.ctx,
                    level,
                    Str::new(record.target()),
                    Str::new(&text),
                )
            };
        }
    }

    fn flush(&self) {}
}

/// Makes the plugin's `log` macros write to the host. Each plugin has its own copy of the `log` crate.
pub(crate) fn install(host: vmm_abi::Host) {
    const _: () = assert!(
        Level::Error as u32 == vmm_abi::host::LOG_ERROR
            && Level::Trace as u32 == vmm_abi::host::LOG_TRACE
    );
    let Some(table) = service::<LogTable>(&host, LOG) else {
        return;
    };
    // SAFETY: a call by the table's contract.
    let level = match unsafe { (table.max_level)(host.ctx) } {
        0 => LevelFilter::Off,
        1 => LevelFilter::Error,
        2 => LevelFilter::Warn,
        3 => LevelFilter::Info,
        4 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    // A second host in one process, as in tests, finds the bridge to the first installed; the level still follows.
    if log::set_boxed_logger(Box::new(Bridge { host, table })).is_ok() || level > log::max_level() {
        log::set_max_level(level);
    }
}

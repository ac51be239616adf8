//! Signals that ask for the end, for an NMI, for counters or for a look at disks as messages, and one that must not end anything.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH, SIGXFSZ};

use super::{Mailbox, Message};
use crate::thread;

/// Presses the NMI button.
pub(super) const NMI_BUTTON: i32 = SIGUSR2;

/// Something may have another size now: disks. A terminal sends it too when its window does; then there is nothing to find.
/// A process that does not know what it is for ignores it.
pub(super) const DISK_SIZES: i32 = SIGWINCH;

/// Asks for what devices and backends have counted.
pub(super) const STATISTICS: i32 = SIGUSR1;

/// Signals that have come, or will.
pub(super) struct Signals {
    pending: signal_hook::iterator::Signals,
    sender: Sender<Message>,
}

impl Signals {
    /// From now on these signals no longer end the process: they wait for [`Signals::deliver`].
    ///
    /// # Errors
    /// The system refuses.
    pub fn register(mailbox: &Mailbox) -> Result<Self> {
        let all = [SIGINT, SIGTERM, SIGHUP, NMI_BUTTON, STATISTICS, DISK_SIZES];
        let pending =
            signal_hook::iterator::Signals::new(all).context("signals can't be handled")?;
        // A write beyond the limit on file sizes is then an error of that write (EFBIG), which a guest sees as its disk's, and not
        // the end of the process. Nobody looks at the flag.
        signal_hook::flag::register(SIGXFSZ, Arc::default()).context("signals can't be handled")?;
        Ok(Self {
            pending,
            sender: mailbox.sender.clone(),
        })
    }

    /// They arrive at the VM's owner, by a thread.
    ///
    /// # Errors
    /// The system refuses.
    pub fn deliver(mut self) -> Result<()> {
        let deliver = move || {
            for signal in self.pending.forever() {
                if self.sender.send(Message::Signal(signal)).is_err() {
                    return;
                }
            }
        };
        thread::spawn("signals", deliver).context("signals can't be handled")?;
        Ok(())
    }
}

/// What the signal is called.
pub(super) fn name(signal: i32) -> &'static str {
    match signal {
        SIGINT => "interrupted",
        SIGHUP => "hung up",
        _ => "asked to terminate",
    }
}

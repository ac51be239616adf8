//! Raw mode of the terminal that vmm-host runs on.

use std::os::fd::BorrowedFd;

use rustix::process::getpgrp;
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, isatty, tcgetattr,
    tcgetpgrp, tcsetattr,
};

/// A terminal in raw mode. Dropping it restores the modes found at first: the host releases its backends on every orderly end,
/// and a panic unwinds through here. Only SIGKILL and an abort leave the terminal raw.
pub(crate) struct RawTerminal {
    fd: BorrowedFd<'static>,
    found: Termios,
}

/// Whether `fd` is a terminal on which this process runs in the foreground. A process in the background must not touch the
/// terminal: the kernel would stop it.
pub(crate) fn in_foreground(fd: BorrowedFd<'_>) -> bool {
    // No process group: the terminal is not this process's own, so that there is no job control on it.
    tcgetpgrp(fd).map_or(true, |group| group == getpgrp())
}

impl RawTerminal {
    /// Switches `fd` to raw mode; `None` if it is no terminal.
    pub(crate) fn new(fd: BorrowedFd<'static>) -> std::io::Result<Option<Self>> {
        if !isatty(fd) {
            return Ok(None);
        }
        let found = tcgetattr(fd)?;
        let mut raw = found.clone();
        // Every key goes to the guest, Ctrl-C and Ctrl-S too. Output processing stays: log messages on the same terminal
        // rely on it, and to a guest that sends CR LF it does nothing.
        raw.local_modes -= LocalModes::ECHO
            | LocalModes::ECHONL
            | LocalModes::ICANON
            | LocalModes::ISIG
            | LocalModes::IEXTEN;
        raw.input_modes -= InputModes::IGNBRK
            | InputModes::BRKINT
            | InputModes::PARMRK
            | InputModes::ISTRIP
            | InputModes::INLCR
            | InputModes::IGNCR
            | InputModes::ICRNL
            | InputModes::IXON;
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(fd, OptionalActions::Now, &raw)?;
        Ok(Some(Self { fd, found }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if in_foreground(self.fd) {
            // A terminal that is gone needs no restoring.
            let _ = tcsetattr(self.fd, OptionalActions::Now, &self.found);
        }
    }
}

//! Level 1's keyboard, against an error of the QEMU around it.
//!
//! QEMU 7.2 emulates VMRUN and #VMEXIT on one thread, changing the set of interrupts that wait for the processor
//! (`interrupt_request`) without the lock under which another adds to it. Now and then it is lost that way that the local APIC has
//! one: it stands in the APIC (IRR), and the processor is never told. Level 1's kernel sets its timer anew when the timer
//! interrupts. If that was the interrupt, its time stands still, and whoever has the processor keeps it. With any other interrupt
//! QEMU looks at the APIC again, so that a key sets it going.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

/// A key that writes nothing, in the words of QEMU's monitor.
const PRESS: &[u8] = b"sendkey shift\n";

/// The keyboard of one level 1.
pub struct Keyboard {
    folder: TempDir,
    monitor: Option<UnixStream>,
}

impl Keyboard {
    /// Of the QEMU that `command` starts.
    pub fn attach(command: &mut Command) -> Result<Self> {
        let folder = tempfile::tempdir().context("no place for a socket")?;
        let keyboard = Keyboard {
            folder,
            monitor: None,
        };
        let socket = keyboard.folder.path().join("monitor");
        let option = format!("unix:{},server=on,wait=off", socket.display());
        command.args(["-monitor", &option]);
        Ok(keyboard)
    }

    /// Presses a key.
    ///
    /// # Errors
    /// QEMU does not listen, as when it has ended.
    pub fn press(&mut self) -> std::io::Result<()> {
        let monitor = match self.monitor.take() {
            Some(monitor) => monitor,
            None => {
                let monitor = UnixStream::connect(self.folder.path().join("monitor"))?;
                monitor.set_nonblocking(true)?;
                monitor
            }
        };
        let monitor = self.monitor.insert(monitor);
        monitor.write_all(PRESS)?;
        // It echoes all that it is told.
        let mut echo = [0; 1024];
        loop {
            match monitor.read(&mut echo) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_key_is_pressed_where_somebody_listens() {
        let mut command = Command::new("qemu");
        let mut keyboard = Keyboard::attach(&mut command).unwrap();
        assert!(keyboard.press().is_err(), "nobody listens yet");
        let option = command.get_args().nth(1).unwrap().to_str().unwrap();
        let path = option.strip_prefix("unix:").unwrap();
        let listener = UnixListener::bind(path.split(',').next().unwrap()).unwrap();
        keyboard.press().unwrap();
        let (mut monitor, _) = listener.accept().unwrap();
        monitor.write_all(PRESS).unwrap();
        keyboard.press().unwrap();
        let mut heard = vec![0; 2 * PRESS.len()];
        monitor.read_exact(&mut heard).unwrap();
        assert_eq!(heard, PRESS.repeat(2));
        drop((monitor, listener));
        assert!(keyboard.press().is_err() && keyboard.press().is_err());
    }
}

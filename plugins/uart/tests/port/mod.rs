//! The port as a driver sees it, and the console plugin's shared object for the other end of the line.

#![allow(dead_code)] // each test program uses its part

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_plugin_api::testing::{Backend, FakeDevice, FakeHost, load};
use vmm_plugin_uart::VMM_PLUGIN;

pub const DATA: u64 = 0;
pub const IER: u64 = 1;
pub const IIR: u64 = 2;
pub const FCR: u64 = 2;
pub const LCR: u64 = 3;
pub const MCR: u64 = 4;
pub const LSR: u64 = 5;
pub const MSR: u64 = 6;
pub const SCR: u64 = 7;

pub const DTR_RTS_OUT2: u8 = 0x0b;
pub const LOOPBACK: u8 = 0x10;

pub struct Port {
    pub host: FakeHost,
    pub device: FakeDevice,
}

impl Port {
    /// A started com1 without a backend.
    pub fn alone() -> Self {
        let host = FakeHost::new(4096);
        let device = host
            .device(&VMM_PLUGIN, "lpc-uart", &[("port", "com1".into())])
            .unwrap();
        device.start().unwrap();
        Self { host, device }
    }

    /// A started com1 on a unix socket, and a client of it.
    pub fn on_socket(dir: &Path) -> (Self, UnixStream) {
        let host = FakeHost::new(4096);
        let backend = socket(&host, &dir.join("tty"));
        let options = [("port", "com1".into()), ("char_dev", (&backend).into())];
        let device = host.device(&VMM_PLUGIN, "lpc-uart", &options).unwrap();
        device.start().unwrap();
        let client = UnixStream::connect(dir.join("tty")).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        host.poll(Duration::ZERO);
        (Self { host, device }, client)
    }

    pub fn get(&self, register: u64) -> u8 {
        self.device.read(0, register, 1) as u8
    }

    pub fn put(&self, register: u64, value: u8) {
        self.device.write(0, register, 1, value.into());
    }

    /// Runs the I/O thread until `done`.
    pub fn wait(&self, what: &str, done: impl FnMut() -> bool) {
        assert!(
            self.host.poll_until(Duration::from_secs(20), done),
            "waited in vain for {what}"
        );
    }

    /// Takes what has been received.
    pub fn take(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.get(LSR) & 1 != 0 {
            bytes.push(self.get(DATA));
        }
        bytes
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.host.faults(), Vec::<String>::new());
        }
    }
}

fn socket(host: &FakeHost, path: &Path) -> Backend {
    let options = [
        ("path", path.to_str().unwrap().into()),
        ("wait", false.into()),
        ("buffer", (1u64 << 20).into()),
    ];
    host.char(load("vmm-plugin-console").unwrap(), "socket", &options)
        .unwrap()
}

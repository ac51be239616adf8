//! NVMe controller (NVM Express 1.4 and its PCIe transport) on any block backend.
//!
//! vCPU threads write registers and doorbells, and wait for nothing. The admin thread carries out admin commands. Each I/O
//! completion queue has a thread, which takes commands from guest memory to the backend and their completions back.
//! Sections and figures in comments are those of NVM Express Base Specification 1.4.

mod admin;
mod command;
mod counters;
mod data;
mod doorbells;
mod engine;
mod error_log;
mod events;
mod features;
mod identify;
mod interrupts;
mod io;
mod io_queues;
mod lane;
mod log_pages;
mod registers;
mod rings;
mod shared;
mod status;
mod trim;
mod worker;

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::{Context, ensure};
use vmm_plugin_api::{
    Description, Device, Host, Options, PciDescription, Region, RegionKind, Result,
};

use admin::Admin;
use interrupts::VECTORS;
use shared::{AdminNote, SERIAL_BYTES, Shared, lock};

/// PCI vendor id, as propolis has it.
const VENDOR: u16 = 0x01de;
/// PCI device id.
const DEVICE_ID: u16 = 0x0000;
/// Mass storage, non-volatile memory, NVM Express.
const CLASS: u32 = 0x01_08_02;
/// Region id and number of the BAR with registers and doorbells.
const REGISTERS_BAR: u32 = 0;
/// Its size.
const REGISTERS_SIZE: u64 = 0x4000;
/// The BAR that the host makes for MSI-X.
const MSIX_BAR: u32 = 4;

/// The device.
pub struct Nvme {
    shared: Arc<Shared>,
    admin: Mutex<Option<JoinHandle<()>>>,
}

/// The serial number: as given, or as much of the backend's name as fits; filled up with spaces.
fn serial(given: Option<&str>, backend: &str) -> Result<[u8; SERIAL_BYTES]> {
    if let Some(text) = given {
        ensure!(
            text.len() <= SERIAL_BYTES,
            "serial = {text:?} has {} bytes; an NVMe serial number has at most {SERIAL_BYTES}",
            text.len()
        );
        ensure!(
            text.bytes().all(|b| (0x20..0x7f).contains(&b)),
            "serial = {text:?} has characters that are not printable ASCII, which NVMe demands"
        );
    }
    let mut serial = [b' '; SERIAL_BYTES];
    for (to, from) in serial.iter_mut().zip(given.unwrap_or(backend).bytes()) {
        *to = from;
    }
    Ok(serial)
}

impl Device for Nvme {
    const FOLLOWS_RESIZE: bool = true;

    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let backend = options.block("block_dev")?;
        let serial = serial(options.maybe_str("serial")?, backend.name())?;
        Ok(Self {
            shared: Arc::new(Shared::new(host, backend, serial)?),
            admin: Mutex::default(),
        })
    }

    fn describe(&self) -> Description {
        Description {
            regions: vec![Region {
                id: REGISTERS_BAR,
                kind: RegionKind::Bar64(REGISTERS_BAR),
                size: REGISTERS_SIZE,
            }],
            pci: Some(PciDescription {
                vendor: VENDOR,
                device: DEVICE_ID,
                subsystem_vendor: VENDOR,
                subsystem: DEVICE_ID,
                class: CLASS,
                revision: 0,
                intx: true,
                msix_vectors: VECTORS,
                msix_bar: MSIX_BAR,
                capabilities: Vec::new(),
            }),
            ..Description::default()
        }
    }

    fn read(&self, _region: u32, offset: u64, width: u32) -> u64 {
        self.shared.read(offset, width)
    }

    fn write(&self, _region: u32, offset: u64, width: u32, value: u64) {
        self.shared.write(offset, width, value);
    }

    fn start(&self) -> Result<()> {
        let shared = self.shared.clone();
        let backend = shared.backend.open_queue(1);
        let backend = backend.context("can't open a backend queue for shutdowns")?;
        shared.admin.open();
        let admin = Admin::new(shared.clone(), backend);
        let thread = shared.host.spawn("nvme-admin", || admin.run());
        let thread = thread
            .inspect_err(|_| shared.admin.close())
            .context("can't start the admin thread")?;
        *lock(&self.admin) = Some(thread);
        Ok(())
    }

    fn resized(&self) {
        self.shared.look_at_size();
    }

    fn pause(&self) -> Result<()> {
        // The admin thread first: it starts and ends the others.
        self.shared.admin.pause();
        self.shared.admin.wait_parked();
        for lane in self.shared.all_lanes() {
            lane.pause();
        }
        for lane in self.shared.all_lanes() {
            lane.wait_parked();
        }
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        for lane in self.shared.all_lanes() {
            lane.resume();
        }
        self.shared.admin.resume();
        Ok(())
    }

    fn reset(&self) -> Result<()> {
        self.shared.admin.ask(AdminNote::PowerOn);
        // Also without an admin thread.
        self.shared.registers.power_on();
        Ok(())
    }

    fn stop(&self) {
        self.shared.admin.ask(AdminNote::Exit);
        if let Some(thread) = lock(&self.admin).take() {
            // A panic in it has been reported as a fault by the thread itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        self.stop();
    }
}

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: { "pci-nvme" => Nvme },
    blocks: {},
    chars: {},
}

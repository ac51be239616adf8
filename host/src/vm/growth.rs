//! Disks that have grown under the running VM: backends look, then devices tell the guest.

use std::sync::Arc;

use super::Objects;
use crate::plugins::object::Object;

impl Objects {
    /// Looks at the size of every disk again, and tells the devices of those that have grown.
    pub(super) fn look_at_disk_sizes(&self) {
        let mut grown: Vec<&Arc<Object>> = Vec::new();
        for backend in &self.backends {
            let label = backend.instance().label();
            match backend.look_again() {
                _ if backend.instance().failed() => {}
                Ok(Some((before, after))) if after > before => {
                    log::info!("{label} has grown from {before} to {after} bytes");
                    grown.push(backend);
                }
                Ok(Some(_)) => {}
                Ok(None) if backend.uses_any(&grown) => {
                    log::warn!("{label} keeps its size, although what it stands on has grown");
                }
                Ok(None) => {}
                Err(error) => log::error!("{label} keeps its size: {error:#}"),
            }
        }
        for device in self.devices.iter().filter(|device| device.uses_any(&grown)) {
            let label = device.instance().label();
            match device.resized() {
                Ok(true) => {}
                Ok(false) => log::warn!(
                    "{label} can't tell the guest that its disk has grown; the guest sees it when the VM is started again"
                ),
                Err(error) => log::error!("{label}: {error:#}"),
            }
        }
        if grown.is_empty() {
            log::debug!("no disk has grown");
        }
    }
}

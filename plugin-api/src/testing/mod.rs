//! A fake host: runs any device or backend, through the same ABI tables as the real one, without a VM.
//!
//! ```no_run
//! use vmm_plugin_api::abi::Root;
//! use vmm_plugin_api::testing::{FakeHost, load};
//!
//! /// `plugin` is the `VMM_PLUGIN` of the crate under test; its disk comes from another plugin.
//! fn test(plugin: &'static Root) -> vmm_plugin_api::Result<()> {
//!     let host = FakeHost::new(16 << 20);
//!     let disk = host.block(load("acme-disk")?, "acme-disk", &[("size", (1u64 << 20).into())])?;
//!     let dev = host.device(plugin, "acme-widget", &[("block_dev", (&disk).into())])?;
//!     dev.start()?;
//!     dev.write(2, 0x14, 1, 1);
//!     assert_eq!(dev.read(2, 0x14, 1), 1);
//!     assert!(host.faults().is_empty());
//!     Ok(())
//! }
//! ```
//!
//! The test plays the guest (register access, memory) and the I/O thread ([`FakeHost::poll`]), so what happens is in its hands.
//! What a host lends for the life of the process (memory, interrupt descriptors) is leaked here as well.

mod allocations;
mod block;
mod driver;
mod instance;
mod load;
mod memory;
mod object;
mod processor_time;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_abi::{KIND_BLOCK, KIND_CHAR, KIND_DEVICE, Root};

use crate::{GuestMemory, Result};
pub use allocations::{CountingAllocator, allocations, allocations_elsewhere};
pub use block::{run_batch, run_control, run_transfer};
pub use driver::{Buffer, DriverQueue, VirtioDriver};
use instance::Instance;
pub use load::load;
use memory::Ram;
pub use object::{Backend, FakeDevice, Value};
pub use processor_time::processor_time;

/// A host that lends memory, interrupts, doorbells, events and the rest, and records what a plugin does with them.
#[derive(Clone)]
pub struct FakeHost {
    shared: &'static Shared,
}

struct Shared {
    ram: Ram,
    epoch: Instant,
    instances: Mutex<Vec<&'static Instance>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeHost {
    /// A host with `bytes` of guest RAM at guest address 0.
    ///
    /// # Panics
    /// The system has no memory for it.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self::with_ranges(&[(0, bytes)])
    }

    /// A host with RAM at the given guest addresses and sizes.
    ///
    /// # Panics
    /// The system has no memory for it.
    #[must_use]
    pub fn with_ranges(ranges: &[(u64, u64)]) -> Self {
        let shared = Shared {
            ram: Ram::new(ranges),
            epoch: Instant::now(),
            instances: Mutex::default(),
        };
        Self {
            shared: Box::leak(Box::new(shared)),
        }
    }

    /// Guest RAM, for the test that plays the guest.
    #[must_use]
    pub fn memory(&self) -> GuestMemory {
        GuestMemory::new(self.shared.ram.table())
    }

    /// Switches dirty-page tracking on or off.
    pub fn track_dirty(&self, on: bool) {
        self.shared.ram.track(on);
    }

    /// Guest addresses of the pages marked written since the last call; clears the marks.
    #[must_use]
    pub fn take_dirty(&self) -> Vec<u64> {
        self.shared.ram.take_dirty()
    }

    /// Creates the device `driver` of the plugin. Options are passed as given: the real host has validated them against the
    /// manifest and filled in defaults, so give what create needs.
    ///
    /// # Errors
    /// What create reports.
    pub fn device(
        &self,
        root: &'static Root,
        driver: &str,
        options: &[(&str, Value)],
    ) -> Result<FakeDevice> {
        FakeDevice::new(self.create(root, KIND_DEVICE, driver, options)?)
    }

    /// Creates the block backend `name` of the plugin.
    ///
    /// # Errors
    /// What create reports.
    pub fn block(
        &self,
        root: &'static Root,
        name: &str,
        options: &[(&str, Value)],
    ) -> Result<Backend> {
        self.create(root, KIND_BLOCK, name, options)
    }

    /// Creates the character backend `name` of the plugin.
    ///
    /// # Errors
    /// What create reports.
    pub fn char(
        &self,
        root: &'static Root,
        name: &str,
        options: &[(&str, Value)],
    ) -> Result<Backend> {
        self.create(root, KIND_CHAR, name, options)
    }

    fn create(
        &self,
        root: &'static Root,
        kind: u32,
        name: &str,
        options: &[(&str, Value)],
    ) -> Result<Backend> {
        let instance: &'static Instance = Box::leak(Box::new(Instance::new(self.shared)));
        let object = Arc::new(object::Object::create(instance, root, kind, name, options)?);
        *lock(&instance.object) = Arc::downgrade(&object);
        lock(&self.shared.instances).push(instance);
        Ok(Backend(object))
    }

    /// Plays the I/O thread once: waits until a watched descriptor is ready or a timer expires, at most `timeout`, and calls
    /// `ready` for each. Returns how many calls that were.
    pub fn poll(&self, timeout: Duration) -> usize {
        let instances = lock(&self.shared.instances).clone();
        instance::poll(&instances, self.shared.epoch, timeout)
    }

    /// Calls [`FakeHost::poll`] until `done` says so; false when `timeout` passes first.
    pub fn poll_until(&self, timeout: Duration, mut done: impl FnMut() -> bool) -> bool {
        let end = Instant::now() + timeout;
        loop {
            if done() {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.poll(left.min(Duration::from_millis(10)));
        }
    }

    /// Faults reported by any object, as `method: text`.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        self.collect(|i| lock(&i.faults).clone())
    }

    /// Messages logged under an object's own name.
    #[must_use]
    pub fn logs(&self) -> Vec<String> {
        self.collect(|i| lock(&i.logs).clone())
    }

    /// What objects wait for before the guest may start.
    #[must_use]
    pub fn holds(&self) -> Vec<String> {
        self.collect(|i| lock(&i.hold).iter().cloned().collect())
    }

    /// Requests for reset, power off or failure: `REQUEST_*` and why.
    #[must_use]
    pub fn requests(&self) -> Vec<(u32, String)> {
        self.collect(|i| lock(&i.requests).clone())
    }

    fn collect<T>(&self, take: impl Fn(&Instance) -> Vec<T>) -> Vec<T> {
        lock(&self.shared.instances)
            .iter()
            .flat_map(|i| take(i))
            .collect()
    }
}

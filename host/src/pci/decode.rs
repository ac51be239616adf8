//! Which BARs the guest has placed where, with the doorbells inside them.
//!
//! A guest may put a BAR anywhere, on top of RAM or of another BAR too, if only for a moment while it measures sizes.
//! Such a BAR is not decoded until its place is free: the other owner is never disturbed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

use crate::bus::{Buses, Registers};
use crate::hypervisor::{Doorbell, Space, Vm};

/// Doorbells one function may bind: more than any NVMe controller or NIC needs.
const DOORBELLS_MAX: usize = 4096;

/// Names a window of a [`Decoder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowId(usize);

/// A range of registers whose address the guest chooses.
pub struct WindowDesc {
    /// Device and BAR, for messages.
    pub owner: Arc<str>,
    /// Ports or memory.
    pub space: Space,
    /// Bytes.
    pub size: u64,
    /// Region number passed to `target`.
    pub region: u32,
    /// Who answers.
    pub target: Arc<dyn Registers>,
}

struct Window {
    desc: WindowDesc,
    /// Where the guest put it; `None` while decoding is off.
    wanted: Option<u64>,
    /// Where it is on the bus.
    mapped: Option<u64>,
    doorbells: Vec<Binding>,
}

struct Binding {
    offset: u64,
    width: u8,
    value: Option<u64>,
    fd: OwnedFd,
    /// What the hypervisor holds for it now.
    bound: Option<Doorbell>,
}

/// Keeps bus entries and doorbells where the guest's BARs say.
pub struct Decoder<V: Vm> {
    vm: Arc<V>,
    buses: Arc<Buses>,
    windows: Mutex<Vec<Window>>,
}

impl<V: Vm> Decoder<V> {
    /// No windows.
    #[must_use]
    pub fn new(vm: Arc<V>, buses: Arc<Buses>) -> Self {
        Self {
            vm,
            buses,
            windows: Mutex::default(),
        }
    }

    /// A new window, not decoded.
    pub fn add(&self, desc: WindowDesc) -> WindowId {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.push(Window {
            desc,
            wanted: None,
            mapped: None,
            doorbells: Vec::new(),
        });
        WindowId(windows.len() - 1)
    }

    /// Moves windows to where the guest wants them (`None`: not decoded). Windows that waited for a place now free get it.
    pub fn place(&self, changes: &[(WindowId, Option<u64>)]) {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        for &(WindowId(id), wanted) in changes {
            if let Some(window) = windows.get_mut(id) {
                window.wanted = wanted;
            }
        }
        for window in windows
            .iter_mut()
            .filter(|window| window.mapped != window.wanted)
        {
            self.unmap(window);
        }
        for window in windows
            .iter_mut()
            .filter(|window| window.mapped != window.wanted)
        {
            self.map(window);
        }
    }

    /// Where a window is on the bus now.
    #[must_use]
    pub fn address(&self, WindowId(id): WindowId) -> Option<u64> {
        self.windows
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(id)?
            .mapped
    }

    /// Binds guest writes of `width` bytes (0: any) at `offset` to `fd`, wherever the window is and will be.
    /// `Ok(false)`: this hypervisor can't, and the write goes to [`Registers::write`].
    ///
    /// # Errors
    /// Not inside the window, no such width, already bound, too many, or the hypervisor refused.
    pub fn bind(
        &self,
        WindowId(id): WindowId,
        offset: u64,
        width: u8,
        value: Option<u64>,
        fd: BorrowedFd<'_>,
    ) -> Result<bool> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let window = windows.get_mut(id).context("no such window")?;
        let (owner, size) = (&window.desc.owner, window.desc.size);
        ensure!(
            matches!(width, 0 | 1 | 2 | 4 | 8),
            "{owner}: a doorbell can't be {width} bytes wide: 0, 1, 2, 4 or 8"
        );
        ensure!(
            offset < size && u64::from(width.max(1)) <= size - offset,
            "{owner}: doorbell at offset {offset:#x} lies outside of its {size:#x} bytes"
        );
        ensure!(
            window.doorbells.len() < DOORBELLS_MAX,
            "{owner}: more than {DOORBELLS_MAX} doorbells"
        );
        ensure!(
            window
                .doorbells
                .iter()
                .all(|other| (other.offset, other.width, other.value) != (offset, width, value)),
            "{owner}: the doorbell at offset {offset:#x} is bound already"
        );
        let fd = fd
            .try_clone_to_owned()
            .with_context(|| format!("{owner}: can't keep the doorbell's descriptor"))?;
        let mut binding = Binding {
            offset,
            width,
            value,
            fd,
            bound: None,
        };
        let mut able = true;
        if let Some(base) = window.mapped {
            let doorbell = binding.at(window.desc.space, base);
            able = self
                .vm
                .bind_doorbell(doorbell, binding.fd.as_fd())
                .with_context(|| format!("{owner}: doorbell at offset {offset:#x}"))?;
            binding.bound = able.then_some(doorbell);
        }
        window.doorbells.push(binding);
        Ok(able)
    }

    fn map(&self, window: &mut Window) {
        let Some(base) = window.wanted else { return };
        let desc = &window.desc;
        let bus = self.buses.space(desc.space);
        if let Err(error) = bus.insert(
            &desc.owner,
            base,
            desc.size,
            desc.region,
            Arc::clone(&desc.target),
        ) {
            log::debug!("not decoded while the guest leaves it there: {error}");
            return;
        }
        window.mapped = Some(base);
        for binding in &mut window.doorbells {
            let doorbell = binding.at(desc.space, base);
            match self.vm.bind_doorbell(doorbell, binding.fd.as_fd()) {
                Ok(able) => binding.bound = able.then_some(doorbell),
                // The write then arrives as any other, which a device has to expect anyway.
                Err(error) => log::warn!(
                    "{}: doorbell at {:#x}: {error:#}",
                    desc.owner,
                    doorbell.address
                ),
            }
        }
    }

    fn unmap(&self, window: &mut Window) {
        self.unbind(window);
        if let Some(base) = window.mapped.take() {
            self.buses.space(window.desc.space).remove(base);
        }
    }

    fn unbind(&self, window: &mut Window) {
        for binding in &mut window.doorbells {
            if let Some(doorbell) = binding.bound.take()
                && let Err(error) = self.vm.unbind_doorbell(doorbell, binding.fd.as_fd())
            {
                log::warn!(
                    "{}: doorbell at {:#x}: {error:#}",
                    window.desc.owner,
                    doorbell.address
                );
            }
        }
    }
}

impl Binding {
    fn at(&self, space: Space, base: u64) -> Doorbell {
        Doorbell {
            space,
            address: base + self.offset,
            width: self.width,
            value: self.value,
        }
    }
}

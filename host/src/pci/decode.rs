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

/// What the guest's command register and BAR say about a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Where the guest put it; `None` while decoding is off.
    pub address: Option<u64>,
    /// Whether doorbells are to be bound: they wait for the driver to enable bus mastering, because a guest that
    /// enumerates the bus switches decoding off and on a dozen times before.
    pub armed: bool,
}

struct Window {
    desc: WindowDesc,
    wanted: Placement,
    /// Where it is on the bus.
    mapped: Option<u64>,
    doorbells: Vec<Binding>,
}

struct Binding {
    offset: u64,
    width: u8,
    value: Option<u64>,
    fd: OwnedFd,
    bound: Bound,
}

/// What the hypervisor has of a doorbell.
enum Bound {
    /// Nothing: the window is not decoded, or not armed.
    No,
    /// This.
    Yes(Doorbell),
    /// Nothing, though asked: writes go to the device.
    Refused,
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
            wanted: Placement::default(),
            mapped: None,
            doorbells: Vec::new(),
        });
        WindowId(windows.len() - 1)
    }

    /// Moves windows to where the guest wants them. Windows that waited for a place now free get it.
    pub fn place(&self, changes: &[(WindowId, Placement)]) {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        for &(WindowId(id), wanted) in changes {
            if let Some(window) = windows.get_mut(id) {
                window.wanted = wanted;
            }
        }
        for window in windows.iter_mut() {
            if window.mapped != window.wanted.address {
                self.unmap(window);
            } else if !window.wanted.armed {
                self.unbind(window);
            }
        }
        for window in windows.iter_mut() {
            if window.mapped != window.wanted.address {
                self.map(window);
            }
            self.arm(window);
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
    /// `Ok(false)`: this hypervisor can't, and the write goes to [`Registers::write`], as it does while the window
    /// is not armed.
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
            bound: Bound::No,
        };
        let able = match window.mapped {
            Some(base) if window.wanted.armed => {
                binding.bind(&*self.vm, window.desc.space, base)?
            }
            _ => true,
        };
        window.doorbells.push(binding);
        Ok(able)
    }

    /// Ends a binding: writes go to [`Registers::write`] again.
    ///
    /// # Errors
    /// There is none of these numbers.
    pub fn end(
        &self,
        WindowId(id): WindowId,
        offset: u64,
        width: u8,
        value: Option<u64>,
    ) -> Result<()> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let window = windows.get_mut(id).context("no such window")?;
        let owner = &window.desc.owner;
        let at = window
            .doorbells
            .iter()
            .position(|bell| (bell.offset, bell.width, bell.value) == (offset, width, value))
            .with_context(|| format!("{owner}: no doorbell is bound at offset {offset:#x}"))?;
        let mut binding = window.doorbells.remove(at);
        binding.unbind(&*self.vm, owner);
        Ok(())
    }

    fn map(&self, window: &mut Window) {
        let Some(base) = window.wanted.address else {
            return;
        };
        let desc = &window.desc;
        let bus = self.buses.space(desc.space);
        match bus.insert(
            &desc.owner,
            base,
            desc.size,
            desc.region,
            Arc::clone(&desc.target),
        ) {
            Ok(()) => window.mapped = Some(base),
            Err(error) => log::debug!("not decoded while the guest leaves it there: {error}"),
        }
    }

    fn unmap(&self, window: &mut Window) {
        self.unbind(window);
        if let Some(base) = window.mapped.take() {
            self.buses.space(window.desc.space).remove(base);
        }
    }

    /// Binds what is not bound yet, if the window is decoded and armed.
    fn arm(&self, window: &mut Window) {
        let (Some(base), true) = (window.mapped, window.wanted.armed) else {
            return;
        };
        for binding in &mut window.doorbells {
            if let Err(error) = binding.bind(&*self.vm, window.desc.space, base) {
                // The write then arrives as any other, which a device has to expect anyway.
                let owner = &window.desc.owner;
                log::warn!(
                    "{owner}: doorbell at offset {:#x}: {error:#}",
                    binding.offset
                );
            }
        }
    }

    fn unbind(&self, window: &mut Window) {
        for binding in &mut window.doorbells {
            binding.unbind(&*self.vm, &window.desc.owner);
        }
    }
}

impl Binding {
    /// Asks the hypervisor once for each place of the window; `false` if it can't.
    fn bind<V: Vm>(&mut self, vm: &V, space: Space, base: u64) -> Result<bool> {
        match self.bound {
            Bound::Yes(_) => return Ok(true),
            Bound::Refused => return Ok(false),
            Bound::No => {}
        }
        let address = base + self.offset;
        let doorbell = Doorbell {
            space,
            address,
            width: self.width,
            value: self.value,
        };
        self.bound = Bound::Refused;
        let able = vm.bind_doorbell(doorbell, self.fd.as_fd())?;
        if able {
            self.bound = Bound::Yes(doorbell);
        }
        Ok(able)
    }

    /// Takes from the hypervisor what it has.
    fn unbind<V: Vm>(&mut self, vm: &V, owner: &str) {
        if let Bound::Yes(doorbell) = std::mem::replace(&mut self.bound, Bound::No)
            && let Err(error) = vm.unbind_doorbell(doorbell, self.fd.as_fd())
        {
            log::warn!("{owner}: doorbell at {:#x}: {error:#}", doorbell.address);
        }
    }
}

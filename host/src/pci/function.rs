//! One PCI function: its configuration space, and what follows when the guest writes there.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};

use super::config_space::{
    Bar, BoardRegister, COMMAND, COMMAND_INTX_DISABLE, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY,
    ConfigSpace, INTERRUPT_LINE, Part, bar_offset, msix_layout,
};
use super::decode::{Decoder, Placement, WindowDesc, WindowId};
use super::desc::{BarDesc, BarKind, LiveCapability, PciFunctionDesc};
use super::lines::IrqPin;
use super::msix::Msix;
use super::root::Wiring;
use super::{Bdf, intx_gsi, intx_link};
use crate::bus::{Registers, ones};
use crate::hypervisor::{Space, Vm};

/// What the INTx pin does: driven by the device, but silent while the guest disables it or uses MSI-X.
struct Intx<V: Vm> {
    pin: IrqPin<V>,
    /// The line that firmware routes it to.
    gsi: u32,
    state: Mutex<IntxState>,
}

#[derive(Default)]
struct IntxState {
    asserted: bool,
    silenced: bool,
}

impl<V: Vm> Intx<V> {
    fn change(&self, change: impl FnOnce(&mut IntxState)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        self.pin.set(state.asserted && !state.silenced);
    }

    fn asserted(&self) -> bool {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .asserted
    }
}

/// A BAR of the device's own.
struct DeviceBar {
    region: u32,
    size: u64,
    window: WindowId,
}

fn device_bars<V: Vm>(
    owner: &str,
    desc: &PciFunctionDesc,
    target: &Arc<dyn Registers>,
    decoder: &Decoder<V>,
) -> Vec<DeviceBar> {
    let place = |bar: &BarDesc| DeviceBar {
        region: bar.region,
        size: bar.size,
        window: decoder.add(WindowDesc {
            owner: Arc::from(format!("{owner} BAR {}", bar.index)),
            space: if bar.kind == BarKind::Io {
                Space::Pio
            } else {
                Space::Mmio
            },
            size: bar.size,
            region: bar.region,
            target: Arc::clone(target),
        }),
    };
    desc.bars.iter().map(place).collect()
}

/// A function on the bus, and the device's handle to its interrupts and doorbells. Callable on any thread.
pub struct Function<V: Vm> {
    owner: Arc<str>,
    bdf: Bdf,
    /// Held while windows move, so that the last write decides. A device is never called under it.
    config: Mutex<ConfigSpace>,
    /// In the order of the configuration space's BARs.
    windows: Vec<WindowId>,
    device_bars: Vec<DeviceBar>,
    decoder: Arc<Decoder<V>>,
    intx: Option<Intx<V>>,
    msix: Option<Arc<Msix<V>>>,
    live: Option<Arc<dyn LiveCapability>>,
    board: Option<Arc<dyn BoardRegisters>>,
    bus_master: AtomicBool,
}

/// The device behind a function.
pub struct Target {
    /// Answers the BARs.
    pub registers: Arc<dyn Registers>,
    /// Answers the live capabilities; needed if the description has any.
    pub live: Option<Arc<dyn LiveCapability>>,
    /// Follows the chipset's own registers.
    pub board: Option<Arc<dyn BoardRegisters>>,
}

/// What a chipset function's registers beyond the standard header act on.
pub trait BoardRegisters: Send + Sync {
    /// Called whenever configuration space may have changed, a reset included, with all of it. The caller holds the function's
    /// lock: no call back into PCI.
    fn follow(&self, config: &[u8; super::desc::CONFIG_SIZE]);
}

impl<V: Vm> Function<V> {
    pub(super) fn new(
        owner: &Arc<str>,
        bdf: Bdf,
        desc: &PciFunctionDesc,
        board: &[BoardRegister],
        target: Target,
        wiring: &Wiring<V>,
    ) -> Result<Self> {
        desc.check()?;
        ensure!(
            target.live.is_some() || desc.caps.iter().all(|cap| !cap.live),
            "it has a live capability, but nothing that answers it"
        );
        let pin = if desc.intx { bdf.function() % 4 + 1 } else { 0 };
        let intx = match pin {
            0 => None,
            _ => Some(Intx {
                pin: wiring.lines.link_pin(intx_link(bdf.device(), pin)),
                gsi: intx_gsi(bdf.device(), pin),
                state: Mutex::default(),
            }),
        };
        let device_bars = device_bars(owner, desc, &target.registers, &wiring.decoder);
        let mut windows: Vec<WindowId> = device_bars.iter().map(|bar| bar.window).collect();
        let msix = (desc.msix_vectors > 0).then(|| {
            let msix = Arc::new(Msix::new(
                Arc::clone(owner),
                Arc::clone(&wiring.vm),
                desc.msix_vectors,
            ));
            windows.push(wiring.decoder.add(WindowDesc {
                owner: Arc::from(format!("{owner} MSI-X table")),
                space: Space::Mmio,
                size: msix_layout(desc.msix_vectors).0,
                region: 0,
                target: Arc::clone(&msix) as Arc<dyn Registers>,
            }));
            msix
        });
        Ok(Self {
            owner: Arc::clone(owner),
            bdf,
            config: Mutex::new(ConfigSpace::new(desc, pin, board)),
            windows,
            device_bars,
            decoder: Arc::clone(&wiring.decoder),
            intx,
            msix,
            live: target.live,
            board: target.board,
            bus_master: AtomicBool::new(false),
        })
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose function it is.
    pub fn owner(&self) -> &Arc<str> {
        &self.owner
    }

    /// Where it sits.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// Whether the guest lets the function access memory. A device may hold back until then.
    pub fn bus_master(&self) -> bool {
        self.bus_master.load(Ordering::Acquire)
    }

    /// Whether the guest has enabled MSI-X; if not the function uses [`Function::level`].
    pub fn msix_enabled(&self) -> bool {
        self.msix.as_ref().is_some_and(|msix| msix.enabled())
    }

    fn msix(&self) -> Result<&Msix<V>> {
        self.msix
            .as_deref()
            .with_context(|| format!("{}: it has no MSI-X vectors", self.owner))
    }

    /// The eventfd of an MSI-X vector, valid as long as the function: each count written to it is one interrupt.
    ///
    /// # Errors
    /// No such vector, or out of descriptors.
    pub fn msix_fd(&self, vector: u16) -> Result<BorrowedFd<'_>> {
        self.msix()?.fd(vector)
    }

    /// Raises an MSI-X vector once; while it is masked the interrupt waits.
    ///
    /// # Errors
    /// No such vector, or out of descriptors.
    pub fn raise(&self, vector: u16) -> Result<()> {
        self.msix()?.raise(vector)
    }

    /// Drives the INTx pin.
    ///
    /// # Errors
    /// The function has none.
    pub fn level(&self, high: bool) -> Result<()> {
        let intx = self
            .intx
            .as_ref()
            .with_context(|| format!("{}: it has no INTx pin", self.owner))?;
        intx.change(|state| state.asserted = high);
        Ok(())
    }

    /// Binds guest writes of `width` bytes (0: any) at `offset` of the BAR with this region number to `fd`, wherever
    /// the guest moves the BAR, from when it enables bus mastering. `Ok(false)`: this hypervisor can't, and the write goes to [`Registers::write`].
    ///
    /// # Errors
    /// No such region, not inside it, bound already, or the hypervisor refused.
    pub fn doorbell(
        &self,
        region: u32,
        offset: u64,
        width: u8,
        value: Option<u64>,
        fd: BorrowedFd<'_>,
    ) -> Result<bool> {
        let window = self.doorbell_window(region)?;
        self.decoder.bind(window, offset, width, value, fd)
    }

    /// Ends the binding that [`Function::doorbell`] made with the same numbers: writes go to [`Registers::write`] again.
    ///
    /// # Errors
    /// There is none.
    pub fn end_doorbell(
        &self,
        region: u32,
        offset: u64,
        width: u8,
        value: Option<u64>,
    ) -> Result<()> {
        let window = self.doorbell_window(region)?;
        self.decoder.end(window, offset, width, value)
    }

    fn doorbell_window(&self, region: u32) -> Result<WindowId> {
        let bar = self.device_bars.iter().find(|bar| bar.region == region);
        let bar = bar.with_context(|| {
            format!(
                "{}: a doorbell names region {region}, which is no BAR of it",
                self.owner
            )
        })?;
        Ok(bar.window)
    }

    /// Where the BAR with this region number is decoded now, and its size.
    pub fn placed(&self, region: u32) -> Option<(u64, u64)> {
        let bar = self.device_bars.iter().find(|bar| bar.region == region)?;
        Some((self.decoder.address(bar.window)?, bar.size))
    }

    /// Reads `width` (1, 2 or 4) bytes of configuration space. `multi`: the device has further functions.
    pub(super) fn config_read(&self, register: u16, width: u8, multi: bool) -> u32 {
        let offset = usize::from(register);
        if offset + usize::from(width) > super::desc::CONFIG_SIZE {
            // Extended configuration space: not there, as behind a bridge to conventional PCI.
            return ones(width) as u32;
        }
        if !offset.is_multiple_of(usize::from(width)) {
            return (0..width).fold(0, |value, at| {
                value | self.config_read(register + u16::from(at), 1, multi) << (8 * at)
            });
        }
        let interrupt = self.intx.as_ref().is_some_and(Intx::asserted);
        let parts = self.config().parts(offset, usize::from(width));
        let (mut value, mut shift) = (0, 0);
        for part in parts {
            let (bits, len) = match part {
                Part::Plain { offset, len } => {
                    (self.config().read(offset, len, interrupt, multi), len)
                }
                Part::Live { cap, body, len } => (
                    self.live
                        .as_ref()
                        .map_or(0, |live| live.read(cap, body, len as u8)),
                    len,
                ),
            };
            value |= (bits & ones(len as u8) as u32) << shift;
            shift += 8 * len;
        }
        value
    }

    /// Writes `width` (1, 2 or 4) bytes of configuration space.
    pub(super) fn config_write(&self, register: u16, width: u8, value: u32) {
        let offset = usize::from(register);
        if offset + usize::from(width) > super::desc::CONFIG_SIZE {
            return;
        }
        if !offset.is_multiple_of(usize::from(width)) {
            for at in 0..width {
                self.config_write(register + u16::from(at), 1, value >> (8 * at) & 0xff);
            }
            return;
        }
        let parts = self.config().parts(offset, usize::from(width));
        let mut value = u64::from(value);
        for part in parts {
            let len = match part {
                Part::Plain { offset, len } => {
                    let mut config = self.config();
                    config.write(offset, len, value as u32);
                    self.follow(&config);
                    len
                }
                Part::Live { cap, body, len } => {
                    if let Some(live) = &self.live {
                        live.write(cap, body, len as u8, (value & ones(len as u8)) as u32);
                    }
                    len
                }
            };
            value >>= 8 * len;
        }
    }

    /// Makes windows, INTx and MSI-X agree with configuration space.
    fn follow(&self, config: &ConfigSpace) {
        let command = config.command();
        self.bus_master
            .store(command & COMMAND_MASTER != 0, Ordering::Release);
        let armed = command & COMMAND_MASTER != 0;
        let place = |bar| Placement {
            address: config.decoded(bar),
            armed,
        };
        let places: Vec<_> = config
            .bars()
            .iter()
            .zip(&self.windows)
            .map(|(&bar, &window)| (window, place(bar)))
            .collect();
        self.decoder.place(&places);
        let (enabled, function_masked) = config.msix_control();
        if let Some(intx) = &self.intx {
            // A function that uses MSI-X must not use its pin (PCI 3.0 section 6.8.2.3).
            intx.change(|state| state.silenced = enabled || command & COMMAND_INTX_DISABLE != 0);
        }
        if let Some(msix) = &self.msix {
            msix.control(enabled, function_masked);
        }
        if let Some(board) = &self.board {
            board.follow(config.bytes());
        }
    }

    /// Power-on state. The device resets itself.
    pub(super) fn reset(&self) {
        let mut config = self.config();
        config.reset();
        self.follow(&config);
        if let Some(intx) = &self.intx {
            intx.change(|state| state.asserted = false);
        }
        if let Some(msix) = &self.msix {
            msix.reset();
        }
    }

    /// Its BARs, for whoever assigns addresses.
    pub(super) fn bars(&self) -> Vec<Bar> {
        self.config().bars().to_vec()
    }

    /// First and last address of each memory BAR that has been given one, whether it decodes there yet or not.
    pub(super) fn memory_bars(&self) -> Vec<(u64, u64)> {
        let config = self.config();
        let memory = config.bars().iter().filter(|bar| bar.kind != BarKind::Io);
        memory
            .map(|&bar| (config.address(bar), bar.size))
            .filter(|(address, _)| *address != 0)
            .map(|(address, size)| (address, address.saturating_add(size - 1)))
            .collect()
    }

    /// What firmware does: addresses, interrupt line, decoding on.
    pub(super) fn assign(&self, places: &[(Bar, u64)]) {
        let mut config = self.config();
        let mut enable = 0;
        for &(bar, address) in places {
            config.write(bar_offset(bar.index), 4, address as u32);
            if bar.kind == BarKind::Mmio64 {
                config.write(bar_offset(bar.index) + 4, 4, (address >> 32) as u32);
            }
            enable |= if bar.kind == BarKind::Io {
                COMMAND_IO
            } else {
                COMMAND_MEMORY
            };
        }
        if let Some(intx) = &self.intx {
            config.write(INTERRUPT_LINE, 1, intx.gsi);
        }
        let command = config.command() | enable;
        config.write(COMMAND, 2, u32::from(command));
        self.follow(&config);
    }
}

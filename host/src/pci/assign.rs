//! Places BARs where firmware would have: for kernels that are booted without any.

use std::sync::Arc;

use anyhow::{Result, bail};

use super::config_space::Bar;
use super::desc::BarKind;
use super::function::Function;
use super::root::Root;
use crate::bus::{Bus, Buses};
use crate::hypervisor::Vm;

/// BARs up to this size go below 4 GiB even if they could go above, for guests that map little.
const SMALL: u64 = 16 << 20;

/// A range of addresses for BARs, first and last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aperture {
    /// First address.
    pub first: u64,
    /// Last address.
    pub last: u64,
}

/// Where BARs may go: the windows that the host bridge passes on, as the guest's ACPI tables say too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Apertures {
    /// Ports.
    pub io: Aperture,
    /// Memory below 4 GiB.
    pub mmio32: Aperture,
    /// Memory above RAM.
    pub mmio64: Aperture,
}

/// Hands out one aperture from below, around what others hold on the bus.
struct Allocator {
    next: u64,
    last: u64,
    held: Vec<(u64, u64, String)>,
}

impl Allocator {
    fn new(aperture: Aperture, bus: &Bus) -> Self {
        Self {
            next: aperture.first,
            last: aperture.last,
            held: bus.claims(),
        }
    }

    fn take(&mut self, size: u64) -> Option<u64> {
        let mut address = self.next.checked_next_multiple_of(size)?;
        loop {
            let end = address
                .checked_add(size - 1)
                .filter(|&end| end <= self.last)?;
            match self
                .held
                .iter()
                .find(|(first, last, _)| *first <= end && address <= *last)
            {
                Some((_, last, _)) => {
                    address = last.checked_add(1)?.checked_next_multiple_of(size)?
                }
                None => {
                    self.next = end + 1;
                    return Some(address);
                }
            }
        }
    }
}

impl<V: Vm> Root<V> {
    /// Gives every BAR an address and every pin its line, and turns decoding on. Called while no vCPU runs, after a
    /// [`Root::reset`] again.
    ///
    /// # Errors
    /// An aperture is full: names the device and the BAR.
    pub fn assign_resources(&self, apertures: &Apertures, buses: &Buses) -> Result<()> {
        let functions = self.functions();
        let mut io = Allocator::new(apertures.io, &buses.pio);
        let mut low = Allocator::new(apertures.mmio32, &buses.mmio);
        let mut high = Allocator::new(apertures.mmio64, &buses.mmio);
        let mut all: Vec<(&Arc<Function<V>>, Bar)> = functions
            .iter()
            .flat_map(|function| function.bars().into_iter().map(move |bar| (function, bar)))
            .collect();
        // Largest first: each is aligned to its size, so nothing is wasted between them.
        all.sort_by_key(|(_, bar)| std::cmp::Reverse(bar.size));
        let mut places = Vec::with_capacity(all.len());
        for (function, bar) in all {
            let address = match bar.kind {
                BarKind::Io => io.take(bar.size),
                BarKind::Mmio32 => low.take(bar.size),
                BarKind::Mmio64 if bar.size <= SMALL => {
                    low.take(bar.size).or_else(|| high.take(bar.size))
                }
                BarKind::Mmio64 => high.take(bar.size).or_else(|| low.take(bar.size)),
            };
            let Some(address) = address else {
                bail!(
                    "{} at PCI slot {}: no room for BAR {} ({:?}, {:#x} bytes): use fewer devices",
                    function.owner(),
                    function.bdf(),
                    bar.index,
                    bar.kind,
                    bar.size
                );
            };
            places.push((function.bdf(), bar, address));
        }
        for function in &functions {
            let own: Vec<(Bar, u64)> = places
                .iter()
                .filter(|(bdf, ..)| *bdf == function.bdf())
                .map(|&(_, bar, at)| (bar, at))
                .collect();
            function.assign(&own);
            if function.bdf().function() != 0
                && !functions.iter().any(|other| {
                    other.bdf().device() == function.bdf().device() && other.bdf().function() == 0
                })
            {
                log::warn!(
                    "{} at PCI slot {}: guests won't find it, because nothing is at 0.{}.0",
                    function.owner(),
                    function.bdf(),
                    function.bdf().device()
                );
            }
        }
        Ok(())
    }
}

//! The VM's interrupt routing table: which line or eventfd becomes which interrupt.
//!
//! KVM takes the whole table at once (`KVM_SET_GSI_ROUTING`), so it is kept here: first the fixed routes of the
//! interrupt lines, then one slot per message signalled interrupt.

use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, anyhow};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;

use crate::hypervisor::Msi;

/// I/O APIC pins, which are the first GSIs.
pub const LINES: u32 = 24;
/// `KVM_MAX_IRQ_ROUTES` less room for the lines' own entries.
const MAX_MSI: usize = 4096 - 64;

/// The table. Changes happen when a guest programs an MSI-X table, never per interrupt.
#[derive(Debug, Default)]
pub struct Routing {
    slots: Mutex<Vec<Option<Msi>>>,
}

impl Routing {
    /// Makes KVM use the lines' routes of [`line_routes`] instead of its own.
    pub fn install(&self, vm: &VmFd) -> Result<()> {
        commit(vm, &self.lock())
    }

    /// Adds `msi` and returns its GSI.
    pub fn add(&self, vm: &VmFd, msi: Msi) -> Result<u32> {
        let mut slots = self.lock();
        let free = slots
            .iter()
            .position(Option::is_none)
            .unwrap_or(slots.len());
        if free >= MAX_MSI {
            return Err(anyhow!("All {MAX_MSI} interrupt routes are in use"));
        }
        if free == slots.len() {
            slots.push(None);
        }
        slots[free] = Some(msi);
        if let Err(error) = commit(vm, &slots) {
            slots[free] = None;
            return Err(error);
        }
        Ok(LINES + free as u32)
    }

    /// Changes what `gsi` delivers; nothing happens if it is the same.
    pub fn update(&self, vm: &VmFd, gsi: u32, msi: Msi) -> Result<()> {
        let mut slots = self.lock();
        let slot = (gsi - LINES) as usize;
        let old = slots
            .get(slot)
            .copied()
            .flatten()
            .with_context(|| format!("No interrupt route {gsi}"))?;
        if old == msi {
            return Ok(());
        }
        slots[slot] = Some(msi);
        commit(vm, &slots).inspect_err(|_| slots[slot] = Some(old))
    }

    /// Frees `gsi`. KVM forgets the entry with the table's next change: nothing can trigger it without an irqfd.
    pub fn remove(&self, gsi: u32) {
        if let Some(slot) = self.lock().get_mut((gsi - LINES) as usize) {
            *slot = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Msi>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn commit(vm: &VmFd, slots: &[Option<Msi>]) -> Result<()> {
    let mut entries = line_routes();
    for (slot, msi) in slots.iter().enumerate() {
        if let Some(msi) = msi {
            entries.push(msi_entry(LINES + slot as u32, *msi));
        }
    }
    let table = KvmIrqRouting::from_entries(&entries)
        .map_err(|error| anyhow!("Interrupt routing table: {error:?}"))?;
    vm.set_gsi_routing(&table)
        .context("KVM refused the interrupt routing table")
}

/// As wired on a PC: lines below 16 reach the 8259 pair and the I/O APIC, except that line 0 reaches I/O APIC
/// pin 2 (ACPI's MADT says so in an interrupt source override) and line 2 is the 8259 cascade.
fn line_routes() -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::with_capacity(64);
    for gsi in 0..LINES {
        match gsi {
            0..8 => entries.push(chip_entry(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            8..16 => entries.push(chip_entry(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
            _ => {}
        }
        match gsi {
            0 => entries.push(chip_entry(gsi, KVM_IRQCHIP_IOAPIC, 2)),
            2 => {}
            _ => entries.push(chip_entry(gsi, KVM_IRQCHIP_IOAPIC, gsi)),
        }
    }
    entries
}

fn chip_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

fn msi_entry(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    let mut message = kvm_irq_routing_msi {
        address_lo: msi.address as u32,
        address_hi: (msi.address >> 32) as u32,
        ..Default::default()
    };
    message.data = msi.data;
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi: message },
        ..Default::default()
    }
}

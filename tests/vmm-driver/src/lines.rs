//! Interrupts: the 8259s, the I/O APIC, messages, NMIs.
//!
//! The driver counts who asserts a pin of a chip, each chip for itself; KVM has levels. So each pin of each chip is a line of KVM's of its
//! own. Of the I/O APIC's 32 pins KVM has 24, and nothing drives the rest.
#![allow(unsafe_code)] // the union of chips' states

use std::io;
use std::sync::Mutex;

use kvm_bindings::*;
use kvm_ioctls::VmFd;
use vmm_host::hypervisor::bhyve::abi::*;

use crate::lock;
use crate::machine::Machine;

pub const PICS: [u32; 2] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE];
/// KVM's lines of the 8259s' pins and of the I/O APIC's. Line 0 is the PIT's.
pub const PIC_LINES: u32 = 32;
pub const IOAPIC_LINES: u32 = 64;
const KVM_PINS: u32 = 24;
/// What the PIT has for itself: KVM looks from a pin for the one line that leads there, to learn that the guest has taken a tick.
const PIT_LINES: [u32; 2] = [PIC_LINES, IOAPIC_LINES + 2];
/// Inputs of the 8259s that can only be edges.
const EDGES: u16 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 8 | 1 << 13;

/// How often each pin is asserted, and how the chips were at power-on.
pub struct Lines {
    counts: Mutex<Counts>,
    chips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

#[derive(Default)]
struct Counts {
    pic: [u32; 16],
    ioapic: [u32; IOAPIC_PINS as usize],
    /// 8259s that the guest has programmed.
    ready: [bool; 2],
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Assert,
    Deassert,
    Pulse,
}

impl Lines {
    pub fn new(fd: &VmFd) -> io::Result<Self> {
        let mut entries = Vec::new();
        // The PIT reaches pin 2 of the I/O APIC.
        entries.push(wire(0, KVM_IRQCHIP_PIC_MASTER, 0));
        entries.push(wire(0, KVM_IRQCHIP_IOAPIC, 2));
        for line in (PIC_LINES..)
            .take(16)
            .filter(|line| !PIT_LINES.contains(line))
        {
            let pin = line - PIC_LINES;
            entries.push(wire(line, PICS[pin as usize / 8], pin % 8));
        }
        for line in (IOAPIC_LINES..).take(KVM_PINS as usize) {
            if !PIT_LINES.contains(&line) {
                entries.push(wire(line, KVM_IRQCHIP_IOAPIC, line - IOAPIC_LINES));
            }
        }
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        fd.set_gsi_routing(&routing)?;
        let chip = |chip_id| -> io::Result<kvm_irqchip> { get_chip(fd, chip_id) };
        Ok(Self {
            counts: Mutex::default(),
            chips: [chip(PICS[0])?, chip(PICS[1])?, chip(KVM_IRQCHIP_IOAPIC)?],
            pit: fd.get_pit2()?,
        })
    }
}

impl Lines {
    pub fn pic_levels(&self) -> [u32; 16] {
        lock(&self.counts).pic
    }

    pub fn ioapic_levels(&self) -> [u32; IOAPIC_PINS as usize] {
        lock(&self.counts).ioapic
    }
}

fn wire(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

pub fn get_chip(fd: &VmFd, chip_id: u32) -> io::Result<kvm_irqchip> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    fd.get_irqchip(&mut chip)?;
    Ok(chip)
}

/// Changes a count; `Some`: the level that the line then gets.
fn count(count: &mut u32, change: Change) -> Result<Option<bool>, i32> {
    match change {
        Change::Assert => *count = count.checked_add(1).ok_or(libc::E2BIG)?,
        Change::Deassert => *count = count.checked_sub(1).ok_or(libc::ERANGE)?,
        Change::Pulse => return Ok((*count == 0).then_some(true)),
    }
    let edge = match change {
        Change::Assert => *count == 1,
        _ => *count == 0,
    };
    Ok(edge.then_some(*count > 0))
}

impl Machine {
    pub fn ioapic(&self, request: &VmIoapicIrq, change: Change) -> io::Result<()> {
        let irq = request.irq;
        let pin = u32::try_from(irq).ok().filter(|pin| *pin < IOAPIC_PINS);
        let pin =
            pin.ok_or_else(|| self.misuse(libc::EINVAL, &format!("pin {irq} of the I/O APIC")))?;
        let mut counts = lock(&self.lines.counts);
        let level = count(&mut counts.ioapic[pin as usize], change).map_err(|number| {
            self.misuse(
                number,
                &format!("pin {pin} of the I/O APIC falls too often"),
            )
        })?;
        if pin < KVM_PINS {
            self.drive(IOAPIC_LINES + pin, level, change)?;
        }
        Ok(())
    }

    fn drive(&self, line: u32, level: Option<bool>, change: Change) -> io::Result<()> {
        if let Some(level) = level {
            self.set_line(line, level)?;
        }
        if change == Change::Pulse {
            self.set_line(line, false)?;
        }
        Ok(())
    }

    fn set_line(&self, line: u32, high: bool) -> io::Result<()> {
        match PIT_LINES.contains(&line) {
            true => Ok(()),
            false => Ok(self.fd.set_irq_line(line, high)?),
        }
    }

    pub fn isa(&self, request: &VmIsaIrq, change: Change) -> io::Result<()> {
        let irq = request.atpic_irq;
        let pin = usize::try_from(irq).ok().filter(|pin| *pin < 16);
        let pin =
            pin.ok_or_else(|| self.misuse(libc::EINVAL, &format!("input {irq} of the 8259s")))?;
        let mut counts = lock(&self.lines.counts);
        // One that the guest has not programmed yet ignores all, without counting.
        if self.is_ready(&mut counts, pin / 8)? {
            // The trap that hosts have to mind: not a violation.
            let level = count(&mut counts.pic[pin], change).map_err(crate::errno)?;
            self.drive(PIC_LINES + pin as u32, level, change)?;
        }
        drop(counts);
        match request.ioapic_irq {
            -1 => Ok(()),
            irq => self.ioapic(&VmIoapicIrq { irq }, change),
        }
    }

    /// Whether the guest has given a 8259 its vectors, which are never the first.
    fn is_ready(&self, counts: &mut Counts, chip: usize) -> io::Result<bool> {
        if !counts.ready[chip] {
            let state = get_chip(&self.fd, PICS[chip])?;
            // SAFETY: of these chips, this member is valid.
            let pic = unsafe { state.chip.pic };
            counts.ready[chip] = pic.irq_base != 0 && pic.init_state == 0;
        }
        Ok(counts.ready[chip])
    }

    pub fn isa_trigger(&self, request: &VmIsaIrqTrigger) -> io::Result<()> {
        let irq = request.atpic_irq;
        if !(0..16).contains(&irq) || EDGES >> irq & 1 != 0 {
            return Err(self.misuse(libc::EINVAL, &format!("trigger mode of interrupt {irq}")));
        }
        let mut state = get_chip(&self.fd, PICS[irq as usize / 8])?;
        let bit = 1 << (irq % 8);
        // SAFETY: of these chips, this member is valid.
        let pic = unsafe { &mut state.chip.pic };
        match request.trigger {
            0 => pic.elcr &= !bit,
            1 => pic.elcr |= bit,
            other => return Err(self.misuse(libc::EINVAL, &format!("trigger mode {other}"))),
        }
        Ok(self.fd.set_irqchip(&state)?)
    }

    pub fn message(&self, request: &VmLapicMsi) -> io::Result<()> {
        if request.addr >> 20 != 0xfee {
            let what = format!("a message to {:#x}", request.addr);
            return Err(self.misuse(libc::EINVAL, &what));
        }
        self.fd.signal_msi(kvm_msi {
            address_lo: request.addr as u32,
            data: request.msg as u32,
            ..Default::default()
        })?;
        Ok(())
    }

    pub fn nmi(&self, request: &VmNmi) -> io::Result<()> {
        let id = request.cpuid;
        self.vcpu(id)?;
        // As a message with delivery mode NMI (Intel SDM volume 3, section 11.11.2), which no vCPU has to be stopped for.
        self.message(&VmLapicMsi {
            addr: 0xfee0_0000 | (id as u64) << 12,
            msg: 4 << 8,
        })
    }

    /// As they come with another VM's state.
    pub fn set_pic_levels(&self, levels: [u32; 16]) -> io::Result<()> {
        let mut counts = lock(&self.lines.counts);
        for (line, level) in (PIC_LINES..).zip(levels) {
            self.set_line(line, level > 0)?;
        }
        counts.pic = levels;
        Ok(())
    }

    /// Likewise.
    pub fn set_ioapic_levels(&self, levels: [u32; IOAPIC_PINS as usize]) -> io::Result<()> {
        let mut counts = lock(&self.lines.counts);
        for (line, level) in (IOAPIC_LINES..IOAPIC_LINES + KVM_PINS).zip(levels) {
            self.set_line(line, level > 0)?;
        }
        counts.ioapic = levels;
        Ok(())
    }

    /// As the chips are made again by `VM_REINIT`.
    pub fn reinit_chips(&self) -> io::Result<()> {
        let mut counts = lock(&self.lines.counts);
        for line in (0..16).map(|pin| PIC_LINES + pin) {
            self.set_line(line, false)?;
        }
        for line in (0..KVM_PINS).map(|pin| IOAPIC_LINES + pin) {
            self.set_line(line, false)?;
        }
        *counts = Counts::default();
        for chip in &self.lines.chips {
            self.fd.set_irqchip(chip)?;
        }
        Ok(self.fd.set_pit2(&self.lines.pit)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_follow_counts() {
        let mut pin = 0;
        assert_eq!(count(&mut pin, Change::Assert), Ok(Some(true)));
        assert_eq!(count(&mut pin, Change::Assert), Ok(None));
        assert_eq!(count(&mut pin, Change::Pulse), Ok(None));
        assert_eq!(count(&mut pin, Change::Deassert), Ok(None));
        assert_eq!(count(&mut pin, Change::Deassert), Ok(Some(false)));
        assert_eq!(count(&mut pin, Change::Deassert), Err(libc::ERANGE));
    }
}

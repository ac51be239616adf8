//! The states of the VM's chips and of its time, between KVM's forms and the driver's.
#![allow(unsafe_code)] // the union of chips' states

use std::io;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use kvm_bindings::*;
use vmm_host::hypervisor::bhyve::abi::data::*;

use crate::errno;
use crate::lines::{PICS, get_chip};
use crate::lock;
use crate::machine::Machine;

impl Machine {
    pub fn read_ioapic(&self) -> io::Result<VdiIoapic> {
        let chip = get_chip(&self.fd, KVM_IRQCHIP_IOAPIC)?;
        // SAFETY: of this chip, this member is valid.
        let state = unsafe { chip.chip.ioapic };
        let mut ioapic = VdiIoapic {
            id: state.id,
            reg_sel: state.ioregsel,
            ..Default::default()
        };
        for (to, from) in ioapic.pin_reg.iter_mut().zip(state.redirtbl) {
            // SAFETY: an entry is its bits.
            *to = unsafe { from.bits };
        }
        ioapic.pin_level = self.lines.ioapic_levels();
        Ok(ioapic)
    }

    pub fn write_ioapic(&self, ioapic: &VdiIoapic) -> io::Result<()> {
        let mut chip = get_chip(&self.fd, KVM_IRQCHIP_IOAPIC)?;
        // SAFETY: of this chip, this member is valid.
        let state = unsafe { &mut chip.chip.ioapic };
        (state.id, state.ioregsel) = (ioapic.id, ioapic.reg_sel);
        for (to, from) in state.redirtbl.iter_mut().zip(ioapic.pin_reg) {
            to.bits = from;
        }
        self.fd.set_irqchip(&chip)?;
        self.set_ioapic_levels(ioapic.pin_level)
    }

    pub fn read_atpic(&self) -> io::Result<VdiAtpic> {
        let mut atpic = VdiAtpic::default();
        let levels = self.lines.pic_levels();
        for (index, chip) in atpic.chip.iter_mut().enumerate() {
            let state = get_chip(&self.fd, PICS[index])?;
            // SAFETY: of these chips, this member is valid.
            let pic = unsafe { state.chip.pic };
            *chip = VdiAtpicChip {
                icw_state: pic.init_state,
                status: u8::from(pic.irq_base != 0),
                irr: pic.irr,
                isr: pic.isr,
                imr: pic.imr,
                irq_base: pic.irq_base,
                lowprio: pic.priority_add,
                elc: pic.elcr,
                ..Default::default()
            };
            chip.level.copy_from_slice(&levels[index * 8..][..8]);
        }
        Ok(atpic)
    }

    pub fn write_atpic(&self, atpic: &VdiAtpic) -> io::Result<()> {
        let mut levels = [0; 16];
        for (index, chip) in atpic.chip.iter().enumerate() {
            let mut state = get_chip(&self.fd, PICS[index])?;
            // SAFETY: of these chips, this member is valid.
            let pic = unsafe { &mut state.chip.pic };
            (pic.irr, pic.isr, pic.imr) = (chip.irr, chip.isr, chip.imr);
            (pic.irq_base, pic.priority_add) = (chip.irq_base, chip.lowprio);
            (pic.elcr, pic.init_state) = (chip.elc, chip.icw_state);
            self.fd.set_irqchip(&state)?;
            levels[index * 8..][..8].copy_from_slice(&chip.level);
        }
        self.set_pic_levels(levels)
    }

    pub fn read_atpit(&self) -> io::Result<VdiAtpit> {
        let state = self.fd.get_pit2()?;
        let mut atpit = VdiAtpit::default();
        for (to, from) in atpit.channel.iter_mut().zip(state.channels) {
            (to.initial, to.mode) = (from.count as u16, from.mode);
        }
        Ok(atpit)
    }

    /// Channels begin to count anew.
    pub fn write_atpit(&self, atpit: &VdiAtpit) -> io::Result<()> {
        let mut state = self.fd.get_pit2()?;
        for (to, from) in state.channels.iter_mut().zip(atpit.channel) {
            to.mode = from.mode;
            to.count = match from.initial {
                0 => 0x1_0000,
                count => count.into(),
            };
        }
        Ok(self.fd.set_pit2(&state)?)
    }

    pub fn time(&self) -> io::Result<VdiTimeInfo> {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH);
        let wall = wall.unwrap_or_default();
        let since_boot = self.since_boot() as i64;
        let hrtime = wall.as_nanos() as i64;
        let mut frequency = 0;
        if let Some(vcpu) = self.vcpus().next() {
            let (cpu, _turn) = vcpu.freeze();
            frequency = u64::from(cpu.fd.get_tsc_khz().unwrap_or(0)) * 1000;
        }
        Ok(VdiTimeInfo {
            guest_freq: frequency,
            guest_tsc: 0,
            boot_hrtime: hrtime - since_boot,
            hrtime,
            hres_sec: wall.as_secs(),
            hres_ns: wall.subsec_nanos().into(),
        })
    }

    /// Of the time, the boot: KVM's TSC goes on.
    pub fn set_time(&self, time: &VdiTimeInfo) -> io::Result<()> {
        let now = self.time()?;
        if time.hrtime > now.hrtime || time.boot_hrtime > now.hrtime {
            return Err(self.misuse(libc::EINVAL, "a time that is still to come"));
        }
        if time.guest_freq != now.guest_freq {
            return Err(errno(libc::EPERM));
        }
        let age = (now.hrtime - time.boot_hrtime).unsigned_abs();
        let boot = Instant::now().checked_sub(std::time::Duration::from_nanos(age));
        *lock(&self.boot) = boot.ok_or(errno(libc::EINVAL))?;
        Ok(())
    }
}

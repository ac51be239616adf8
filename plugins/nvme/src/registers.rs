//! The controller's registers (section 3.1), apart from the doorbells.
//!
//! Each is one atomic word: vCPU threads write what they are told and wake the admin thread, which acts on it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::interrupts::Interrupts;

/// Most entries of a queue.
pub(crate) const MAX_ENTRIES: u32 = 1024;
/// `CAP.TO`: half seconds that enabling and disabling may take. The backend has to finish what it has.
const TIMEOUT: u64 = 60;

const CAP: u64 = 0x00;
const VS: u64 = 0x08;
const INTMS: u64 = 0x0c;
const INTMC: u64 = 0x10;
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;

/// Version 1.4.0.
pub(crate) const VERSION: u32 = 0x0001_0400;

/// `CSTS.RDY`.
pub(crate) const READY: u32 = 1;
/// `CSTS.CFS`.
pub(crate) const FATAL: u32 = 2;
/// `CSTS.SHST`: shutdown is under way, is complete.
pub(crate) const SHUTTING_DOWN: u32 = 1 << 2;
pub(crate) const SHUT_DOWN: u32 = 2 << 2;
const SHUTDOWN_STATUS: u32 = 3 << 2;
/// One reset in [`Registers::csts`].
const RESET: u64 = 1 << 32;

/// The controller configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Configuration(u32);

impl Configuration {
    pub(crate) fn enabled(self) -> bool {
        self.0 & 1 != 0
    }

    /// Whether it asks for nothing that the controller lacks: the NVM command set, 4 KiB pages, round robin.
    pub(crate) fn supported(self) -> bool {
        self.0 & 0x3ff0 == 0
    }

    /// Whether I/O queues have entries of 64 and 16 bytes.
    pub(crate) fn entry_sizes_fit(self) -> bool {
        self.0 >> 16 & 0xff == 0x46
    }

    fn shutdown(self) -> u32 {
        self.0 >> 14 & 3
    }
}

/// What a write asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    None,
    /// The admin thread has something to look at.
    Wake,
}

/// The registers.
#[derive(Default)]
pub(crate) struct Registers {
    cc: AtomicU32,
    /// `CSTS` in the lower half. In the upper half the number of controller resets that the guest has asked for, in the same word,
    /// so that the status of what was before a reset never shows after it.
    csts: AtomicU64,
    aqa: AtomicU32,
    asq: AtomicU64,
    acq: AtomicU64,
    /// The guest has announced a shutdown.
    shutdown: AtomicBool,
}

fn low(word: &AtomicU64, value: u32) {
    // One vCPU sets up a controller: two that write halves at once get one of both.
    let old = word.load(Ordering::Relaxed);
    let value = old & !0xffff_ffff | u64::from(value & !0xfff);
    word.store(value, Ordering::Release);
}

fn high(word: &AtomicU64, value: u32) {
    let old = word.load(Ordering::Relaxed);
    word.store(
        old & 0xffff_ffff | u64::from(value) << 32,
        Ordering::Release,
    );
}

impl Registers {
    /// `width` bytes at `offset`, below the doorbells.
    pub(crate) fn read(&self, offset: u64, width: u32, interrupts: &Interrupts) -> u64 {
        let word = |at: u64| -> u32 {
            match at {
                // MQES, CQR, TO; DSTRD 0; CSS: NVM; MPSMIN and MPSMAX 4 KiB.
                CAP => (MAX_ENTRIES - 1) | 1 << 16 | (TIMEOUT as u32) << 24,
                4 => 1 << (37 - 32),
                VS => VERSION,
                INTMS | INTMC => interrupts.mask(),
                CC => self.cc.load(Ordering::Acquire),
                CSTS => self.csts.load(Ordering::Acquire) as u32,
                AQA => self.aqa.load(Ordering::Acquire),
                ASQ => self.asq.load(Ordering::Acquire) as u32,
                0x2c => (self.asq.load(Ordering::Acquire) >> 32) as u32,
                ACQ => self.acq.load(Ordering::Acquire) as u32,
                0x34 => (self.acq.load(Ordering::Acquire) >> 32) as u32,
                _ => 0,
            }
        };
        let at = offset & !3;
        let both = u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let shifted = both >> (8 * (offset - at));
        if width >= 8 {
            shifted
        } else {
            shifted & ((1 << (8 * width)) - 1)
        }
    }

    /// A write of `width` bytes below the doorbells. Section 3.1: accesses have the size of the register or of its halves.
    pub(crate) fn write(
        &self,
        offset: u64,
        width: u32,
        value: u64,
        interrupts: &Interrupts,
    ) -> Effect {
        match (width, offset % 4) {
            (4, 0) => self.write_word(offset, value as u32, interrupts),
            (8, 0) => {
                let first = self.write_word(offset, value as u32, interrupts);
                let second = self.write_word(offset + 4, (value >> 32) as u32, interrupts);
                if first == Effect::None { second } else { first }
            }
            _ => Effect::None,
        }
    }

    fn write_word(&self, offset: u64, value: u32, interrupts: &Interrupts) -> Effect {
        match offset {
            INTMS => interrupts.set_mask(value, true),
            INTMC => interrupts.set_mask(value, false),
            CC => return self.configure(value),
            AQA => self.aqa.store(value & 0x0fff_0fff, Ordering::Release),
            ASQ => low(&self.asq, value),
            0x2c => high(&self.asq, value),
            ACQ => low(&self.acq, value),
            0x34 => high(&self.acq, value),
            _ => {}
        }
        Effect::None
    }

    fn configure(&self, value: u32) -> Effect {
        let new = Configuration(value & 0x00ff_fff1);
        let old = Configuration(self.cc.swap(new.0, Ordering::AcqRel));
        if old.enabled() && !new.enabled() {
            // A reset ends a shutdown that has not been finished.
            self.shutdown.store(false, Ordering::Release);
            self.csts.fetch_add(RESET, Ordering::AcqRel);
        }
        if old.shutdown() == 0 && new.shutdown() != 0 {
            self.set_shutdown_status(SHUTTING_DOWN);
            self.shutdown.store(true, Ordering::Release);
        }
        Effect::Wake
    }

    pub(crate) fn configuration(&self) -> Configuration {
        Configuration(self.cc.load(Ordering::Acquire))
    }

    /// How often the guest has disabled the controller. Asked for before [`Registers::configuration`].
    pub(crate) fn resets(&self) -> u64 {
        self.csts.load(Ordering::Acquire) / RESET
    }

    /// Whether the guest has announced a shutdown since the last call.
    pub(crate) fn take_shutdown(&self) -> bool {
        self.shutdown.swap(false, Ordering::AcqRel)
    }

    /// Sets bits of `CSTS`, unless the guest has disabled the controller since there were `resets`: a driver that has enabled it
    /// again would take what is said of the one before for its own.
    pub(crate) fn add_status(&self, bits: u32, resets: u64) {
        let update = |csts| (csts / RESET == resets).then_some(csts | u64::from(bits));
        // A refusal needs nothing: the reset is still to be carried out.
        let _ = self
            .csts
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, update);
    }

    pub(crate) fn set_shutdown_status(&self, status: u32) {
        let update = |csts| Some(csts & !u64::from(SHUTDOWN_STATUS) | u64::from(status));
        // The closure never refuses.
        let _ = self
            .csts
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, update);
    }

    /// `CSTS` as after a controller reset.
    pub(crate) fn clear_status(&self) {
        self.csts.fetch_and(!(RESET - 1), Ordering::AcqRel);
    }

    /// Address and entries of the admin submission queue.
    pub(crate) fn admin_submission(&self) -> (u64, u32) {
        let entries = self.aqa.load(Ordering::Acquire) & 0xfff;
        (self.asq.load(Ordering::Acquire), entries + 1)
    }

    /// Address and entries of the admin completion queue.
    pub(crate) fn admin_completion(&self) -> (u64, u32) {
        let entries = self.aqa.load(Ordering::Acquire) >> 16 & 0xfff;
        (self.acq.load(Ordering::Acquire), entries + 1)
    }

    /// Power-on state.
    pub(crate) fn power_on(&self) {
        self.cc.store(0, Ordering::Release);
        self.clear_status();
        self.aqa.store(0, Ordering::Release);
        self.asq.store(0, Ordering::Release);
        self.acq.store(0, Ordering::Release);
        self.shutdown.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver that disables the controller before it is ready, and enables it again, must not see the first as its own.
    #[test]
    fn what_was_before_a_reset_is_not_said_after_it() {
        let registers = Registers::default();
        let status = || registers.csts.load(Ordering::Acquire) as u32;
        registers.configure(1);
        let resets = registers.resets();
        registers.configure(0);
        registers.configure(1);
        registers.add_status(READY, resets);
        assert_eq!(status(), 0);
        registers.add_status(READY, registers.resets());
        assert_eq!(status(), READY);
        registers.configure(1 | 1 << 14);
        assert_eq!(status(), READY | SHUTTING_DOWN);
        registers.set_shutdown_status(SHUT_DOWN);
        assert_eq!(status(), READY | SHUT_DOWN);
        registers.clear_status();
        assert_eq!((status(), registers.resets()), (0, 1));
    }
}

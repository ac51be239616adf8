//! Making a vCPU leave the guest from another thread.
//!
//! `VM_VCPU_BARRIER` pushes out a vCPU that is in the kernel, and does nothing to one that is about to enter: so the vCPU says when
//! it goes in, before it looks for a kick a last time, and who kicks repeats the request until it has come out once. The request is
//! made for one vCPU: the kernel mishandles "all".

use std::sync::Weak;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::node;
use super::vcpu::Shared;
use crate::hypervisor::Kick;

/// How often, and with what pause, a vCPU is pushed that does not come out. Its thread may have to wait for a processor.
const PUSHES: u32 = 20_000;
const QUICK: u32 = 32;
const PAUSE: Duration = Duration::from_micros(100);

/// Shared by a vCPU and those who kick it, who may outlive the VM.
pub(super) struct BhyveKick {
    vm: Weak<Shared>,
    vcpu: usize,
    wanted: AtomicBool,
    /// Entries and returns: odd while the vCPU is in the kernel, or about to be.
    passes: AtomicU64,
    exits: AtomicU64,
}

impl BhyveKick {
    pub(super) fn new(vm: Weak<Shared>, vcpu: usize) -> Self {
        Self {
            vm,
            vcpu,
            wanted: AtomicBool::new(false),
            passes: AtomicU64::new(0),
            exits: AtomicU64::new(0),
        }
    }

    /// The vCPU's thread enters the kernel now. Whether it is to leave it as soon as no instruction is half done.
    pub(super) fn enter(&self) -> bool {
        self.passes.fetch_add(1, Ordering::SeqCst);
        self.wanted.load(Ordering::SeqCst)
    }

    /// It has left the kernel.
    pub(super) fn left(&self) {
        self.passes.fetch_add(1, Ordering::SeqCst);
    }

    /// Takes the request to leave. What the kicker wrote before the kick is visible afterwards.
    pub(super) fn take(&self) {
        self.wanted.swap(false, Ordering::SeqCst);
    }

    /// Counts one exit; only the vCPU's own thread does.
    pub(super) fn count(&self) {
        let exits = self.exits.load(Ordering::Relaxed).wrapping_add(1);
        self.exits.store(exits, Ordering::Relaxed);
    }

    /// Pushes until the vCPU has come out once. `push` says whether it is of use.
    fn push_out(&self, mut push: impl FnMut() -> bool) {
        self.wanted.store(true, Ordering::SeqCst);
        let before = self.passes.load(Ordering::SeqCst);
        // Outside: it sees the request when it enters. That is so for a vCPU's own thread, and the thread of one that kicks another.
        if before.is_multiple_of(2) {
            return;
        }
        for attempt in 0..PUSHES {
            if !push() || self.passes.load(Ordering::SeqCst) != before {
                return;
            }
            match attempt {
                ..QUICK => std::thread::yield_now(),
                _ => std::thread::sleep(PAUSE),
            }
        }
        log::warn!("vCPU {} does not leave its guest", self.vcpu);
    }
}

impl Kick for BhyveKick {
    fn kick(&self) {
        let Some(vm) = self.vm.upgrade() else {
            return;
        };
        self.push_out(|| vm.node.number(node::VCPU_BARRIER, self.vcpu).is_ok());
    }

    fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_that_is_outside_is_not_pushed() {
        let kick = BhyveKick::new(Weak::new(), 0);
        kick.push_out(|| panic!("nobody is in there"));
        assert!(kick.enter(), "it sees the kick when it enters");
        kick.left();
        kick.take();
        assert!(!kick.enter());
    }

    #[test]
    fn one_that_was_about_to_enter_is_pushed_again() {
        let kick = BhyveKick::new(Weak::new(), 0);
        assert!(!kick.enter());
        let mut pushes = 0;
        kick.push_out(|| {
            pushes += 1;
            // The first push came too early.
            if pushes == 2 {
                kick.left();
            }
            true
        });
        assert_eq!(pushes, 2);
        let mut pushes = 0;
        assert!(kick.enter());
        kick.push_out(|| {
            pushes += 1;
            false
        });
        assert_eq!(pushes, 1, "the VM is gone");
    }
}

//! Model-specific registers that the hypervisor does not know: they read as 0 and ignore writes.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// The most numbers that are logged: a guest may try all 2^32.
const LOGGED: usize = 256;

/// Answers for the registers that nobody has, for all CPUs of a VM.
#[derive(Debug, Default)]
pub struct UnknownMsrs(Mutex<BTreeSet<u32>>);

impl UnknownMsrs {
    /// The guest reads register `index`.
    pub fn read(&self, index: u32) -> u64 {
        if self.is_new(index) {
            log::debug!("no MSR {index:#x}: a read gives 0");
        }
        0
    }

    /// The guest writes `value` to register `index`.
    pub fn write(&self, index: u32, value: u64) {
        if self.is_new(index) {
            log::debug!("no MSR {index:#x}: {value:#x} dropped");
        }
    }

    /// Whether the register is to be logged: each is once, as long as there are not too many.
    fn is_new(&self, index: u32) -> bool {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = seen.len() < LOGGED && seen.insert(index);
        if new && seen.len() == LOGGED {
            log::debug!("more unknown MSRs are not logged");
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_logged_once_and_not_without_end() {
        let msrs = UnknownMsrs::default();
        assert!(msrs.is_new(0x140));
        assert_eq!(msrs.read(0x140), 0);
        msrs.write(0x140, 1);
        assert!(!msrs.is_new(0x140) && msrs.is_new(0x141));
        (0..10_000).for_each(|index| msrs.write(index, 0));
        assert_eq!(msrs.0.lock().unwrap().len(), LOGGED);
        assert!(!msrs.is_new(0xffff_ffff));
    }
}

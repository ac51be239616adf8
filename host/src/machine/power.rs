//! How anything asks for the end of the VM's present life: a reset, power off, or a stop from outside.
//!
//! Whoever asks never acts: it reports a [`VmEvent`], and the thread that owns the VM decides by the exit policy.

use std::sync::Arc;

/// What happened to the VM as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// The guest asked for a reset (port 0xcf9, ACPI reset register, keyboard controller), or a device did.
    Reset,
    /// The guest turned its power off (ACPI S5).
    PowerOff,
    /// Every CPU waits in HLT with interrupts disabled: the guest ended without turning off its power.
    Halt,
    /// A CPU shut down after a fault while it delivered a double fault (Intel SDM volume 3, section 6.15).
    TripleFault,
    /// Another process has destroyed the VM.
    Destroyed,
    /// The hypervisor can't go on.
    Crash {
        /// The CPU that failed.
        cpu: u32,
        /// What happened, in words, with registers where they are known.
        text: String,
    },
    /// A device or backend has failed for good, and its `on_fault` says that the VM stops.
    Fault {
        /// Whose it is; what happened has been logged.
        text: String,
    },
    /// A device says that the guest is beyond help.
    Failure {
        /// Which device, and what it says.
        text: String,
    },
    /// Someone outside the guest wants the VM to stop at once.
    Stop,
}

/// Reports a [`VmEvent`]. Callable on any thread, vCPU threads included: it must not block.
pub type EventSender = Arc<dyn Fn(VmEvent) + Send + Sync>;

//! A VM's node, and its requests with the types of their arguments.

#![allow(unsafe_code)] // ioctls

use std::io;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::ptr;

use super::abi::*;
use super::driver::{Driver, Instance};

/// A request whose argument is a structure without pointers.
pub(super) struct Request<T> {
    number: i32,
    argument: PhantomData<fn(&mut T)>,
}

/// A request whose argument is a number, or which has none.
#[derive(Clone, Copy)]
pub(super) struct NumberRequest(i32);

/// The table of requests whose arguments have no pointers: only here is one paired with its structure.
macro_rules! requests {
    ($($name:ident: $argument:ty = $number:ident;)*) => {$(
        pub(super) const $name: Request<$argument> = Request { number: $number, argument: PhantomData };
    )*};
}

requests! {
    CREATE_VM: VmCreateReq = VMM_CREATE_VM;
    DESTROY_VM: VmDestroyReq = VMM_DESTROY_VM;
    RESV_QUERY: VmmResvQuery = VMM_RESV_QUERY;
    RESV_SET_TARGET: VmmResvTarget = VMM_RESV_SET_TARGET;
    SET_SEGMENT: VmSegDesc = VM_SET_SEGMENT_DESCRIPTOR;
    GET_SEGMENT: VmSegDesc = VM_GET_SEGMENT_DESCRIPTOR;
    SET_CAPABILITY: VmCapability = VM_SET_CAPABILITY;
    SET_X2APIC: VmX2apic = VM_SET_X2APIC_STATE;
    GLA2GPA_NOFAULT: VmGla2gpa = VM_GLA2GPA_NOFAULT;
    ACTIVATE_CPU: i32 = VM_ACTIVATE_CPU;
    RESET_CPU: VmVcpuReset = VM_RESET_CPU;
    GET_RUN_STATE: VmRunState = VM_GET_RUN_STATE;
    SET_RUN_STATE: VmRunState = VM_SET_RUN_STATE;
    LEGACY_CPUID: VmLegacyCpuid = VM_LEGACY_CPUID;
    REINIT: VmReinit = VM_REINIT;
    ALLOC_MEMSEG: VmMemseg = VM_ALLOC_MEMSEG;
    MMAP_MEMSEG: VmMemmap = VM_MMAP_MEMSEG;
    MUNMAP_MEMSEG: VmMunmap = VM_MUNMAP_MEMSEG;
    DEVMEM_GETOFFSET: VmDevmemOffset = VM_DEVMEM_GETOFFSET;
    LAPIC_MSI: VmLapicMsi = VM_LAPIC_MSI;
    IOAPIC_ASSERT: VmIoapicIrq = VM_IOAPIC_ASSERT_IRQ;
    IOAPIC_DEASSERT: VmIoapicIrq = VM_IOAPIC_DEASSERT_IRQ;
    ISA_ASSERT: VmIsaIrq = VM_ISA_ASSERT_IRQ;
    ISA_DEASSERT: VmIsaIrq = VM_ISA_DEASSERT_IRQ;
    ISA_SET_TRIGGER: VmIsaIrqTrigger = VM_ISA_SET_IRQ_TRIGGER;
    INJECT_NMI: VmNmi = VM_INJECT_NMI;
    RTC_WRITE: VmRtcData = VM_RTC_WRITE;
    RTC_SETTIME: Timespec = VM_RTC_SETTIME;
    GET_TOPOLOGY: VmCpuTopology = VM_GET_TOPOLOGY;
    STATS: VmStats = VM_STATS_IOC;
    STAT_DESC: VmStatDesc = VM_STAT_DESC;
}

pub(super) const INTERFACE_VERSION: NumberRequest = NumberRequest(VMM_INTERFACE_VERSION);
pub(super) const SET_AUTODESTRUCT: NumberRequest = NumberRequest(VM_SET_AUTODESTRUCT);
pub(super) const DESTROY_SELF: NumberRequest = NumberRequest(VM_DESTROY_SELF);
pub(super) const PAUSE: NumberRequest = NumberRequest(VM_PAUSE);
pub(super) const RESUME: NumberRequest = NumberRequest(VM_RESUME);
pub(super) const PMTMR_LOCATE: NumberRequest = NumberRequest(VM_PMTMR_LOCATE);
pub(super) const VCPU_BARRIER: NumberRequest = NumberRequest(VM_VCPU_BARRIER);

/// One request to the control node.
pub(super) fn control<D: Driver, T>(
    driver: &D,
    request: &Request<T>,
    argument: &mut T,
) -> io::Result<i32> {
    // SAFETY: the table above pairs the request with its structure, which has no pointers and is borrowed for the call.
    unsafe { driver.ioctl(request.number, ptr::from_mut(argument).cast()) }
}

/// One request with a number to the control node.
pub(super) fn control_number<D: Driver>(
    driver: &D,
    request: NumberRequest,
    value: usize,
) -> io::Result<i32> {
    // SAFETY: the request takes a number.
    unsafe { driver.ioctl(request.0, ptr::without_provenance_mut(value)) }
}

/// Whether `error` says that the VM is no more: another process has destroyed it, since this one lets go of it last.
pub(super) fn is_destroyed(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENXIO)
}

/// The node of a VM that this process has made. The VM ends with it.
pub(super) struct Node {
    instance: Box<dyn Instance>,
}

impl Node {
    pub(super) fn new(instance: impl Instance) -> Self {
        Self {
            instance: Box::new(instance),
        }
    }

    /// One request.
    pub(super) fn request<T>(&self, request: &Request<T>, argument: &mut T) -> io::Result<i32> {
        // SAFETY: the table above pairs the request with its structure, which has no pointers and is borrowed for the call.
        unsafe { self.raw(request.number, argument) }
    }

    /// One request with a number.
    pub(super) fn number(&self, request: NumberRequest, value: usize) -> io::Result<i32> {
        // SAFETY: the request takes a number.
        unsafe {
            self.instance
                .ioctl(request.0, ptr::without_provenance_mut(value))
        }
    }

    /// One request whose argument has pointers.
    ///
    /// # Safety
    /// `request` takes a `T`, and what its pointers point to is as large as it says, valid and unshared until the call returns.
    pub(super) unsafe fn raw<T>(&self, request: i32, argument: &mut T) -> io::Result<i32> {
        // SAFETY: by this function's contract.
        unsafe { self.instance.ioctl(request, ptr::from_mut(argument).cast()) }
    }

    /// What to map to see `len` bytes at `offset`, see [`Instance::file`].
    pub(super) fn file(&self, offset: u64, len: usize) -> io::Result<(BorrowedFd<'_>, u64)> {
        self.instance.file(offset, len)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Not by name: that would wait for the very descriptor that is still open here. If it fails the VM goes with its last
        // descriptor (VM_SET_AUTODESTRUCT), or is gone.
        let _ = self.number(DESTROY_SELF, 0);
    }
}

//! Making a vCPU leave the guest from another thread.
//!
//! `immediate_exit` in the shared run page ends the next `KVM_RUN`; a signal ends one that is under way. The flag is
//! set first, so a kick is never lost between the two.
#![allow(unsafe_code)] // maps the run page a second time and sends a signal to one thread

use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU64, Ordering};

use anyhow::{Context, Result};
use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags};

use crate::hypervisor::Kick;

const PAGE: usize = 4096;

/// Shared by a vCPU and those who kick it. Has a mapping of its own of the run page, so it may outlive the vCPU.
#[derive(Debug)]
pub struct KvmKick {
    page: NonNull<u8>,
    thread: AtomicI32,
    exits: AtomicU64,
}

// SAFETY: the only field that is not Sync by itself is `page`, of which one byte is used, atomically.
unsafe impl Send for KvmKick {}
// SAFETY: as above.
unsafe impl Sync for KvmKick {}

impl KvmKick {
    /// Prepares kicks for `vcpu`.
    pub fn new(vcpu: &VcpuFd) -> Result<Self> {
        install_handler();
        // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let page =
            unsafe { rustix::mm::mmap(ptr::null_mut(), PAGE, prot, MapFlags::SHARED, fd, 0) }
                .context("Cannot map the vCPU's run page")?;
        let page = NonNull::new(page.cast()).context("Cannot map the vCPU's run page")?;
        Ok(Self {
            page,
            thread: AtomicI32::new(0),
            exits: AtomicU64::new(0),
        })
    }

    /// The calling thread runs the vCPU from now on.
    pub fn adopt(&self) {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        if self.thread.swap(thread, Ordering::AcqRel) != thread {
            unblock_signal();
        }
    }

    /// No thread runs the vCPU any more.
    pub fn abandon(&self) {
        self.thread.store(0, Ordering::Release);
    }

    /// Takes the request to leave, once seen. What the kicker wrote before the kick is visible afterwards.
    pub fn take(&self) {
        self.immediate_exit().swap(0, Ordering::AcqRel);
    }

    /// Counts one exit; only the vCPU's own thread does.
    pub fn count(&self) {
        self.exits.store(
            self.exits.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Relaxed,
        );
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the page that `self` maps, and KVM and we access it as a single byte.
        unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(offset_of!(kvm_run, immediate_exit))) }
    }
}

impl Kick for KvmKick {
    fn kick(&self) {
        self.immediate_exit().store(1, Ordering::Release);
        // A full barrier between the flag and reading who runs, or a thread that starts running now might miss both.
        std::sync::atomic::fence(Ordering::SeqCst);
        let thread = self.thread.load(Ordering::Acquire);
        if thread != 0 {
            let process = rustix::process::getpid().as_raw_nonzero().get();
            // SAFETY: tgkill takes plain numbers. Should the thread have ended meanwhile, another thread of this process
            // at worst runs the empty handler.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGRTMIN()) };
        }
    }

    fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }
}

impl Drop for KvmKick {
    fn drop(&mut self) {
        // SAFETY: the page is `self`'s own mapping, and nothing borrows it past `self`.
        let _ = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

extern "C" fn on_signal(_: libc::c_int) {}

/// KVM_RUN returns EINTR for any handled signal. SA_RESTART is set all the same: it doesn't apply to KVM_RUN, and
/// spares a device that happens to be in a system call on a vCPU thread from seeing EINTR.
fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is valid; the handler does nothing, so it is safe in any context.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(libc::SIGRTMIN(), &action, ptr::null_mut());
        }
    });
}

/// A host that blocks signals to take them on one thread hands that mask down to the threads it makes.
fn unblock_signal() {
    // SAFETY: an all-zero sigset_t is valid and then initialised; only the calling thread's mask changes.
    unsafe {
        let mut set: libc::sigset_t = MaybeUninit::zeroed().assume_init();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGRTMIN());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
    }
}

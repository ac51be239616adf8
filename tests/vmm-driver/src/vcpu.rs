//! A vCPU: who holds it, and how it is made to leave the guest.
//!
//! Whoever changes a vCPU holds its turn, which keeps it from entering the guest again, kicks it out, and then holds its state.
#![allow(unsafe_code)] // maps the run page a second time, sends a signal to one thread

use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, Once};

use kvm_bindings::{kvm_lapic_state, kvm_run, kvm_sregs};
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags};
use vmm_host::hypervisor::bhyve::abi::VcpuCpuidEntry;

use crate::access::Access;
use crate::lock;

const PAGE: usize = 4096;

pub struct Vcpu {
    pub id: i32,
    turn: Mutex<()>,
    state: Mutex<Cpu>,
    pub kick: Kick,
    pub active: AtomicBool,
    /// Held by `VM_SUSPEND_CPU`.
    pub held: AtomicBool,
    /// Was in HLT with interrupts off when it left the guest last.
    pub halted: AtomicBool,
}

/// What only its holder may touch.
pub struct Cpu {
    pub id: i32,
    pub fd: VcpuFd,
    /// KVM has an access to complete.
    pub unsettled: bool,
    /// Control registers and segments that the guest will have when it runs: KVM takes only those together that fit together.
    pub staged: Option<kvm_sregs>,
    pub lapic: kvm_lapic_state,
    /// What the host has to complete.
    pub access: Option<Access>,
    pub power_on: kvm_sregs,
    pub table: Option<(u32, Vec<VcpuCpuidEntry>)>,
    pub x2apic: bool,
}

impl Vcpu {
    pub fn new(id: i32, fd: VcpuFd) -> io::Result<Self> {
        let power_on = fd.get_sregs()?;
        Ok(Self {
            id,
            turn: Mutex::default(),
            kick: Kick::new(&fd)?,
            state: Mutex::new(Cpu {
                id,
                lapic: fd.get_lapic()?,
                fd,
                unsettled: false,
                staged: None,
                access: None,
                power_on,
                table: None,
                x2apic: false,
            }),
            active: AtomicBool::new(false),
            held: AtomicBool::new(false),
            halted: AtomicBool::new(false),
        })
    }

    /// Outside of the guest until both guards go.
    pub fn freeze(&self) -> (MutexGuard<'_, Cpu>, MutexGuard<'_, ()>) {
        let turn = lock(&self.turn);
        self.kick.kick();
        let state = lock(&self.state);
        self.kick.take();
        (state, turn)
    }

    /// To run the guest, once nobody else wants it.
    pub fn hold(&self) -> MutexGuard<'_, Cpu> {
        let _turn = lock(&self.turn);
        lock(&self.state)
    }

    /// One `KVM_RUN`.
    pub fn enter(&self, cpu: &mut Cpu) -> io::Result<()> {
        self.kick.adopt();
        let result = cpu.fd.run().map(drop);
        self.kick.abandon();
        cpu.unsettled = false;
        Ok(result?)
    }

    /// Has KVM complete an access, whose further parts are dropped, without running the guest.
    pub fn settle(&self, cpu: &mut Cpu) -> io::Result<()> {
        loop {
            self.kick.only_complete();
            let result = self.enter(cpu);
            self.kick.take();
            match result.map_err(|error| (error.raw_os_error(), error)) {
                Ok(()) => {}
                Err((Some(libc::EINTR), _)) => return Ok(()),
                Err((_, error)) => return Err(error),
            }
        }
    }
}

/// Makes a vCPU leave the guest.
pub struct Kick {
    page: NonNull<u8>,
    thread: AtomicI32,
    /// Entries into KVM: who stands still has the same for long.
    pub entries: AtomicU64,
}

// SAFETY: of what `page` points to, one byte is used, atomically.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        install_handler();
        // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let page =
            unsafe { rustix::mm::mmap(ptr::null_mut(), PAGE, prot, MapFlags::SHARED, fd, 0) }?;
        Ok(Self {
            page: NonNull::new(page.cast()).ok_or(io::ErrorKind::OutOfMemory)?,
            thread: AtomicI32::new(0),
            entries: AtomicU64::new(0),
        })
    }

    /// The calling thread runs the vCPU until [`Self::abandon`].
    fn adopt(&self) {
        thread_local! {
            static THREAD: i32 = {
                unblock_signal();
                rustix::thread::gettid().as_raw_nonzero().get()
            };
        }
        self.thread.store(THREAD.with(|id| *id), Ordering::SeqCst);
        self.entries.fetch_add(1, Ordering::Relaxed);
    }

    fn abandon(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }

    pub fn running(&self) -> bool {
        self.thread.load(Ordering::SeqCst) != 0
    }

    pub fn kick(&self) {
        self.flag().store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            let process = rustix::process::getpid().as_raw_nonzero().get();
            // SAFETY: plain numbers; at worst another thread of this process runs the empty handler.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal()) };
        }
    }

    pub fn take(&self) {
        self.flag().store(0, Ordering::SeqCst);
    }

    /// The next `KVM_RUN` completes what is pending and returns.
    pub fn only_complete(&self) {
        self.flag().store(1, Ordering::SeqCst);
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the page that `self` maps, and both sides access it as one byte.
        unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(offset_of!(kvm_run, immediate_exit))) }
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: the page is `self`'s own mapping, and nothing borrows it past `self`.
        let _ = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

/// Not the host's, whose handler is not ours to replace.
fn signal() -> i32 {
    libc::SIGRTMIN() + 3
}

extern "C" fn on_signal(_: libc::c_int) {}

fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is valid; the handler does nothing, so it is safe in any context.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal(), &action, ptr::null_mut());
        }
    });
}

fn unblock_signal() {
    // SAFETY: an all-zero sigset_t is valid and then initialised; only the calling thread's mask changes.
    unsafe {
        let mut set: libc::sigset_t = MaybeUninit::zeroed().assume_init();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
    }
}

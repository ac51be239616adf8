//! A copy that ends with an error, and not the process, where the memory behind a mapping is gone: somebody may cut the file that
//! is mapped. The kernel says so by SIGBUS, in the thread and at the instruction that met it.
//!
//! Each plugin with this library has a handler of its own, which knows only its own copy and hands everything else to the action
//! that it found.

#![allow(unsafe_code)] // a signal handler, and a copy that it can step out of

use std::arch::global_asm;
use std::ffi::{c_int, c_void};
use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

// System V AMD64 ABI: rdi, rsi, rdx are destination, source and length; DF is clear. Whoever has the symbols hidden has them alone,
// however many plugins there are. Words of eight bytes: processors without fast strings copy by the word.
global_asm!(
    ".pushsection .text.vmm_block_file_copy, \"ax\", @progbits",
    ".balign 16",
    ".hidden vmm_block_file_copy",
    ".hidden vmm_block_file_copy_end",
    ".hidden vmm_block_file_copy_failed",
    ".globl vmm_block_file_copy",
    ".globl vmm_block_file_copy_end",
    ".globl vmm_block_file_copy_failed",
    ".type vmm_block_file_copy, @function",
    "vmm_block_file_copy:",
    "mov rcx, rdx",
    "shr rcx, 3",
    "rep movsq",
    "mov ecx, edx",
    "and ecx, 7",
    "rep movsb",
    "vmm_block_file_copy_end:",
    "xor eax, eax",
    "ret",
    "vmm_block_file_copy_failed:",
    "mov eax, 1",
    "ret",
    ".size vmm_block_file_copy, . - vmm_block_file_copy",
    ".popsection",
);

unsafe extern "C" {
    /// 0, or 1 if the handler has ended it.
    fn vmm_block_file_copy(to: *mut u8, from: *const u8, len: usize) -> c_int;
    static vmm_block_file_copy_end: u8;
    static vmm_block_file_copy_failed: u8;
}

/// The action that [`Guard::install`] has found. Never freed.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

/// The handler is installed.
#[derive(Clone, Copy, Debug)]
pub struct Guard(());

impl Guard {
    /// Installs the handler, once in this process.
    ///
    /// # Errors
    /// The system refuses.
    pub fn install() -> io::Result<Self> {
        static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
        let failed =
            INSTALLED.get_or_init(|| install().err().map(|e| e.raw_os_error().unwrap_or(0)));
        failed.map_or(Ok(Self(())), |code| Err(io::Error::from_raw_os_error(code)))
    }

    /// Copies; false if some of the memory is gone. Then part of it has been copied.
    ///
    /// # Safety
    /// Both ranges are mapped, if perhaps without memory behind, and stay so; `to` may be written to, and no Rust reference sees it.
    pub unsafe fn copy(self, from: *const u8, to: *mut u8, len: usize) -> bool {
        // SAFETY: by this function's contract; the routine touches the two ranges alone, and a fault in it ends it.
        unsafe { vmm_block_file_copy(to, from, len) == 0 }
    }
}

fn install() -> io::Result<()> {
    let exchange = |new: *const libc::sigaction| {
        // SAFETY: all-zero is a valid `sigaction`, which the call fills; `new` is null or valid.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            match libc::sigaction(libc::SIGBUS, new, &raw mut old) {
                0 => Ok(old),
                _ => Err(io::Error::last_os_error()),
            }
        }
    };
    let keep = |action| PREVIOUS.store(Box::into_raw(Box::new(action)), Ordering::Release);
    // Before the handler may have to know of it; and again, should another plugin have installed its own in between.
    keep(exchange(ptr::null())?);
    // SAFETY: all-zero is a valid `sigaction`: no signal more is blocked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_bus_error as *const () as usize;
    // On the alternate stack, where a thread has one: the handler before may be the one that reports stacks that are full.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    keep(exchange(&raw const action)?);
    Ok(())
}

/// Whether the kernel reports what the interrupted instruction has met (sigaction(2)), and not what somebody has sent.
fn is_fault(code: c_int) -> bool {
    matches!(
        code,
        libc::BUS_ADRALN | libc::BUS_ADRERR | libc::BUS_OBJERR | libc::BUS_MCEERR_AR
    )
}

extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO both; the context is the one that the thread goes on with.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = &mut registers[libc::REG_RIP as usize];
        let copy =
            vmm_block_file_copy as *const () as usize..&raw const vmm_block_file_copy_end as usize;
        if copy.contains(&(*at as usize)) && is_fault((*info).si_code) {
            *at = (&raw const vmm_block_file_copy_failed as usize).cast_signed() as i64;
            return;
        }
        pass_on(signal, info, context);
    }
}

/// Does what would have happened without this handler.
///
/// # Safety
/// The arguments are a handler's.
unsafe fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: what is stored is a valid action and never freed, and its handler takes what its flags say.
    unsafe {
        let fault = is_fault((*info).si_code);
        let previous = PREVIOUS.load(Ordering::Acquire);
        let (handler, flags) = match previous.as_ref() {
            Some(previous) => (previous.sa_sigaction, previous.sa_flags),
            None => (libc::SIG_DFL, 0),
        };
        match handler {
            // Nobody can ignore a fault: the kernel ends the process.
            libc::SIG_IGN if !fault => {}
            libc::SIG_DFL | libc::SIG_IGN => {
                libc::signal(signal, libc::SIG_DFL);
                // A fault comes again by itself. This comes when the handler has returned.
                if !fault {
                    libc::raise(signal);
                }
            }
            _ if flags & libc::SA_SIGINFO != 0 => {
                type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
                std::mem::transmute::<usize, Handler>(handler)(signal, info, context);
            }
            _ => std::mem::transmute::<usize, extern "C" fn(c_int)>(handler)(signal),
        }
    }
}

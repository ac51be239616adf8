//! The nodes of this process' VMs: their names, their requests, their end.
#![allow(unsafe_code)] // implements requests whose arguments are pointers

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use vmm_host::hypervisor::bhyve::abi::VM_DESTROY_PENDING;
use vmm_host::hypervisor::bhyve::driver::Instance;

use crate::machine::Machine;
use crate::{errno, lock, requests, rtc_interrupt, suspend};

/// Each VM, and how often its node is open.
static NODES: Mutex<BTreeMap<String, (Arc<Machine>, usize)>> = Mutex::new(BTreeMap::new());
static CLOSED: Condvar = Condvar::new();

/// The node of an emulated VM.
pub struct Node(Arc<Machine>);

pub fn create(name: &str, flags: u64, limit: Option<usize>) -> io::Result<()> {
    let mut nodes = lock(&NODES);
    if nodes.contains_key(name) {
        return Err(errno(libc::EEXIST));
    }
    if limit.is_some_and(|limit| nodes.len() >= limit) {
        return Err(errno(libc::EINVAL));
    }
    let machine = Arc::new(Machine::new(name, flags)?);
    suspend::watch(&machine)?;
    rtc_interrupt::watch(&machine)?;
    nodes.insert(name.into(), (machine, 0));
    Ok(())
}

pub fn open(name: &str) -> io::Result<Node> {
    let mut nodes = lock(&NODES);
    let (machine, openers) = nodes.get_mut(name).ok_or(errno(libc::ENOENT))?;
    if machine.destroyed.load(Ordering::SeqCst) {
        return Err(errno(libc::ENXIO));
    }
    *openers += 1;
    Ok(Node(Arc::clone(machine)))
}

/// Waits until the node is closed everywhere.
pub fn destroy(name: &str) -> io::Result<()> {
    let mut nodes = lock(&NODES);
    let (machine, openers) = nodes.get(name).ok_or(errno(libc::ENOENT))?;
    machine.destroyed.store(true, Ordering::SeqCst);
    machine.kick_all();
    if *openers == 0 {
        nodes.remove(name);
    }
    while nodes.contains_key(name) {
        nodes = CLOSED.wait(nodes).unwrap_or_else(PoisonError::into_inner);
    }
    Ok(())
}

impl Drop for Node {
    fn drop(&mut self) {
        let mut nodes = lock(&NODES);
        let Some((machine, openers)) = nodes.get_mut(&self.0.name) else {
            return;
        };
        *openers -= 1;
        let ends =
            machine.destroyed.load(Ordering::SeqCst) || machine.autodestruct.load(Ordering::SeqCst);
        if *openers == 0 && ends {
            nodes.remove(&self.0.name);
            CLOSED.notify_all();
        }
    }
}

impl Instance for Node {
    unsafe fn ioctl(&self, request: i32, argument: *mut c_void) -> io::Result<i32> {
        let vm = &self.0;
        let gone = vm.destroyed.load(Ordering::SeqCst);
        if request == VM_DESTROY_PENDING {
            return Ok(i32::from(gone));
        }
        if gone && !vm.given_up.load(Ordering::SeqCst) {
            // Somebody else has destroyed it, which its host can't know.
            return Err(errno(libc::ENXIO));
        }
        if gone {
            return Err(vm.misuse(libc::ENXIO, &format!("request {request:#x} after its end")));
        }
        // SAFETY: by this function's contract.
        unsafe { requests::serve(vm, request, argument) }
    }

    fn file(&self, offset: u64, len: usize) -> io::Result<(BorrowedFd<'_>, u64)> {
        self.0.file(offset, len as u64)
    }
}

//! An access of the guest to a register, which waits for its value.
//!
//! KVM tells all elements of a string instruction at once, and of an access that crosses a page a part of any length. The driver tells
//! them one after the other, each with a width of its own.
#![allow(unsafe_code)] // reads the union and the data area that the kernel filled

use kvm_bindings::{KVM_EXIT_IO_IN, kvm_run};
use vmm_host::hypervisor::bhyve::abi::*;

/// The part of it that is to be completed next.
#[derive(Clone, Copy)]
pub struct Access {
    port: bool,
    read: bool,
    /// Of the first part.
    address: u64,
    /// Bytes of an element of ports.
    width: usize,
    /// The part's first byte, of so many.
    at: usize,
    len: usize,
}

impl Access {
    /// What `KVM_EXIT_IO` tells.
    ///
    /// # Safety
    /// The kernel has filled `run` for that exit.
    pub unsafe fn of_port(run: &kvm_run) -> Self {
        // SAFETY: the exit says that this member is valid.
        let io = unsafe { run.__bindgen_anon_1.io };
        Self {
            port: true,
            read: u32::from(io.direction) == KVM_EXIT_IO_IN,
            address: io.port.into(),
            width: io.size.into(),
            at: 0,
            len: usize::from(io.size) * io.count as usize,
        }
    }

    /// What `KVM_EXIT_MMIO` tells.
    ///
    /// # Safety
    /// As of [`Self::of_port`].
    pub unsafe fn of_memory(run: &kvm_run) -> Self {
        // SAFETY: the exit says that this member is valid.
        let mmio = unsafe { run.__bindgen_anon_1.mmio };
        Self {
            port: false,
            read: mmio.is_write == 0,
            address: mmio.phys_addr,
            width: 0,
            at: 0,
            len: (mmio.len as usize).min(mmio.data.len()),
        }
    }

    /// Where it writes to memory.
    pub fn written(&self) -> Option<u64> {
        (!self.port && !self.read).then_some(self.address)
    }

    pub fn is_port(&self) -> bool {
        self.port
    }

    pub fn is_read(&self) -> bool {
        self.read
    }

    /// Port or guest physical address.
    pub fn address(&self) -> u64 {
        match self.port {
            true => self.address,
            false => self.address + self.at as u64,
        }
    }

    pub fn width(&self) -> usize {
        match self.port {
            true => self.width,
            false => 1 << (self.len - self.at).ilog2(),
        }
    }

    /// The part's bytes in the run page.
    fn data<'a>(&self, run: &'a mut kvm_run) -> &'a mut [u8] {
        let part = self.at..self.at + self.width();
        if !self.port {
            // SAFETY: KVM has not run since it told of an access to memory, whose member is valid.
            let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
            return &mut mmio.data[part];
        }
        // SAFETY: likewise, of an access to a port: the kernel placed `len` bytes at this offset of the run area.
        let all = unsafe {
            let offset = run.__bindgen_anon_1.io.data_offset as usize;
            let start = std::ptr::from_mut(run).cast::<u8>().add(offset);
            std::slice::from_raw_parts_mut(start, self.len)
        };
        &mut all[part]
    }

    pub fn value(&self, run: &mut kvm_run) -> u64 {
        let mut value = [0; 8];
        let data = self.data(run);
        value[..data.len()].copy_from_slice(data);
        u64::from_le_bytes(value)
    }

    pub fn set(&self, run: &mut kvm_run, value: u64) {
        let data = self.data(run);
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }

    /// What is left of it after this part.
    pub fn next(&self) -> Option<Self> {
        let at = self.at + self.width();
        (at < self.len).then_some(Self { at, ..*self })
    }

    pub fn exit(&self, run: &mut kvm_run) -> VmExit {
        let value = if self.read { 0 } else { self.value(run) };
        let (exitcode, u) = match self.port {
            true => {
                let inout = VmInout {
                    eax: value as u32,
                    port: self.address as u16,
                    bytes: self.width as u8,
                    flags: if self.read { INOUT_IN } else { 0 },
                    ..Default::default()
                };
                (EXITCODE_INOUT, ExitPayload { inout })
            }
            false => {
                let mmio = VmMmio {
                    bytes: self.width() as u8,
                    read: self.read.into(),
                    gpa: self.address(),
                    data: value,
                    ..Default::default()
                };
                (EXITCODE_MMIO, ExitPayload { mmio })
            }
        };
        VmExit {
            exitcode,
            u,
            ..Default::default()
        }
    }

    /// Completes the part as `entry` says, and gives what is left of the access. `None`: the entry is for another access.
    #[allow(clippy::option_option)] // a match, and whether there is more
    pub fn fulfil(&self, run: &mut kvm_run, entry: &VmEntry) -> Option<Option<Self>> {
        let command = entry.cmd & !VEC_FLAG_EXIT_CONSISTENT;
        let (same, value) = match (command, self.port) {
            (VEC_FULFILL_INOUT, true) => {
                // SAFETY: the command says that this member is valid.
                let inout = unsafe { entry.u.inout };
                let same = u64::from(inout.port) == self.address
                    && usize::from(inout.bytes) == self.width
                    && (inout.flags & INOUT_IN != 0) == self.read;
                (same, inout.eax.into())
            }
            (VEC_FULFILL_MMIO, false) => {
                // SAFETY: as above.
                let mmio = unsafe { entry.u.mmio };
                let same = mmio.gpa == self.address()
                    && usize::from(mmio.bytes) == self.width()
                    && (mmio.read != 0) == self.read;
                (same, mmio.data)
            }
            _ => return None,
        };
        if !same {
            return None;
        }
        if self.read {
            self.set(run, value);
        }
        Some(self.next())
    }
}

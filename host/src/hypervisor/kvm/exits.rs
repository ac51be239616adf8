//! From a `kvm_run` page to the access or the event that it describes (`KVM_RUN`, "exit reasons").
#![allow(unsafe_code)] // reads the unions and the data area that the kernel filled

use std::fmt::Write;

use kvm_bindings::*;

use crate::hypervisor::msr::UnknownMsrs;
use crate::hypervisor::{Exit, ExitHandler};

/// Serves the register access that `run` describes; what is not one comes back.
///
/// # Safety
/// `run` heads a whole mapped run area, which the kernel filled when the vCPU's last `KVM_RUN` returned 0.
pub unsafe fn dispatch(
    run: &mut kvm_run,
    handler: &mut dyn ExitHandler,
    msrs: &UnknownMsrs,
) -> Option<Exit> {
    match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: the exit reason says that this field is valid.
            let io = unsafe { run.__bindgen_anon_1.io };
            // SAFETY: the kernel placed `count` items of `size` bytes at this offset of the run area.
            let data = unsafe {
                let start = std::ptr::from_mut(run)
                    .cast::<u8>()
                    .add(io.data_offset as usize);
                std::slice::from_raw_parts_mut(start, usize::from(io.size) * io.count as usize)
            };
            port_access(
                io.port,
                io.size,
                u32::from(io.direction) == KVM_EXIT_IO_IN,
                data,
                handler,
            );
            None
        }
        KVM_EXIT_MMIO => {
            // SAFETY: as above.
            let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
            let len = (mmio.len as usize).min(mmio.data.len());
            memory_access(
                mmio.phys_addr,
                mmio.is_write != 0,
                &mut mmio.data[..len],
                handler,
            );
            None
        }
        KVM_EXIT_X86_RDMSR => {
            // SAFETY: as above.
            let msr = unsafe { &mut run.__bindgen_anon_1.msr };
            (msr.data, msr.error) = (msrs.read(msr.index), 0);
            None
        }
        KVM_EXIT_X86_WRMSR => {
            // SAFETY: as above.
            let msr = unsafe { &mut run.__bindgen_anon_1.msr };
            msrs.write(msr.index, msr.data);
            msr.error = 0;
            None
        }
        KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN => Some(Exit::Kicked),
        KVM_EXIT_SHUTDOWN => Some(Exit::TripleFault),
        KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: as above.
            let kind = unsafe { run.__bindgen_anon_1.system_event.type_ };
            Some(match kind {
                KVM_SYSTEM_EVENT_RESET => Exit::TripleFault,
                KVM_SYSTEM_EVENT_SHUTDOWN => Exit::Halted,
                other => Exit::Crash(format!("KVM reports system event {other}")),
            })
        }
        // SAFETY: forwarded.
        _ => Some(Exit::Crash(unsafe { crash(run) })),
    }
}

/// String instructions arrive as several items for one port.
fn port_access(port: u16, width: u8, input: bool, data: &mut [u8], handler: &mut dyn ExitHandler) {
    for item in data.chunks_exact_mut(usize::from(width)) {
        if input {
            let value = handler.pio_read(port, width).to_le_bytes();
            item.copy_from_slice(&value[..item.len()]);
        } else {
            handler.pio_write(port, width, little_endian(item) as u32);
        }
    }
}

/// An access that crosses a page arrives in parts of any length: they are served in powers of two.
fn memory_access(address: u64, write: bool, data: &mut [u8], handler: &mut dyn ExitHandler) {
    let mut at = 0;
    while at < data.len() {
        let width = 1 << (data.len() - at).ilog2();
        let part = &mut data[at..at + width];
        let address = address.wrapping_add(at as u64);
        if write {
            handler.mmio_write(address, width as u8, little_endian(part));
        } else {
            part.copy_from_slice(&handler.mmio_read(address, width as u8).to_le_bytes()[..width]);
        }
        at += width;
    }
}

fn little_endian(bytes: &[u8]) -> u64 {
    let mut value = [0; 8];
    value[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(value)
}

/// What went wrong, in words.
///
/// # Safety
/// As for [`dispatch`].
unsafe fn crash(run: &kvm_run) -> String {
    match run.exit_reason {
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: the exit reason says that this field is valid.
            let entry = unsafe { run.__bindgen_anon_1.fail_entry };
            let reason = entry.hardware_entry_failure_reason;
            format!(
                "The CPU refused to enter the guest: hardware reason {reason:#x} (KVM_EXIT_FAIL_ENTRY)"
            )
        }
        // SAFETY: forwarded.
        KVM_EXIT_INTERNAL_ERROR => unsafe { internal_error(run) },
        KVM_EXIT_UNKNOWN => {
            // SAFETY: as above.
            let reason = unsafe { run.__bindgen_anon_1.hw.hardware_exit_reason };
            format!(
                "The CPU left the guest for a reason that KVM does not know: {reason:#x} (KVM_EXIT_UNKNOWN)"
            )
        }
        KVM_EXIT_EXCEPTION => {
            // SAFETY: as above.
            let exception = unsafe { run.__bindgen_anon_1.ex };
            format!(
                "KVM gave up on exception {}, error code {:#x}",
                exception.exception, exception.error_code
            )
        }
        other => {
            format!("KVM left the guest with exit reason {other}, which this host never asks for")
        }
    }
}

/// # Safety
/// As for [`dispatch`], and the exit reason is `KVM_EXIT_INTERNAL_ERROR`.
unsafe fn internal_error(run: &kvm_run) -> String {
    // SAFETY: by this function's contract.
    let error = unsafe { run.__bindgen_anon_1.internal };
    let what = match error.suberror {
        KVM_INTERNAL_ERROR_EMULATION => "it can't emulate the guest's instruction",
        KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions at once",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "a fault while it delivered an event",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit that it did not expect",
        _ => "unknown cause",
    };
    let mut text = format!("KVM internal error {}: {what}", error.suberror);
    let words = (error.ndata as usize).min(error.data.len());
    if words > 0 {
        text.push_str("; data");
        for word in &error.data[..words] {
            // Writing to a String can't fail.
            let _ = write!(text, " {word:#x}");
        }
    }
    if error.suberror == KVM_INTERNAL_ERROR_EMULATION && error.ndata >= 3 {
        // SAFETY: with three or more words of data this is the layout that the kernel used.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        if failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0 {
            // SAFETY: the flag says that this field is valid.
            let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let size = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
            let _ = write!(
                text,
                "; instruction {:02x?}",
                &instruction.insn_bytes[..size]
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Record(Vec<(u64, u8, Option<u64>)>);

    impl ExitHandler for Record {
        fn pio_read(&mut self, port: u16, width: u8) -> u32 {
            self.0.push((port.into(), width, None));
            0x1000 + self.0.len() as u32
        }
        fn pio_write(&mut self, port: u16, width: u8, value: u32) {
            self.0.push((port.into(), width, Some(value.into())));
        }
        fn mmio_read(&mut self, address: u64, width: u8) -> u64 {
            self.0.push((address, width, None));
            0x8877_6655_4433_2211
        }
        fn mmio_write(&mut self, address: u64, width: u8, value: u64) {
            self.0.push((address, width, Some(value)));
        }
    }

    #[test]
    fn string_instructions_are_several_accesses() {
        let mut record = Record::default();
        port_access(0x1f0, 2, false, &mut [1, 2, 3, 4], &mut record);
        assert_eq!(record.0, [(0x1f0, 2, Some(0x201)), (0x1f0, 2, Some(0x403))]);
        let mut data = [0; 4];
        port_access(0x1f0, 2, true, &mut data, &mut record);
        assert_eq!(data, [0x03, 0x10, 0x04, 0x10]);
    }

    #[test]
    fn unknown_msrs_read_as_zero_and_ignore_writes() {
        let msrs = UnknownMsrs::default();
        let mut run = kvm_run::default();
        for reason in [KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR] {
            run.exit_reason = reason;
            run.__bindgen_anon_1.msr = kvm_run__bindgen_ty_1__bindgen_ty_23 {
                error: 1,
                reason: KVM_MSR_EXIT_REASON_UNKNOWN,
                index: 0x1234,
                data: 0x5678,
                ..Default::default()
            };
            let mut record = Record::default();
            // SAFETY: this exit's fields are in the page itself.
            let exit = unsafe { dispatch(&mut run, &mut record, &msrs) };
            assert!(exit.is_none() && record.0.is_empty(), "{exit:?}");
            // SAFETY: written above.
            let msr = unsafe { run.__bindgen_anon_1.msr };
            assert_eq!(msr.error, 0, "no exception for the guest");
            if reason == KVM_EXIT_X86_RDMSR {
                assert_eq!(msr.data, 0);
            }
        }
    }

    #[test]
    fn odd_lengths_are_split() {
        let mut record = Record::default();
        let mut data = [0; 7];
        memory_access(0x1000, false, &mut data, &mut record);
        assert_eq!(
            record.0,
            [(0x1000, 4, None), (0x1004, 2, None), (0x1006, 1, None)]
        );
        assert_eq!(data, [0x11, 0x22, 0x33, 0x44, 0x11, 0x22, 0x11]);
    }
}

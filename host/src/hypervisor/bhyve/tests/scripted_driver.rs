//! A driver that keeps record of its requests and answers `VM_RUN` from a script.
#![allow(unsafe_code)] // takes requests as the driver does

use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::hypervisor::bhyve::abi::data::*;
use crate::hypervisor::bhyve::abi::*;
use crate::hypervisor::bhyve::driver::{Driver, Instance};

const PATIENCE: Duration = Duration::from_secs(20);

/// The VMs of this process, by their names.
pub(super) static VMS: Mutex<BTreeMap<String, Arc<Fake>>> = Mutex::new(BTreeMap::new());

pub(super) struct FakeDriver;
pub(super) struct FakeInstance(Arc<Fake>);

/// One VM.
#[derive(Default)]
pub(super) struct Fake {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
pub(super) struct State {
    /// Requests, each as a line.
    pub(super) log: Vec<String>,
    /// A file for each segment.
    pub(super) segments: Vec<Option<Arc<OwnedFd>>>,
    pub(super) exits: VecDeque<VmExit>,
    pub(super) registers: BTreeMap<i32, u64>,
    pushes: u32,
    pub(super) running: bool,
    pub(super) gone: bool,
}

impl Fake {
    pub(super) fn of(name: &str) -> Arc<Fake> {
        Arc::clone(&VMS.lock().unwrap()[name])
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The requests since the last call, without those of registers.
    pub(super) fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().log)
    }

    pub(super) fn wait_for(&self, what: impl Fn(&State) -> bool) {
        let end = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while !what(&state) {
            assert!(Instant::now() < end, "{:?}", state.log);
            let waited = self.changed.wait_timeout(state, Duration::from_millis(20));
            state = waited.unwrap().0;
        }
    }
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap();
    String::from_utf8(bytes[..end].to_vec()).unwrap()
}

impl Driver for FakeDriver {
    type Instance = FakeInstance;

    fn open() -> io::Result<Self> {
        Ok(Self)
    }

    unsafe fn ioctl(&self, request: i32, argument: *mut c_void) -> io::Result<i32> {
        match request {
            VMM_INTERFACE_VERSION => return Ok(VERSION_KNOWN),
            VMM_CREATE_VM => {
                // SAFETY: by this function's contract.
                let request = unsafe { &*argument.cast::<VmCreateReq>() };
                let mut vms = VMS.lock().unwrap();
                let name = text(&request.name);
                if vms.contains_key(&name) {
                    return Err(errno(libc::EEXIST));
                }
                vms.insert(name, Arc::default());
            }
            VMM_DESTROY_VM => {
                // SAFETY: by this function's contract.
                let request = unsafe { &*argument.cast::<VmDestroyReq>() };
                VMS.lock().unwrap().remove(&text(&request.name));
            }
            VMM_RESV_QUERY => {
                // SAFETY: by this function's contract.
                let request = unsafe { &mut *argument.cast::<VmmResvQuery>() };
                request.free = 3 << 20;
            }
            other => panic!("request {other:#x}"),
        }
        Ok(0)
    }

    fn instance(&self, name: &str) -> io::Result<FakeInstance> {
        match name.starts_with("unopenable") {
            true => Err(errno(libc::EIO)),
            false => Ok(FakeInstance(Fake::of(name))),
        }
    }
}

impl Instance for FakeInstance {
    unsafe fn ioctl(&self, request: i32, argument: *mut c_void) -> io::Result<i32> {
        if self.0.lock().gone {
            return Err(errno(libc::ENXIO));
        }
        if request == VM_RUN {
            // SAFETY: by this function's contract.
            let entry = unsafe { &mut *argument.cast::<VmEntry>() };
            return Ok(self.run(entry));
        }
        // SAFETY: by this function's contract.
        let line = unsafe { self.serve(request, argument) }?;
        let mut state = self.0.lock();
        state.log.extend(line);
        self.0.changed.notify_all();
        Ok(0)
    }

    fn file(&self, offset: u64, _: usize) -> io::Result<(BorrowedFd<'_>, u64)> {
        let segment = match offset >= DEVMEM_START {
            true => ((offset - DEVMEM_START) >> 32) as usize,
            false => 0,
        };
        let file = self.0.lock().segments[segment].clone().unwrap();
        // SAFETY: the file stays open as long as the VM, which `self` keeps.
        let fd = unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) };
        Ok((fd, 0))
    }
}

impl FakeInstance {
    /// Answers a request; `Some` is its line for the log.
    unsafe fn serve(&self, request: i32, argument: *mut c_void) -> io::Result<Option<String>> {
        /// What a request's argument is.
        macro_rules! argument {
            ($type:ty) => {
                // SAFETY: by this function's contract.
                unsafe { &mut *argument.cast::<$type>() }
            };
        }
        let number = argument.addr();
        Ok(Some(match request {
            VM_SET_AUTODESTRUCT => format!("autodestruct {number}"),
            VM_DESTROY_SELF => "destroy".into(),
            VM_PAUSE => "pause".into(),
            VM_RESUME => "resume".into(),
            VM_PMTMR_LOCATE => format!("pm timer {number:#x}"),
            VM_VCPU_BARRIER => {
                let mut state = self.0.lock();
                state.pushes += u32::from(state.running);
                return Ok(None);
            }
            VM_ALLOC_MEMSEG => {
                let segment = argument!(VmMemseg);
                let fd = OwnedFd::from(tempfile::tempfile().unwrap());
                rustix::fs::ftruncate(&fd, segment.len as u64).unwrap();
                let mut state = self.0.lock();
                assert_eq!(state.segments.len(), segment.segid as usize);
                state.segments.push(Some(Arc::new(fd)));
                format!(
                    "segment {} {:#x} {:?}",
                    segment.segid,
                    segment.len,
                    text(&segment.name)
                )
            }
            VM_MMAP_MEMSEG => {
                let map = argument!(VmMemmap);
                format!(
                    "map {} at {:#x}+{:#x} {}",
                    map.segid, map.gpa, map.len, map.prot
                )
            }
            VM_MUNMAP_MEMSEG => {
                let map = argument!(VmMunmap);
                format!("unmap {:#x}+{:#x}", map.gpa, map.len)
            }
            VM_DEVMEM_GETOFFSET => {
                let devmem = argument!(VmDevmemOffset);
                devmem.offset = (DEVMEM_START + ((devmem.segid as u64) << 32)) as i64;
                return Ok(None);
            }
            VM_GET_TOPOLOGY => {
                argument!(VmCpuTopology).maxcpus = 32;
                return Ok(None);
            }
            VM_LEGACY_CPUID => {
                let leaf = argument!(VmLegacyCpuid);
                let answer = match leaf.eax {
                    0 => [1, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
                    0x8000_0000 | 0x4000_0000 => [leaf.eax, 0, 0, 0],
                    _ => [0; 4],
                };
                [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] = answer;
                return Ok(None);
            }
            VM_SET_CPUID => {
                let config = argument!(VmVcpuCpuidConfig);
                format!("cpuid {} flags {}", config.vcpuid, config.flags)
            }
            VM_ACTIVATE_CPU => format!("activate {}", argument!(i32)),
            VM_RESET_CPU => {
                let reset = argument!(VmVcpuReset);
                format!("reset {} kind {}", reset.vcpuid, reset.kind)
            }
            VM_SET_RUN_STATE => {
                let run = argument!(VmRunState);
                format!("run state {} {}", run.vcpuid, run.state)
            }
            VM_SET_X2APIC_STATE => {
                let x2apic = argument!(VmX2apic);
                format!("x2apic {} {}", x2apic.cpuid, x2apic.state)
            }
            VM_SET_CAPABILITY => {
                let capability = argument!(VmCapability);
                format!("capability {} {}", capability.captype, capability.capval)
            }
            VM_REINIT => format!("reinit {}", argument!(VmReinit).flags),
            VM_LAPIC_MSI => {
                let msi = argument!(VmLapicMsi);
                format!("msi {:#x} to {:#x}", msi.msg, msi.addr)
            }
            VM_IOAPIC_ASSERT_IRQ => format!("ioapic {} high", argument!(VmIoapicIrq).irq),
            VM_IOAPIC_DEASSERT_IRQ => format!("ioapic {} low", argument!(VmIoapicIrq).irq),
            VM_ISA_ASSERT_IRQ | VM_ISA_DEASSERT_IRQ => {
                assert_eq!(argument!(VmIsaIrq).ioapic_irq, -1);
                return Ok(None);
            }
            VM_RTC_WRITE => {
                let byte = argument!(VmRtcData);
                format!("cmos {:#x} = {:#x}", byte.offset, byte.value)
            }
            VM_RTC_SETTIME => {
                assert!(argument!(Timespec).sec > 1_700_000_000);
                "clock".into()
            }
            VM_DATA_WRITE => {
                let transfer = argument!(VmDataXfer);
                assert_eq!((transfer.class, transfer.len), (VDC_MSR, 16));
                // SAFETY: by this function's contract, of this many bytes.
                let field = unsafe { &*transfer.data.cast::<VdiFieldEntry>() };
                if field.value == u64::MAX {
                    return Err(errno(libc::EINVAL));
                }
                format!("msr {:#x} = {:#x}", field.ident, field.value)
            }
            VM_SET_REGISTER_SET | VM_GET_REGISTER_SET => {
                let set = argument!(VmRegisterSet);
                let count = set.count as usize;
                // SAFETY: by this function's contract.
                let (numbers, values) = unsafe {
                    (
                        std::slice::from_raw_parts(set.regnums, count),
                        std::slice::from_raw_parts_mut(set.regvals, count),
                    )
                };
                let mut state = self.0.lock();
                for (number, value) in numbers.iter().zip(values) {
                    match request {
                        VM_SET_REGISTER_SET => drop(state.registers.insert(*number, *value)),
                        _ => *value = state.registers.get(number).copied().unwrap_or(0),
                    }
                }
                return Ok(None);
            }
            VM_GET_SEGMENT_DESCRIPTOR | VM_SET_SEGMENT_DESCRIPTOR => return Ok(None),
            VM_GLA2GPA_NOFAULT => {
                let translation = argument!(VmGla2gpa);
                translation.gpa = translation.gla;
                return Ok(None);
            }
            other => panic!("request {other:#x}"),
        }))
    }

    /// The script's next exit. After the last, the vCPU stays in the guest until it is pushed or is to leave.
    fn run(&self, entry: &mut VmEntry) -> i32 {
        let mut state = self.0.lock();
        let consistent = entry.cmd & VEC_FLAG_EXIT_CONSISTENT != 0;
        let mark = if consistent { " and leave" } else { "" };
        let line = match entry.cmd & !VEC_FLAG_EXIT_CONSISTENT {
            VEC_FULFILL_INOUT => {
                // SAFETY: the command says which member there is.
                let inout = unsafe { entry.u.inout };
                format!("run: port {:#x} {:#x}", inout.port, inout.eax)
            }
            VEC_FULFILL_MMIO => {
                // SAFETY: as above.
                let mmio = unsafe { entry.u.mmio };
                format!("run: memory {:#x} {:#x}", mmio.gpa, mmio.data)
            }
            _ => "run".into(),
        };
        state.log.push(line + mark);
        state.running = true;
        self.0.changed.notify_all();
        let exit = loop {
            if state.pushes > 0 || consistent {
                break None;
            }
            if let Some(exit) = state.exits.pop_front() {
                break Some(exit);
            }
            state = self.0.changed.wait_timeout(state, PATIENCE).unwrap().0;
        };
        (state.pushes, state.running) = (0, false);
        let bogus = VmExit {
            exitcode: EXITCODE_BOGUS,
            ..Default::default()
        };
        // SAFETY: whoever asks keeps the exit during the call.
        unsafe { *entry.exit_data = exit.unwrap_or(bogus) };
        0
    }
}

//! What the driver refuses, and the emulation writes down.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, unsafe_code)]

use std::ffi::c_void;
use std::io;

use vmm_driver::{Emulated, Node};
use vmm_host::hypervisor::bhyve::abi::*;
use vmm_host::hypervisor::bhyve::driver::{Driver, Instance};

/// Writes AL to port 0x80, reads AX from there, and so on.
const PROGRAM: [u8; 6] = [0xe6, 0x80, 0xe5, 0x80, 0xeb, 0xfa];

fn call<T>(node: &Node, request: i32, argument: &mut T) -> Result<i32, i32> {
    let argument = std::ptr::from_mut(argument).cast::<c_void>();
    // SAFETY: each test passes what the request takes.
    unsafe { node.ioctl(request, argument) }
        .map_err(|error: io::Error| error.raw_os_error().unwrap())
}

/// A VM with the program at its reset vector; `None`, and says why, where there is no KVM.
fn vm(name: &str) -> Option<Node> {
    if let Err(error) = std::fs::File::open("/dev/kvm") {
        println!("SKIPPED: {name}: /dev/kvm: {error}");
        return None;
    }
    let driver = Emulated::open().unwrap();
    let mut create = VmCreateReq::default();
    create.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the request takes a vm_create_req.
    unsafe { driver.ioctl(VMM_CREATE_VM, std::ptr::from_mut(&mut create).cast()) }.unwrap();
    let node = driver.instance(name).unwrap();
    let mut segment = VmMemseg {
        len: 0x1000,
        ..Default::default()
    };
    call(&node, VM_ALLOC_MEMSEG, &mut segment).unwrap();
    let mut map = VmMemmap {
        gpa: 0xffff_f000,
        len: 0x1000,
        prot: PROT_READ | PROT_WRITE | PROT_EXEC,
        ..Default::default()
    };
    call(&node, VM_MMAP_MEMSEG, &mut map).unwrap();
    let (file, offset) = node.file(0xffff_f000, 0x1000).unwrap();
    rustix::io::pwrite(file, &PROGRAM, offset + 0xff0).unwrap();
    Some(node)
}

fn enter(node: &Node, cmd: u32, inout: VmInout) -> Result<VmExit, i32> {
    let mut exit = VmExit::default();
    let mut entry = VmEntry {
        cmd,
        exit_data: &raw mut exit,
        u: EntryPayload { inout },
        ..Default::default()
    };
    call(node, VM_RUN, &mut entry)?;
    Ok(exit)
}

fn inout(exit: VmExit) -> VmInout {
    assert_eq!(exit.exitcode, EXITCODE_INOUT);
    // SAFETY: the exit code says that this member is valid.
    unsafe { exit.u.inout }
}

/// Whether the last violation of this VM has these words.
fn noted(name: &str, words: &str) -> bool {
    let own = format!("{name}: ");
    let violations = Emulated::violations();
    let last = violations.iter().rfind(|text| text.starts_with(&own));
    last.is_some_and(|text| text.contains(words))
}

#[test]
fn an_access_is_completed_as_it_was_told() {
    let name = "accesses";
    let Some(node) = vm(name) else {
        return;
    };
    let nothing = VmInout::default();
    assert!(matches!(
        enter(&node, VEC_DEFAULT, nothing),
        Err(libc::EINVAL)
    ));
    assert!(noted(name, "before it is active"));
    call(&node, VM_ACTIVATE_CPU, &mut 0).unwrap();
    assert_eq!(call(&node, VM_ACTIVATE_CPU, &mut 0), Err(libc::EBUSY));
    let mut reset = VmVcpuReset::default();
    call(&node, VM_RESET_CPU, &mut reset).unwrap();
    let mut state = VmRunState {
        state: VRS_RUN | VRS_PEND_INIT,
        ..Default::default()
    };
    assert_eq!(call(&node, VM_SET_RUN_STATE, &mut state), Err(libc::EINVAL));
    state.state = VRS_RUN;
    call(&node, VM_SET_RUN_STATE, &mut state).unwrap();

    let told = inout(enter(&node, VEC_DEFAULT, nothing).unwrap());
    assert_eq!((told.port, told.bytes, told.flags), (0x80, 1, 0));
    let again = inout(enter(&node, VEC_DEFAULT, nothing).unwrap());
    assert_eq!((again.port, again.bytes), (0x80, 1), "told again");
    for wrong in [
        VmInout { port: 0x81, ..told },
        VmInout { bytes: 2, ..told },
        VmInout {
            flags: INOUT_IN,
            ..told
        },
    ] {
        let refused = enter(&node, VEC_FULFILL_INOUT, wrong);
        assert!(matches!(refused, Err(libc::EINVAL)));
        assert!(noted(name, "another access"));
    }
    assert!(enter(&node, VEC_FULFILL_MMIO, told).is_err());
    let mut read = inout(enter(&node, VEC_FULFILL_INOUT, told).unwrap());
    assert_eq!((read.port, read.bytes, read.flags), (0x80, 2, INOUT_IN));
    read.eax = 0xabcd;
    let written = inout(enter(&node, VEC_FULFILL_INOUT, read).unwrap());
    assert_eq!(written.eax, 0xcd, "what was read is written");
    // Out of the guest where nothing is half done.
    let left = enter(&node, VEC_FULFILL_INOUT | VEC_FLAG_EXIT_CONSISTENT, written);
    assert_eq!(left.unwrap().exitcode, EXITCODE_BOGUS);
    assert!(enter(&node, VEC_FULFILL_INOUT, written).is_err());
    assert!(noted(name, "that there is not"));

    call(&node, VM_PAUSE, &mut ()).unwrap();
    assert_eq!(call(&node, VM_PAUSE, &mut ()), Err(libc::EALREADY));
    assert!(matches!(
        enter(&node, VEC_DEFAULT, nothing),
        Err(libc::EBUSY)
    ));
    call(&node, VM_REINIT, &mut VmReinit::default()).unwrap();
    call(&node, VM_RESUME, &mut ()).unwrap();
    assert!(matches!(
        enter(&node, VEC_DEFAULT, nothing),
        Err(libc::EINVAL)
    ));
    assert!(noted(name, "before it is active"));

    let mut how = VmSuspend {
        how: VM_SUSPEND_POWEROFF,
        source: -1,
    };
    call(&node, VM_ACTIVATE_CPU, &mut 0).unwrap();
    call(&node, VM_SUSPEND, &mut how).unwrap();
    assert_eq!(call(&node, VM_SUSPEND, &mut how), Err(libc::EALREADY));
    let exit = enter(&node, VEC_DEFAULT, nothing).unwrap();
    assert_eq!(exit.exitcode, EXITCODE_SUSPENDED);
}

#[test]
fn requests_that_a_driver_suffers_silently_are_noted() {
    let name = "requests";
    let Some(node) = vm(name) else {
        return;
    };
    let leaf = |function| VcpuCpuidEntry {
        function,
        ..Default::default()
    };
    let mut entries = [leaf(1), leaf(0)];
    let mut table = VmVcpuCpuidConfig {
        nent: 2,
        entries: entries.as_mut_ptr().cast(),
        ..Default::default()
    };
    assert_eq!(call(&node, VM_SET_CPUID, &mut table), Err(libc::EINVAL));
    assert!(noted(name, "not sorted"));
    let mut pin = VmIoapicIrq { irq: 4 };
    assert_eq!(
        call(&node, VM_IOAPIC_DEASSERT_IRQ, &mut pin),
        Err(libc::ERANGE)
    );
    assert!(noted(name, "falls too often"));
    pin.irq = 32;
    assert_eq!(
        call(&node, VM_IOAPIC_ASSERT_IRQ, &mut pin),
        Err(libc::EINVAL)
    );
    let mut message = VmLapicMsi {
        msg: 0xfee0_0000,
        addr: 0x40,
    };
    assert_eq!(call(&node, VM_LAPIC_MSI, &mut message), Err(libc::EINVAL));
    assert!(noted(name, "a message to 0x40"));
    let mut byte = VmRtcData {
        offset: 0xb,
        value: 2,
    };
    assert_eq!(call(&node, VM_RTC_WRITE, &mut byte), Err(libc::EINVAL));
    let mut trigger = VmIsaIrqTrigger {
        atpic_irq: 8,
        trigger: 1,
    };
    assert_eq!(
        call(&node, VM_ISA_SET_IRQ_TRIGGER, &mut trigger),
        Err(libc::EINVAL)
    );
    assert_eq!(call(&node, 0x76_6dfe, &mut 0), Err(libc::ENOTTY));
    call(&node, VM_DESTROY_SELF, &mut ()).unwrap();
    assert_eq!(call(&node, VM_DESTROY_PENDING, &mut ()), Ok(1));
    assert_eq!(call(&node, VM_PAUSE, &mut ()), Err(libc::ENXIO));
    assert!(noted(name, "after its end"));
}

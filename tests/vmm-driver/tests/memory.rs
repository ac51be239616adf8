//! Segments, their maps, and the end of a VM.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, unsafe_code)]

use std::ffi::c_void;
use std::io;

use vmm_driver::{Emulated, Node};
use vmm_host::hypervisor::bhyve::abi::*;
use vmm_host::hypervisor::bhyve::driver::{Driver, Instance};

fn call<T>(node: &Node, request: i32, argument: &mut T) -> Result<i32, Option<i32>> {
    let argument = std::ptr::from_mut(argument).cast::<c_void>();
    // SAFETY: each test passes what the request takes.
    unsafe { node.ioctl(request, argument) }.map_err(|error: io::Error| error.raw_os_error())
}

#[test]
fn segments_and_maps_are_checked_and_a_destroyed_vm_is_gone() {
    if let Err(error) = std::fs::File::open("/dev/kvm") {
        println!("SKIPPED: /dev/kvm: {error}");
        return;
    }
    let driver = Emulated::open().unwrap();
    let mut create = VmCreateReq::default();
    create.name[..6].copy_from_slice(b"memory");
    let argument = std::ptr::from_mut(&mut create).cast::<c_void>();
    // SAFETY: the request takes a vm_create_req.
    unsafe { driver.ioctl(VMM_CREATE_VM, argument) }.unwrap();
    // SAFETY: as above.
    let again = unsafe { driver.ioctl(VMM_CREATE_VM, argument) }.unwrap_err();
    assert_eq!(again.raw_os_error(), Some(libc::EEXIST));
    let node = driver.instance("memory").unwrap();

    let mut segment = VmMemseg {
        segid: 0,
        len: 0x2000,
        ..Default::default()
    };
    assert_eq!(call(&node, VM_ALLOC_MEMSEG, &mut segment), Ok(0));
    assert_eq!(
        call(&node, VM_ALLOC_MEMSEG, &mut segment),
        Err(Some(libc::EEXIST))
    );
    segment.segid = 5;
    assert_eq!(
        call(&node, VM_ALLOC_MEMSEG, &mut segment),
        Err(Some(libc::EINVAL))
    );
    let mut map = VmMemmap {
        len: 0x2000,
        prot: 7,
        ..Default::default()
    };
    assert_eq!(call(&node, VM_MMAP_MEMSEG, &mut map), Ok(0));
    map.len = 0x1000;
    assert_eq!(
        call(&node, VM_MMAP_MEMSEG, &mut map),
        Err(Some(libc::ENOMEM))
    );
    map.segid = 1;
    assert_eq!(
        call(&node, VM_MMAP_MEMSEG, &mut map),
        Err(Some(libc::EINVAL))
    );
    assert!(node.file(0x1000, 0x1000).is_ok());
    assert!(node.file(0x1000, 0x2000).is_err());
    assert!(node.file(DEVMEM_START, 0x2000).is_ok());
    let mut unmap = VmMunmap {
        gpa: 0,
        len: 0x1000,
    };
    assert_eq!(
        call(&node, VM_MUNMAP_MEMSEG, &mut unmap),
        Err(Some(libc::ENOENT))
    );

    assert_eq!(call(&node, VM_DESTROY_SELF, &mut ()), Ok(0));
    assert_eq!(
        call(&node, VM_MUNMAP_MEMSEG, &mut unmap),
        Err(Some(libc::ENXIO))
    );
    assert_eq!(call(&node, VM_DESTROY_PENDING, &mut ()), Ok(1));
    let noted = Emulated::violations();
    let noted = noted.iter().filter(|text| text.starts_with("memory: "));
    assert_eq!(noted.count(), 7);
    drop(node);
    assert!(driver.instance("memory").is_err());
}

//! Devices that describe themselves wrong: refused with a reason, before the guest runs.

use crate::objects::{compile, workspace};
use crate::vm;

#[test]
fn a_description_that_makes_no_sense_is_refused() {
    let name = "a_description_that_makes_no_sense_is_refused";
    if !vm::possible(name) {
        return;
    }
    let mut differ = Vec::new();
    for (defines, expected) in [
        (
            &["-DDEVICE_NAME=\"vmm.none/1\""][..],
            "the plugin's object is no device: it offers no vmm.device/1",
        ),
        (
            &["-DIO_NAME=\"vmm.none/1\""],
            "it has register regions but offers no vmm.io/1",
        ),
        (
            &["-DDESCRIBE_CODE=-5"],
            "it does not describe itself: Input/output error (os error 5)",
        ),
        (
            &["-DREGIONS=NULL"],
            "its description has 1 parts at a null pointer",
        ),
        (
            &["-DREGION_COUNT=100000"],
            "its description lists 100000 parts, more than any device has",
        ),
        (
            &["-DREGION_COUNT=SIZE_MAX"],
            "its description lists 18446744073709551615 parts, more than any device has",
        ),
        (
            &["-DKIND=99"],
            "region 0 is of a kind that this host does not know: 99",
        ),
        (
            &["-DKIND=VMM_REGION_BAR_MEM32"],
            "region 0 is a BAR, but the device is no PCI function",
        ),
        (
            &["-DSIZE=0"],
            "port 0x600 with length 0x0 is empty or ends beyond 0xffff",
        ),
        (
            &["-DSIZE=UINT64_MAX"],
            "port 0x600 with length 0xffffffffffffffff is empty or ends beyond 0xffff",
        ),
        (
            &["-DADDRESS=0x10000"],
            "port 0x10000 with length 0x1 is empty or ends beyond 0xffff",
        ),
        (
            &["-DADDRESS=UINT64_MAX", "-DSIZE=2"],
            "port 0xffffffffffffffff with length 0x2 is empty or ends beyond 0xffff",
        ),
        (
            &["-DADDRESS=0xffff", "-DSIZE=2"],
            "port 0xffff with length 0x2 is empty or ends beyond 0xffff",
        ),
        (
            &["-DADDRESS=0x3f8"],
            "port 0x3f8-0x3f8 is taken by dev.com1 (0x3f8-0x3ff)",
        ),
        (
            &["-DADDRESS=0xcf8"],
            "port 0xcf8-0xcf8 is taken by PCI configuration ports (0xcf8-0xcff)",
        ),
        (
            &[
                "-DKIND=VMM_REGION_MMIO",
                "-DADDRESS=0x1000",
                "-DSIZE=0x1000",
            ],
            "address 0x1000-0x1fff is taken by guest RAM (0x0-0x3ffffff)",
        ),
        (
            &[
                "-DKIND=VMM_REGION_MMIO",
                "-DADDRESS=0xfee00000",
                "-DSIZE=0x1000",
            ],
            "address 0xfee00000-0xfee00fff is taken by the local APICs (0xfee00000-0xfeefffff)",
        ),
        (
            &[
                "-DKIND=VMM_REGION_MMIO",
                "-DADDRESS=UINT64_MAX",
                "-DSIZE=0x1000",
            ],
            "address 0xffffffffffffffff with length 0x1000 is empty or ends beyond 0xffffffffffffffff",
        ),
        (
            &["-DPIN_COUNT=1", "-DIRQ=99"],
            "ISA interrupt 99 is out of range: 0 to 15",
        ),
        (
            &["-DPIN_COUNT=1", "-DIRQ=1000"],
            "ISA interrupt 1000 is out of range: 0 to 15",
        ),
        (
            &["-DPIN_COUNT=1", "-DIRQ=2"],
            "ISA interrupt 2 belongs to the board's interrupt controllers",
        ),
        (
            &["-DHID=\"NOT A HID AT ALL\""],
            "\"NOT A HID AT ALL\" is no ACPI hardware id: expected one like PNP0501 or QEMU0001",
        ),
        (
            &["-DERROR_TEXT=\"out of cheese\\xff\""],
            "out of cheese\u{fffd}",
        ),
    ] {
        let scene = vm::scene(&[]);
        let source = workspace("host/tests/plugins/confused.c");
        compile(&source, defines, &scene.path("plugins/libconfused.so"));
        let ended = vm::run(&scene, "mode=poweroff", "[dev.odd]\ndriver = \"confused\"");
        let line = format!("error: vm.toml:17: dev.odd: {expected}\n");
        if ended.code != Some(1) || !ended.log.ends_with(&line) {
            differ.push(format!("{defines:?}: {:?}: {}", ended.code, ended.log));
        }
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
}

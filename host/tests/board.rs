//! The board's own devices as a guest and an operator see them: PS/2, clock, NMI button, debug port.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod run;

use run::{STDIO, Scene, elf, kvm, vm};
use rustix::process::Signal;

#[test]
fn sigusr2_is_a_non_maskable_interrupt() {
    if !kvm("sigusr2_is_a_non_maskable_interrupt") {
        return;
    }
    // A second CPU that nobody has started must not mind.
    let running = Scene::new().start(&vm("mode=wait-nmi", "cpus = 2", STDIO));
    running.expect("waiting");
    running.signal(Signal::USR2);
    running
        .wait()
        .exited(0)
        .said("a non-maskable interrupt came")
        .logged("SIGUSR2: each CPU gets a non-maskable interrupt");
}

#[test]
fn a_guest_that_says_it_has_panicked_ends_by_policy() {
    if !kvm("a_guest_that_says_it_has_panicked_ends_by_policy") {
        return;
    }
    let scene = Scene::new();
    let run = |options: &str| {
        let rest = format!("{STDIO}[dev.panic]\ndriver = \"qemu-pvpanic\"\n{options}\n");
        scene.run(&vm("mode=pvpanic", "exit_on_reboot = 5", &rest))
    };
    let warning = "warn: dev.panic: the guest has panicked\n";
    run("enable_isa = true")
        .exited(0)
        .said("the port reads 0x3")
        .said("still here")
        .logged(warning);
    let stopped = run("enable_isa = true\non_panic = \"stop\"")
        .exited(1)
        .logged(warning)
        .logged("error: dev.panic: the guest has panicked: the VM stops");
    assert!(!stopped.out.contains("still here"), "{stopped}");
    let reset = run("enable_isa = true\non_panic = \"reset\"")
        .exited(5)
        .logged(warning);
    assert!(!reset.out.contains("still here"), "{reset}");
    // As in propolis: without the key there is no device.
    let none = run("on_panic = \"stop\"")
        .exited(0)
        .said("the port reads 0xff")
        .said("still here");
    assert!(!none.err.contains("has panicked"), "{none}");
}

#[test]
fn the_chipset_passes_the_guests_checks() {
    if !kvm("the_chipset_passes_the_guests_checks") {
        return;
    }
    // A check that fails resets.
    Scene::new()
        .run(&vm("checks=board", "exit_on_reboot = 1", STDIO))
        .exited(0)
        .said("a keyboard answers")
        .said("a mouse answers")
        .said("the clock interrupts periodically (5 of 5)")
        .said("PASS");
}

/// A kernel that writes `text` to the debug port and turns its power off.
fn says(text: &str) -> Vec<u8> {
    const TEXT: u32 = (2 << 20) + 30;
    let mut code = vec![0xbe]; // mov esi, text
    code.extend(TEXT.to_le_bytes());
    code.push(0xb9); // mov ecx, length
    code.extend((text.len() as u32).to_le_bytes());
    code.extend([
        0x66, 0xba, 0x02, 0x04, // mov dx, 0x402
        0xac, // lodsb
        0xee, // out dx, al
        0xe2, 0xfc, // loop to lodsb
        0x66, 0xba, 0x04, 0xb0, // mov dx, 0xb004
        0x66, 0xb8, 0x00, 0x20, // mov ax, 0x2000
        0x66, 0xef, // out dx, ax
        0xeb, 0xfe, // jmp to itself
    ]);
    assert_eq!(code.len(), 30);
    code.extend(text.as_bytes());
    elf(&code)
}

#[test]
fn what_firmware_says_on_the_debug_port_is_never_lost() {
    if !kvm("what_firmware_says_on_the_debug_port_is_never_lost") {
        return;
    }
    let scene = Scene::new();
    scene.write("kernel", says("SecCoreStartup\r\nno end\x1b"));
    let run = |key: &str| {
        let main = format!("kernel = \"kernel\"\n{key}");
        scene.run(&vm("", &main, STDIO))
    };
    // Asked for nothing: a guest that says nothing else has had its say here.
    run("").exited(0).logged(
        "the guest's last words on its debug port (debug_port in [main] keeps all):\n\
         SecCoreStartup\nno end\\x1b\n",
    );
    let logged = run("debug_port = \"log\"")
        .exited(0)
        .logged("debug port: SecCoreStartup\n")
        .logged("debug port: no end\\x1b\n");
    assert!(!logged.err.contains("last words"), "{logged}");
    let filed = run("debug_port = \"debug.out\"").exited(0);
    assert!(!filed.err.contains("SecCore"), "{filed}");
    let written = std::fs::read(scene.path("debug.out")).unwrap();
    assert_eq!(written, b"SecCoreStartup\r\nno end\x1b");
    // A device that takes no more does not end the guest.
    run("debug_port = \"/dev/full\"")
        .exited(0)
        .logged("the debug port's file can't be written, and gets no more")
        .logged("SecCoreStartup\nno end");
    // A FIFO that nobody reads would hold the guest for ever.
    let fifo = std::process::Command::new("mkfifo")
        .arg(scene.path("fifo"))
        .status()
        .unwrap();
    assert!(fifo.success());
    run("debug_port = \"fifo\"")
        .exited(1)
        .logged("[main] debug_port: fifo: it can't be written: No such device or address");
}

#[test]
fn a_sleep_that_is_not_offered_is_logged_once() {
    if !kvm("a_sleep_that_is_not_offered_is_logged_once") {
        return;
    }
    let scene = Scene::new();
    let code = [
        0xb9, 0xe8, 0x03, 0, 0, // mov ecx, 1000
        0x66, 0xba, 0x04, 0xb0, // mov dx, 0xb004
        0x66, 0xb8, 0x00, 0x24, // mov ax, 0x2400
        0x66, 0xef, // out dx, ax
        0xe2, 0xfc, // loop to out
        0x66, 0xb8, 0x00, 0x20, // mov ax, 0x2000
        0x66, 0xef, // out dx, ax
        0xeb, 0xfe, // jmp to itself
    ];
    scene.write("kernel", elf(&code));
    let ran = scene.run(&vm("", "kernel = \"kernel\"", STDIO)).exited(0);
    assert_eq!(ran.err.matches("asks for sleep type").count(), 1, "{ran}");
}

#[test]
fn a_guest_that_hammers_the_board_is_contained() {
    if !kvm("a_guest_that_hammers_the_board_is_contained") {
        return;
    }
    let disk = "[dev.disk]\ndriver = \"pci-virtio-block\"\npci-path = \"0.4.0\"\nblock_dev = \"m\"\n\
        [block_dev.m]\ntype = \"mem-async\"\nsize = \"1M\"\n";
    let rest = format!("{STDIO}{disk}");
    let ran = Scene::new().run(&vm("mode=hammer count=20000", "exit_on_reboot = 6", &rest));
    let ran = ran.exited(6).said("PASS hammer");
    assert!(ran.err.lines().count() < 200, "a quiet log: {ran}");
}

#[test]
fn a_second_start_leaves_the_debug_file_of_the_first_alone() {
    if !kvm("a_second_start_leaves_the_debug_file_of_the_first_alone") {
        return;
    }
    let scene = Scene::new();
    let text = |mode: &str| vm(mode, "debug_port = \"debug.out\"", STDIO);
    let first = scene.start(&text("mode=hang"));
    first.expect("hanging");
    scene
        .run(&text("mode=poweroff"))
        .exited(1)
        .logged("[main] debug_port: debug.out: another VM writes to it");
    first.signal(Signal::KILL);
    drop(first);
    scene.run(&text("mode=poweroff")).exited(0);
}

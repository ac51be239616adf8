//! Checks of interrupts held back, and of rings that no honest driver makes.

use crate::block::*;
use crate::interrupts::{CONFIG, INTX, QUEUE};
use crate::memory::{self, Dma};
use crate::pci::{self, Function};
use crate::virtio;
use crate::virtqueue::{Buffer, Queue};
use crate::{check, clock, interrupts, skip};

/// A masked MSI-X entry holds its interrupt back as pending.
pub fn masked_interrupts(it: Function, disk: &mut Disk, data: Dma) {
    let before = interrupts::count(QUEUE);
    disk.device.msix.mask(1, true);
    let masked = disk.device.msix.entry(1) == (u32::from(QUEUE), 1);
    disk.submit(0, 0, IN, 0, &[Buffer::into(data.address(), 512)]);
    disk.notify(0);
    let returned = clock::wait_until(PATIENCE, || disk.queue(0).has_used());
    let pending = clock::wait_until(1000, || disk.device.msix.is_pending(1));
    let held = interrupts::count(QUEUE) == before;
    disk.device.msix.mask(1, false);
    let fired = interrupts::wait(QUEUE, before, PATIENCE);
    let _ = disk.queue(0).take_used();
    check!(
        masked && returned && pending && held && fired && !disk.device.msix.is_pending(1),
        "block",
        "{it}: a masked vector stays pending until unmasked (held {held}, pending {pending}, then fired {fired})"
    );
    disk.device.msix.control(true, true);
    let before = interrupts::count(QUEUE);
    disk.submit(0, 0, IN, 0, &[Buffer::into(data.address(), 512)]);
    disk.notify(0);
    let _ = clock::wait_until(PATIENCE, || disk.queue(0).has_used());
    clock::sleep(5);
    let held = interrupts::count(QUEUE) == before;
    disk.device.msix.control(true, false);
    let fired = interrupts::wait(QUEUE, before, PATIENCE);
    let _ = disk.queue(0).take_used();
    check!(
        held && fired,
        "block",
        "{it}: so does the function mask (held {held}, then fired {fired})"
    );
}

/// With MSI-X off the device uses its interrupt line, wherever the board routes it.
pub fn interrupt_line(it: Function, disk: Disk, data: Dma) -> Result<Disk, &'static str> {
    // Not the timers (0, 2, 8), the serial ports (3, 4) and the keyboard (1, 12). Edge triggered,
    // so that a line that stays up interrupts once.
    let inputs = || (5..24).filter(|input| ![8, 12].contains(input));
    pci::route_lines();
    let mut disk = disk.restart_on_line()?;
    let _ = disk.device.isr();
    inputs().for_each(|input| interrupts::route(input, INTX));
    let before = interrupts::count(INTX);
    disk.submit(0, 0, IN, 0, &[Buffer::into(data.address(), 512)]);
    disk.notify(0);
    let fired = interrupts::wait(INTX, before, PATIENCE);
    let _ = clock::wait_until(PATIENCE, || disk.queue(0).has_used());
    let _ = disk.queue(0).take_used();
    let shown = it.interrupt_status();
    let (first, second) = (disk.device.isr(), disk.device.isr());
    let released = !it.interrupt_status();
    check!(
        fired && shown && first == 1 && second == 0 && released,
        "block",
        "{it}: without MSI-X its line interrupts until ISR is read (fired {fired}, ISR {first} then {second})"
    );
    it.disable_line(true);
    let before = interrupts::count(INTX);
    disk.submit(0, 0, IN, 0, &[Buffer::into(data.address(), 512)]);
    disk.notify(0);
    let _ = clock::wait_until(PATIENCE, || disk.queue(0).has_used());
    let _ = disk.queue(0).take_used();
    clock::sleep(5);
    let silent = interrupts::count(INTX) == before;
    let _ = disk.device.isr();
    it.disable_line(false);
    inputs().for_each(interrupts::mask);
    check!(
        silent,
        "block",
        "{it}: and not at all while the command register forbids it"
    );
    Ok(disk)
}

/// Rings no honest driver makes. Each must stop the device, not the machine, and a reset must
/// bring it back.
pub fn hostile(it: Function, mut disk: Disk) -> Result<(), &'static str> {
    type Attack = (&'static str, fn(&mut Queue, u64));
    let attacks: [Attack; 6] = [
        ("a head beyond the ring", |queue, _| {
            let beyond = queue.size + 7;
            queue.offer(beyond);
        }),
        ("a next beyond the ring", |queue, at| {
            queue.descriptor(0, at, 16, 1, queue.size + 1);
            queue.offer(0);
        }),
        ("a chain that is a loop", |queue, at| {
            queue.descriptor(0, at, 16, 1, 1);
            queue.descriptor(1, at, 16, 1, 0);
            queue.offer(0);
        }),
        ("a buffer where no memory is", |queue, at| {
            queue.descriptor(0, at, 16, 1, 1);
            queue.descriptor(1, 0x00ff_ffff_ffff_f000, 512, 3, 2);
            queue.descriptor(2, at + 16, 1, 2, 0);
            queue.offer(0);
        }),
        ("a readable buffer behind a writable one", |queue, at| {
            queue.descriptor(0, at, 16, 1, 1);
            queue.descriptor(1, at + 16, 1, 3, 2);
            queue.descriptor(2, at + 32, 16, 0, 0);
            queue.offer(0);
        }),
        ("a request without a status byte", |queue, at| {
            queue.descriptor(0, at, 16, 0, 0);
            queue.offer(0);
        }),
    ];
    for (what, attack) in attacks {
        if what.contains("no memory") && memory::zero_page() == 0 {
            // QEMU lets a device read and write where nothing is.
            skip!("block", "{it}: {what}: other boards than ours allow it");
            continue;
        }
        disk = disk.restart(F_FLUSH, 16)?;
        let (header, _) = disk.header(0, IN, 0);
        let before = interrupts::count(CONFIG);
        attack(disk.queue(0), header.address);
        disk.notify(0);
        let mut returned = false;
        let stopped = clock::wait_until(2000, || {
            // Only a request that has nowhere to put its status may come back without one.
            returned = what.contains("status byte") && disk.queue(0).has_used();
            returned || disk.device.status() & virtio::NEEDS_RESET != 0
        });
        let told = returned || interrupts::wait(CONFIG, before, 1000);
        let answer = if returned {
            "is returned"
        } else {
            "stops the device, which says so"
        };
        check!(
            stopped && told,
            "block",
            "{it}: {what} {answer} ({stopped}, {told})"
        );
    }
    disk = disk.restart(F_FLUSH, 16)?;
    let data = memory::dma(4096);
    check!(
        disk.read(0, data, 512),
        "block",
        "{it}: after a reset it works again"
    );
    check!(
        disk.device.isr() & !3 == 0,
        "block",
        "{it}: the ISR register has no unknown bit"
    );
    check!(disk.device.reset(), "block", "{it}: resets at the end");
    Ok(())
}

//! Checks of a disk's PCI side: registers that move with their BAR, and the legacy interface.

use crate::block::*;
use crate::io::{inb, inl, inw, outb, outl, outw, read8, write8, write32, write64};
use crate::memory::{self, Dma};
use crate::pci::Function;
use crate::virtio::Device;
use crate::virtqueue::{Buffer, Queue};
use crate::{check, clock, skip};

/// A place in the PCI window that nothing else here uses.
const ELSEWHERE: u64 = 0xd800_0000;

/// Moves every memory BAR, looks whether the device came along, and moves them back.
pub fn relocation(it: Function) -> Result<(), &'static str> {
    let device = Device::find(it)?;
    let features = device.features();
    let mut homes = [0; 6];
    let mut next = ELSEWHERE;
    it.bars(|index, bar| {
        if !bar.io {
            homes[usize::from(index)] = bar.address;
            next = next.next_multiple_of(bar.size);
            it.set_bar(index, bar, next);
            next += bar.size;
        }
    });
    let moved = Device::find(it)?;
    let there = moved.features() == features && moved.reset() && moved.queue_size(0) != 0;
    it.bars(|index, bar| {
        if !bar.io {
            it.set_bar(index, bar, homes[usize::from(index)]);
        }
    });
    let back = device.features() == features;
    check!(
        there && back,
        "block",
        "{it}: its registers move with their BARs (there {there}, back {back})"
    );
    if memory::zero_page() != 0 {
        let old = it.read16(4);
        it.write16(4, old & !2);
        let gone = device.features() == !0;
        it.write16(4, old);
        check!(
            gone && device.features() == features,
            "block",
            "{it}: with memory decoding off they are gone, with it on they are back"
        );
    }
    Ok(())
}

/// Registers of the legacy interface (virtio 1.2 section 4.1.4.8), in the I/O BAR 0.
struct Legacy(u16);

impl Legacy {
    fn status(&self, status: u8) {
        outb(self.0 + 0x12, status);
    }
}

/// Reads a sector through the legacy interface and compares it with what the modern one gave.
pub fn legacy(it: Function, modern: Dma) {
    let Some(bar) = it.bar(0).filter(|bar| bar.io && it.identity().1 == 0x1001) else {
        skip!("block", "{it}: has no legacy interface");
        return;
    };
    let device = Legacy(bar.address as u16);
    if let Some(msix) = it.msix() {
        msix.control(false, false);
    }
    device.status(0);
    let cleared = inb(device.0 + 0x12) == 0;
    device.status(1);
    device.status(3);
    let features = inl(device.0);
    outl(device.0 + 4, 0);
    outw(device.0 + 0x0e, 0);
    let size = inw(device.0 + 0x0c);
    check!(
        cleared && size.is_power_of_two(),
        "block",
        "{it}: legacy interface at port {:#x}, features {features:#x}, queue of {size}",
        device.0
    );
    if !size.is_power_of_two() {
        return;
    }
    let mut queue = Queue::new(size, false);
    outl(device.0 + 8, (queue.addresses().0 >> 12) as u32);
    let kept = u64::from(inl(device.0 + 8)) << 12 == queue.addresses().0;
    device.status(7);
    let sectors = u64::from(inl(device.0 + 0x14)) | u64::from(inl(device.0 + 0x18)) << 32;
    let memory = memory::dma(4096);
    let header = memory::dma(4096);
    write32(header.address(), IN);
    write64(header.address() + 8, 0);
    write8(header.address() + 16, 0xee);
    queue.add(&[
        Buffer::out(header.address(), 16),
        Buffer::into(memory.address(), 512),
        Buffer::into(header.address() + 16, 1),
    ]);
    outw(device.0 + 0x10, 0);
    let returned = clock::wait_until(PATIENCE, || queue.has_used());
    let isr = inb(device.0 + 0x13);
    let same = (0..512).all(|i| read8(memory.address() + i) == read8(modern.address() + i));
    check!(
        kept && returned && read8(header.address() + 16) == OK && isr & 1 == 1 && same,
        "block",
        "{it}: a sector read the legacy way, {sectors} sectors, ISR {isr}"
    );
    device.status(0);
}

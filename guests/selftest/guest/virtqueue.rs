//! The driver's side of a split virtqueue (virtio 1.2 section 2.7).

use crate::io::{fence, read16, read32, write16, write32, write64};
use crate::memory::{self, Dma};

/// Descriptor continues in `next`.
const NEXT: u16 = 1;
/// The device writes this buffer.
const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
const INDIRECT: u16 = 4;

/// One buffer of a request.
#[derive(Clone, Copy)]
pub struct Buffer {
    /// Where.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// The device writes it.
    pub writable: bool,
}

impl Buffer {
    /// The flags of its descriptor.
    fn flags(self, more: bool) -> u16 {
        (if more { NEXT } else { 0 }) | (if self.writable { WRITE } else { 0 })
    }

    /// The device reads it.
    pub fn out(address: u64, length: u32) -> Self {
        Buffer {
            address,
            length,
            writable: false,
        }
    }

    /// The device writes it.
    pub fn into(address: u64, length: u32) -> Self {
        Buffer {
            address,
            length,
            writable: true,
        }
    }
}

/// One queue.
pub struct Queue {
    /// Number of descriptors.
    pub size: u16,
    descriptors: Dma,
    available: Dma,
    used: Dma,
    next_available: u16,
    seen_used: u16,
    next_descriptor: u16,
    event_index: bool,
}

impl Queue {
    /// An empty queue in fresh memory. Both sides' areas lie as the legacy interface wants them:
    /// descriptors and available ring together, the used ring on the next page boundary.
    pub fn new(size: u16, event_index: bool) -> Self {
        let entries = usize::from(size);
        let before_used = (entries * 16 + 6 + entries * 2).next_multiple_of(4096);
        let base = memory::dma(before_used + 6 + entries * 8);
        Queue {
            size,
            descriptors: base,
            available: base.from(entries * 16),
            used: base.from(before_used),
            next_available: 0,
            seen_used: 0,
            next_descriptor: 0,
            event_index,
        }
    }

    /// Addresses of descriptor table, available ring, used ring.
    pub fn addresses(&self) -> (u64, u64, u64) {
        (
            self.descriptors.address(),
            self.available.address(),
            self.used.address(),
        )
    }

    /// Writes one raw descriptor.
    pub fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        write_descriptor(
            self.descriptors.address() + u64::from(index) * 16,
            address,
            length,
            flags,
            next,
        );
    }

    fn take(&mut self) -> u16 {
        let index = self.next_descriptor;
        self.next_descriptor = (index + 1) % self.size;
        index
    }

    /// Makes a chain of descriptors and offers it; the caller notifies. Descriptors are used in
    /// turn, so at most `size` may be outstanding. Returns the head's index.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (i, buffer) in buffers.iter().enumerate() {
            let index = self.take();
            let flags = buffer.flags(i + 1 < buffers.len());
            self.descriptor(
                index,
                buffer.address,
                buffer.length,
                flags,
                self.next_descriptor,
            );
        }
        self.offer(head);
        head
    }

    /// The same through a table of its own, which costs one descriptor.
    pub fn add_indirect(&mut self, table: Dma, buffers: &[Buffer]) -> u16 {
        for (i, buffer) in buffers.iter().enumerate() {
            let flags = buffer.flags(i + 1 < buffers.len());
            write_descriptor(
                table.address() + i as u64 * 16,
                buffer.address,
                buffer.length,
                flags,
                i as u16 + 1,
            );
        }
        let index = self.take();
        self.descriptor(
            index,
            table.address(),
            buffers.len() as u32 * 16,
            INDIRECT,
            0,
        );
        self.offer(index);
        index
    }

    /// Puts a head into the available ring, whatever it is.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        write16(self.available.address() + 4 + slot * 2, head);
        self.next_available = self.next_available.wrapping_add(1);
        fence();
        write16(self.available.address() + 2, self.next_available);
        fence();
    }

    /// Whether the device wants a notification for what was offered since it stood at `old`
    /// (2.7.7.2, 2.7.10).
    pub fn wants_notification(&self, old: u16) -> bool {
        if self.event_index {
            let event = read16(self.used.address() + 4 + u64::from(self.size) * 8);
            self.next_available.wrapping_sub(event).wrapping_sub(1)
                < self.next_available.wrapping_sub(old)
        } else {
            read16(self.used.address()) & 1 == 0
        }
    }

    /// Index of the next entry of the available ring.
    pub fn position(&self) -> u16 {
        self.next_available
    }

    /// Asks for an interrupt only when `count` more requests than now are done (event index).
    pub fn interrupt_after(&self, count: u16) {
        let event = self.seen_used.wrapping_add(count).wrapping_sub(1);
        write16(
            self.available.address() + 4 + u64::from(self.size) * 2,
            event,
        );
        fence();
    }

    /// Whether the device has returned a request that was not taken yet.
    pub fn has_used(&self) -> bool {
        fence();
        read16(self.used.address() + 2) != self.seen_used
    }

    /// Takes a returned request: head and length written. With the event index the next return
    /// interrupts again.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        if !self.has_used() {
            return None;
        }
        let entry = self.used.address() + 4 + u64::from(self.seen_used % self.size) * 8;
        self.seen_used = self.seen_used.wrapping_add(1);
        if self.event_index {
            self.interrupt_after(1);
        }
        Some((read32(entry), read32(entry + 4)))
    }
}

fn write_descriptor(at: u64, address: u64, length: u32, flags: u16, next: u16) {
    write64(at, address);
    write32(at + 8, length);
    write16(at + 12, flags);
    write16(at + 14, next);
}

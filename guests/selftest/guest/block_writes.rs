//! Checks that write to a disk: data, ring shapes, queues, zeroes.

use crate::block::*;
use crate::block_checks::MARK;
use crate::interrupts::QUEUE;
use crate::io::{read64, write8, write32, write64};
use crate::memory::{self, Dma};
use crate::pci::Function;
use crate::virtio;
use crate::virtqueue::Buffer;
use crate::{check, clock, interrupts, skip};

/// Everything that writes; the sectors from 0 to 255 are used.
pub fn run(it: Function, mut disk: Disk, offered: u64, data: Dma) -> Result<Disk, &'static str> {
    data.set(0);
    for (i, byte) in MARK.iter().enumerate() {
        write8(data.address() + i as u64, *byte);
    }
    check!(
        disk.write(0, data, 512) && disk.flush(),
        "block",
        "{it}: the mark is written and flushed"
    );

    data.fill(1);
    check!(
        disk.write(8, data, 65536) && disk.flush(),
        "block",
        "{it}: 64 KiB written and flushed"
    );
    data.set(0);
    check!(
        disk.read(8, data, 65536) && data.holds(1, 65536),
        "block",
        "{it}: and read back the same"
    );

    scattered(it, &mut disk, data);
    wraps(it, &mut disk, data);
    disk = with_features(it, disk, offered, data)?;
    if offered & F_QUEUES != 0 {
        disk = several_queues(it, disk, data)?;
    }
    if offered & (F_DISCARD | F_WRITE_ZEROES) != 0 {
        disk = zeroes(it, disk, offered, data)?;
    }
    Ok(disk)
}

/// One request whose data lies in pieces of several sizes at odd places.
fn scattered(it: Function, disk: &mut Disk, data: Dma) {
    let source = memory::dma(16384);
    source.fill(2);
    let mut pieces = [Buffer::out(0, 0); 6];
    let (mut at, sizes) = (source.address(), [512u32, 1, 1023, 2048, 4096, 512]);
    for (piece, size) in pieces.iter_mut().zip(sizes) {
        *piece = Buffer::out(at, size);
        at += u64::from(size);
    }
    let written = disk.request(OUT, 16, &pieces) == Some(OK);
    data.set(0);
    check!(
        written && disk.read(16, data, 8192) && data.holds(2, 8192),
        "block",
        "{it}: a write from six pieces"
    );
    data.set(0);
    for (piece, size) in pieces.iter_mut().zip(sizes) {
        *piece = Buffer::into(piece.address - source.address() + data.address(), size);
    }
    check!(
        disk.request(IN, 16, &pieces) == Some(OK) && data.holds(2, 8192),
        "block",
        "{it}: a read into six pieces"
    );
}

/// More requests than the ring has entries, four at a time.
fn wraps(it: Function, disk: &mut Disk, data: Dma) {
    let mut good = true;
    for round in 0..20u64 {
        data.fill(100 + round);
        let mut heads = [0; 4];
        for slot in 0..4u64 {
            let piece = Buffer::out(data.address() + slot * 4096, 4096);
            heads[slot as usize] = disk.submit(0, slot, OUT, 32 + slot * 8, &[piece]);
        }
        disk.notify(0);
        for _ in 0..4 {
            good &= clock::wait_until(PATIENCE, || disk.queue(0).has_used());
            let head = disk.queue(0).take_used().map(|(head, _)| head as u16);
            good &= head.is_some_and(|head| heads.contains(&head));
        }
        good &= (0..4).all(|slot| disk.status_of(slot) == OK);
        data.set(0);
        good &= disk.read(32, data, 16384) && data.holds(100 + round, 16384);
    }
    check!(
        good,
        "block",
        "{it}: 80 writes, four at a time, on a ring of 16"
    );
}

/// Indirect descriptors and the event index, if offered.
fn with_features(it: Function, disk: Disk, offered: u64, data: Dma) -> Result<Disk, &'static str> {
    let wanted = F_FLUSH | virtio::F_INDIRECT | virtio::F_EVENT_INDEX;
    if offered & (virtio::F_INDIRECT | virtio::F_EVENT_INDEX) == 0 {
        skip!(
            "block",
            "{it}: offers neither indirect descriptors nor the event index"
        );
        return Ok(disk);
    }
    let mut disk = disk.restart(wanted, 256)?;
    let table = memory::dma(4096);
    if offered & virtio::F_INDIRECT != 0 {
        data.fill(3);
        let (head, status) = disk.header(0, OUT, 64);
        let piece = |i: u64| Buffer::out(data.address() + i * 4096, 4096);
        let buffers = [head, piece(0), piece(1), piece(2), piece(3), status];
        let before = interrupts::count(QUEUE);
        disk.queue(0).add_indirect(table, &buffers);
        disk.notify(0);
        let written = disk.wait(0, before).is_some() && disk.status_of(0) == OK;
        data.set(0);
        let same = disk.read(64, data, 16384) && data.holds(3, 16384);
        check!(
            written && same,
            "block",
            "{it}: an indirect request with four pieces"
        );
    }
    if offered & virtio::F_EVENT_INDEX != 0 {
        event_index(it, &mut disk, data);
    }
    Ok(disk)
}

/// Eight requests with one interrupt asked for, at the last.
fn event_index(it: Function, disk: &mut Disk, data: Dma) {
    const BATCH: u16 = 8;
    let before = interrupts::count(QUEUE);
    disk.queue(0).interrupt_after(BATCH);
    let old = disk.queue(0).position();
    for slot in 0..BATCH {
        let piece = Buffer::into(data.address() + u64::from(slot) * 512, 512);
        disk.submit(0, u64::from(slot), IN, u64::from(slot), &[piece]);
    }
    check!(
        disk.queue(0).wants_notification(old),
        "block",
        "{it}: event index: an idle device wants a notification"
    );
    disk.notify(0);
    let fired = interrupts::wait(QUEUE, before, PATIENCE);
    let mut returned = 0;
    while disk.queue(0).take_used().is_some() {
        returned += 1;
    }
    let good = (0..u64::from(BATCH)).all(|slot| disk.status_of(slot) == OK);
    let interrupts = interrupts::count(QUEUE) - before;
    check!(
        fired && good && returned == BATCH && interrupts == 1,
        "block",
        "{it}: event index: {returned} requests, {interrupts} interrupt"
    );
}

fn several_queues(it: Function, disk: Disk, data: Dma) -> Result<Disk, &'static str> {
    let mut disk = disk.restart(F_FLUSH | F_QUEUES, 64)?;
    let count = disk.queues.iter().flatten().count();
    let mut good = true;
    for queue in 0..count {
        let sector = 96 + queue as u64 * 8;
        data.fill(200 + queue as u64);
        good &=
            disk.request_on(queue, OUT, sector, &[Buffer::out(data.address(), 4096)]) == Some(OK);
        data.set(0);
        // Read by the neighbour, so that the queues are seen to share one disk.
        let other = (queue + 1) % count;
        good &=
            disk.request_on(other, IN, sector, &[Buffer::into(data.address(), 4096)]) == Some(OK);
        good &= data.holds(200 + queue as u64, 4096);
    }
    check!(
        good,
        "block",
        "{it}: {count} queues, each with its own interrupt, see one disk"
    );
    Ok(disk)
}

fn zeroes(it: Function, disk: Disk, offered: u64, data: Dma) -> Result<Disk, &'static str> {
    let mut disk = disk.restart(F_FLUSH | F_DISCARD | F_WRITE_ZEROES, 64)?;
    let range = memory::dma(4096);
    let end = disk.sectors;
    let describe = |sector: u64, sectors: u32, flags: u32| {
        write64(range.address(), sector);
        write32(range.address() + 8, sectors);
        write32(range.address() + 12, flags);
        Buffer::out(range.address(), 16)
    };
    if offered & F_WRITE_ZEROES != 0 {
        data.fill(4);
        let _ = disk.write(128, data, 8192);
        let done = disk.request(WRITE_ZEROES, 128, &[describe(128, 8, 0)]) == Some(OK);
        data.set(0x55);
        let read = disk.read(128, data, 8192);
        check!(
            done && read && data.all(0, 4096),
            "block",
            "{it}: zeroes written over eight sectors"
        );
        data.fill(4);
        let rest = memory::dma(4096);
        let kept = disk.read(136, rest, 4096)
            && (0..512)
                .all(|i| read64(rest.address() + i * 8) == read64(data.address() + 4096 + i * 8));
        check!(kept, "block", "{it}: and over no others");
        let status = disk.request(WRITE_ZEROES, 0, &[describe(end, 8, 0)]);
        check!(
            status == Some(IOERR),
            "block",
            "{it}: zeroes behind the end are an I/O error"
        );
        let status = disk.request(WRITE_ZEROES, 0, &[describe(128, 8, 0x8000_0000)]);
        check!(
            status == Some(UNSUPPORTED),
            "block",
            "{it}: unknown flags are unsupported"
        );
    }
    if offered & F_DISCARD != 0 {
        check!(
            disk.request(DISCARD, 0, &[describe(160, 8, 0)]) == Some(OK),
            "block",
            "{it}: eight sectors discarded"
        );
        let status = disk.request(DISCARD, 0, &[describe(end - 1, 8, 0)]);
        check!(
            status == Some(IOERR),
            "block",
            "{it}: a discard over the end is an I/O error"
        );
    }
    Ok(disk)
}

//! Checks of every virtio block disk: identity, reading, errors.
//!
//! Checks write to the disk. That is done only to a disk whose first sector is all zero or starts
//! with the mark of an earlier run, so that a wrong configuration costs nobody data.

use crate::block::*;
use crate::io::read8;
use crate::memory::{self, Dma};
use crate::pci::Function;
use crate::virtio::{self, Device};
use crate::virtqueue::Buffer;
use crate::{block_faults, block_transport, block_writes, check, skip};

pub const MARK: &[u8; 8] = b"SELFTEST";

/// Checks every disk.
pub fn run() {
    let mut count = 0;
    functions(|it| {
        count += 1;
        it.enable();
        let mark = memory::mark();
        if let Err(why) = one(it) {
            check!(false, "block", "{it}: {why}");
        }
        memory::free_to(mark);
    });
    if count == 0 {
        skip!("block", "no virtio block disk");
    }
}

fn one(it: Function) -> Result<(), &'static str> {
    let device = Device::find(it)?;
    check!(
        device.reset(),
        "block",
        "{it}: resets, {} MSI-X vectors, {} queues",
        device.msix.vectors,
        device.queues()
    );
    let offered = device.features();
    check!(
        offered & virtio::F_VERSION_1 != 0,
        "block",
        "{it}: is modern, offers {offered:#x}"
    );
    let generation = device.generation();
    let mut disk = Disk::start(device, F_FLUSH | F_READ_ONLY, 16)?;
    check!(
        disk.device.generation() == generation,
        "block",
        "{it}: {} sectors, the configuration stands still",
        disk.sectors
    );

    let data = memory::dma(64 * 1024);
    let status = disk.request(GET_ID, 0, &[Buffer::into(data.address(), 20)]);
    let mut text = [0; 20];
    let id = data.text(&mut text);
    check!(status == Some(OK), "block", "{it}: its id is \"{id}\"");
    if disk.sectors < 256 {
        skip!(
            "block",
            "{it}: {} sectors are too few for the other checks",
            disk.sectors
        );
        return Ok(());
    }
    check!(
        disk.read(0, data, 512),
        "block",
        "{it}: sector 0 can be read"
    );
    reads_fail_where_they_must(it, &mut disk, data);
    if offered & F_READ_ONLY != 0 {
        read_only(it, &mut disk, data);
    } else {
        let _ = disk.read(0, data, 512);
        let mut text = [0; 8];
        if !(data.all(0, 512) || data.text(&mut text).as_bytes() == MARK) {
            skip!(
                "block",
                "{it}: it has data of somebody else, so nothing is written to it"
            );
        } else {
            disk = block_writes::run(it, disk, offered, data)?;
        }
    }
    let _ = disk.read(0, data, 512);
    block_transport::relocation(it)?;
    block_transport::legacy(it, data);
    let mut disk = disk.restart(F_FLUSH, 16)?;
    block_faults::masked_interrupts(it, &mut disk, data);
    disk = block_faults::interrupt_line(it, disk, data)?;
    block_faults::hostile(it, disk)
}

fn reads_fail_where_they_must(it: Function, disk: &mut Disk, data: Dma) {
    let end = disk.sectors;
    check!(
        disk.read(end - 1, data, 512),
        "block",
        "{it}: the last sector can be read"
    );
    let one = [Buffer::into(data.address(), 512)];
    let two = [Buffer::into(data.address(), 1024)];
    check!(
        disk.request(IN, end, &one) == Some(IOERR),
        "block",
        "{it}: a read behind the end is an I/O error"
    );
    check!(
        disk.request(IN, end - 1, &two) == Some(IOERR),
        "block",
        "{it}: so is one that reaches over it"
    );
    check!(
        disk.request(IN, u64::MAX, &one) == Some(IOERR),
        "block",
        "{it}: and one at the largest sector number"
    );
    check!(
        disk.request(0x77, 0, &one) == Some(UNSUPPORTED),
        "block",
        "{it}: an unknown request is unsupported"
    );
    check!(
        disk.request(IN, 0, &one) == Some(OK),
        "block",
        "{it}: and the disk still reads"
    );
}

fn read_only(it: Function, disk: &mut Disk, data: Dma) {
    let copy = memory::dma(4096);
    let before = disk.read(0, data, 512);
    copy.fill(0x0bad);
    let status = disk.request(OUT, 0, &[Buffer::out(copy.address(), 512)]);
    check!(
        status == Some(IOERR),
        "block",
        "{it}: a write to the read-only disk is an I/O error"
    );
    let after = disk.read(0, copy, 512);
    let same = (0..512).all(|i| read8(data.address() + i) == read8(copy.address() + i));
    check!(
        before && after && same,
        "block",
        "{it}: and changes nothing"
    );
}

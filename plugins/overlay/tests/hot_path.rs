//! Requests allocate nothing and copy nothing: the base gets the very list that the device gave, or parts of it.

#![allow(clippy::unwrap_used, clippy::expect_used, unsafe_code)] // tests; a global allocator is unsafe to write

mod support;

use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use vmm_plugin_api::testing::{CountingAllocator, allocations};

use support::made::root_of;
use support::{FUA, MIB, Setup, WRITE};
use vmm_plugin_api::abi::Root;
use vmm_plugin_api::abi::block::BLOCK_READ_ONLY;
use vmm_plugin_api::testing::run_transfer;
use vmm_plugin_api::{
    Batch, BlockBackend, BlockDone, BlockInfo, BlockOp, BlockQueue, BlockQueueHandle, BlockRequest,
    Host, Options, Result,
};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Address and length of each element, with the request's offset.
type List = (u64, Vec<(usize, usize)>);

static SEEN: Mutex<Vec<List>> = Mutex::new(Vec::new());
static ROOT: Root = root_of::<Probe>();

/// A read-only base that notes what it is asked.
struct Probe;

struct ProbeQueue(Vec<BlockDone>);

impl BlockBackend for Probe {
    type Queue = ProbeQueue;
    fn create(_options: &Options<'_>, _host: &Host) -> Result<Self> {
        Ok(Self)
    }
    fn info(&self) -> BlockInfo {
        BlockInfo {
            bytes: MIB,
            logical: 512,
            physical: 4096,
            features: BLOCK_READ_ONLY,
            max_segments: 64,
            alignment: 1,
            max_discard: 0,
        }
    }
    fn open_queue(&self, _depth: u32) -> Result<ProbeQueue> {
        Ok(ProbeQueue(Vec::new()))
    }
}

impl BlockQueue for ProbeQueue {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        for request in batch {
            let place = |s: &vmm_plugin_api::GuestSlice| (s.as_ptr() as usize, s.len());
            let list = request.segments().iter().map(place).collect();
            SEEN.lock().unwrap().push((request.offset(), list));
            self.0.push(request.done(0));
        }
        batch.len()
    }
    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let count = done.len().min(self.0.len());
        for (slot, one) in done.iter_mut().zip(self.0.drain(..count)) {
            *slot = one;
        }
        count
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[test]
fn the_base_gets_the_guests_own_list() {
    let setup = Setup::new();
    let base = setup.host.block(&ROOT, "probe", &[]).unwrap();
    let overlay = setup.overlay(&base, "over");
    let mut disk = setup.disk(&overlay);
    let memory = setup.host.memory();
    let list = [
        memory.writable(100, 700).unwrap(),
        memory.writable(9000, 1348).unwrap(),
    ];
    let start = list[0].as_ptr() as usize - 100;
    SEEN.lock().unwrap().clear();
    assert_eq!(
        run_transfer(&mut disk.queue, BlockOp::Read, 8192, &list).unwrap(),
        0
    );
    let whole = vec![(start + 100, 700), (start + 9000, 1348)];
    assert_eq!(*SEEN.lock().unwrap(), [(8192, whole)]);
    // The second of four blocks is in the file.
    assert_eq!(disk.write(WRITE, 8192 + 512, &[5; 512]), 0);
    SEEN.lock().unwrap().clear();
    assert_eq!(
        run_transfer(&mut disk.queue, BlockOp::Read, 8192, &list).unwrap(),
        0
    );
    let parts = [
        (8192, vec![(start + 100, 512)]),
        (8192 + 1024, vec![(start + 9000 + 324, 1024)]),
    ];
    assert_eq!(*SEEN.lock().unwrap(), parts);
}

fn finish(queue: &mut BlockQueueHandle, batch: &mut Batch) {
    let mut done = [BlockDone::default(); 64];
    let mut left = batch.len();
    while left > 0 {
        queue.submit(batch);
        let count = queue.reap(&mut done);
        left -= count;
        assert!(done[..count].iter().all(|d| d.result == 0));
        if left > 0 && count == 0 {
            let fd = queue.fd().unwrap();
            let wait = rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN);
            rustix::event::poll(&mut [wait], None).unwrap();
            queue.drain();
        }
    }
}

#[test]
fn requests_allocate_nothing() {
    let setup = Setup::new();
    setup.image("base", MIB);
    let base = setup.file("base", &[]);
    let overlay = setup.overlay(&base, "over");
    let mut queue = overlay.as_block().unwrap().open_queue(64).unwrap();
    let slice = setup.host.memory().writable(0, 4096).unwrap();
    let list = vec![slice.part(0, 512); 8];
    let mut batch = Batch::default();
    let mut round = || {
        for i in 0..32 {
            let op = match i % 4 {
                0 => WRITE,
                1 if i == 1 => FUA,
                _ => BlockOp::Read,
            };
            batch.transfer(i, op, i * 3584, &list);
        }
        finish(&mut queue, &mut batch);
        batch.control(0, BlockOp::Flush, 0, 0);
        finish(&mut queue, &mut batch);
    };
    round();
    round();
    let before = allocations();
    for _ in 0..50 {
        round();
    }
    assert_eq!(allocations() - before, 0, "allocations in 1650 requests");
    drop(std::hint::black_box(vec![1u8]));
    assert!(allocations() > before, "allocations are counted");
}

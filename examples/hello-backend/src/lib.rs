//! A disk that is computed: every aligned 8 bytes hold their own offset. It shows what a block backend has to do, and serves
//! to test that transfers go where they should.
//!
//! ```toml
//! [block_dev.numbers]
//! type = "hello-pattern"
//! size = "64M"
//! ```

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use vmm_plugin_api::abi::block::BLOCK_READ_ONLY;
use vmm_plugin_api::{
    BlockBackend, BlockDone, BlockInfo, BlockOp, BlockQueue, BlockRequest, Error, Host, Options,
    Result,
};

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: {},
    blocks: { "hello-pattern" => Pattern },
    chars: {},
}

const BLOCK: u64 = 512;

/// The disk.
pub struct Pattern {
    info: BlockInfo,
}

impl BlockBackend for Pattern {
    type Queue = PatternQueue;

    fn create(options: &Options<'_>, _host: &Host) -> Result<Self> {
        let size = options.u64("size")?;
        if size == 0 || !size.is_multiple_of(BLOCK) {
            return Err(Error::msg(format!(
                "`size` is {size} bytes; use a multiple of {BLOCK} above 0"
            )));
        }
        let info = BlockInfo {
            bytes: size,
            logical: BLOCK as u32,
            physical: BLOCK as u32,
            features: BLOCK_READ_ONLY,
            max_segments: 128,
            alignment: 1,
            max_discard: 0,
        };
        Ok(Self { info })
    }

    fn info(&self) -> BlockInfo {
        self.info
    }

    fn open_queue(&self, depth: u32) -> Result<PatternQueue> {
        Ok(PatternQueue {
            info: self.info,
            done: VecDeque::with_capacity(depth as usize),
        })
    }
}

/// A queue. It does every request inside submit and keeps the completions until the device reaps them; memory for
/// them is taken once, when the queue is opened.
pub struct PatternQueue {
    info: BlockInfo,
    done: VecDeque<BlockDone>,
}

impl PatternQueue {
    fn run(&self, request: &BlockRequest) -> i32 {
        // Bounds, alignment and read-only are checked by the SDK.
        let code = request.check(&self.info);
        if code == 0 && request.op() == Some(BlockOp::Read) {
            read(request);
        }
        code
    }
}

/// Fills the scatter list. Its pieces may have any length.
fn read(request: &BlockRequest) {
    let mut at = request.offset();
    for segment in request.segments() {
        let mut done = 0;
        while done < segment.len() {
            let word = (at & !7).to_le_bytes();
            let wrote = segment.write(done, &word[(at % 8) as usize..]);
            done += wrote;
            at += wrote as u64;
        }
    }
}

impl BlockQueue for PatternQueue {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        let taken = batch.len().min(self.done.capacity() - self.done.len());
        for request in &batch[..taken] {
            let done = request.done(self.run(request));
            self.done.push_back(done);
        }
        taken
    }

    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let count = done.len().min(self.done.len());
        for (slot, completion) in done.iter_mut().zip(self.done.drain(..count)) {
            *slot = completion;
        }
        count
    }

    /// Nothing ever waits, so there is no descriptor to wait on.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

//! A queue of requests on an image: decides which are done at once and which wait.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmm_plugin_api::{BlockDone, BlockInfo, BlockOp, BlockQueue, BlockRequest, GuestSlice, Result};

use crate::image::{Image, MAX_SEGMENTS};
use crate::pinned::Pinned;
use crate::pool::{Perform, Pool, Threads};
use crate::transfer::read_cached;
#[cfg(target_os = "linux")]
use crate::uring::Uring;

/// A request that outlives submit. Reused, with the memory of its scatter list.
#[derive(Debug)]
pub struct Job {
    /// The request's token.
    pub token: u64,
    /// What to do.
    pub op: BlockOp,
    /// Where in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The scatter list.
    pub segments: Vec<GuestSlice>,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            token: 0,
            op: BlockOp::Flush,
            offset: 0,
            len: 0,
            segments: Vec::with_capacity(8),
        }
    }
}

impl Job {
    /// Becomes a copy of `request`, which has passed its check.
    pub fn set(&mut self, request: &BlockRequest) {
        self.token = request.token();
        self.op = request.op().unwrap_or(BlockOp::Flush);
        self.offset = request.offset();
        self.len = request.len();
        self.segments.clear();
        self.segments.extend_from_slice(request.segments());
    }

    /// Does what is left of it after its first `done` bytes; 0 or `-errno`.
    pub fn perform(&self, image: &Image, done: usize) -> i32 {
        image.perform(self.op, self.offset, self.len, &self.segments, done)
    }

    /// Its completion.
    pub fn done(&self, result: i32) -> BlockDone {
        BlockDone {
            token: self.token,
            result,
            reserved: 0,
        }
    }
}

/// How requests that have to wait are done.
enum Engine {
    /// None has to: the file lives in memory.
    Inline,
    /// By the kernel.
    #[cfg(target_os = "linux")]
    Uring(Box<Uring>),
    /// By threads.
    Pool(Pool<Image>),
}

impl Engine {
    /// Reads what is in the page cache; `None` when somebody has to wait for the disk. Threads read all by themselves.
    fn read_cached(&self, image: &Image, request: &BlockRequest) -> Option<i32> {
        let kernel = !matches!(self, Self::Inline | Self::Pool(_));
        (kernel && read_cached(image.fd(), request.offset(), request.segments())).then_some(0)
    }
}

/// A queue on a disk in a file. Dropping it waits for what is in flight.
pub struct FileQueue {
    image: Arc<Image>,
    /// The image's, with its present size.
    info: BlockInfo,
    /// Where its intact part ends.
    intact: u64,
    engine: Engine,
    depth: usize,
    /// Requests that the engine has.
    waiting: usize,
    /// Completions of requests that were done at once.
    done: VecDeque<BlockDone>,
}

impl FileQueue {
    /// Opens a queue with the best engine there is; its ring, if it has one, registers `pinned`.
    ///
    /// # Errors
    /// Out of threads or descriptors.
    pub fn open(
        image: Arc<Image>,
        depth: u32,
        workers: u32,
        pinned: Option<&Arc<Pinned>>,
    ) -> Result<Self> {
        let depth = depth.max(1) as usize;
        let engine = if image.in_memory() {
            Engine::Inline
        } else {
            waiting_engine(&image, depth, workers, pinned)?
        };
        Ok(Self {
            info: image.info(),
            intact: u64::MAX,
            image,
            engine,
            depth,
            waiting: 0,
            done: VecDeque::with_capacity(depth),
        })
    }

    /// The result of a request that need not wait.
    fn at_once(&self, request: &BlockRequest, alone: bool) -> Option<i32> {
        let code = request.check(&self.info);
        if code != 0 {
            return Some(code);
        }
        if request.offset().saturating_add(request.len()) > self.intact {
            return Some(-libc::EIO);
        }
        let list = request.segments();
        if list.len() > MAX_SEGMENTS as usize {
            return Some(-libc::EINVAL);
        }
        let op = request.op()?;
        let done = match op {
            BlockOp::Flush if self.image.skips_flush() => return Some(0),
            BlockOp::Discard if !self.image.frees(true) => return Some(-libc::ENOTSUP),
            // Nothing left to ask the kernel for.
            _ if op != BlockOp::Flush && request.is_empty() => return Some(0),
            _ if matches!(self.engine, Engine::Inline) || self.image.misaligned(list) => true,
            // A write to the page cache is a copy; io_uring would hand it to a kernel thread on most filesystems.
            BlockOp::Write { fua: false } => self.image.buffered(),
            BlockOp::Read if alone && self.image.buffered() => {
                return self.engine.read_cached(&self.image, request);
            }
            _ => false,
        };
        done.then(|| {
            self.image
                .perform(op, request.offset(), request.len(), list, 0)
        })
    }
}

impl Perform for Image {
    type Scratch = ();

    fn perform(&self, job: &Job, (): &mut ()) -> i32 {
        job.perform(self, 0)
    }
}

fn threads(image: &Arc<Image>, depth: usize, most: u32) -> Result<Engine> {
    let kind = Threads {
        name: "disk",
        stack: 128 << 10,
        most,
    };
    Ok(Engine::Pool(Pool::new(image.clone(), depth, kind)?))
}

#[cfg(target_os = "linux")]
fn waiting_engine(
    image: &Arc<Image>,
    depth: usize,
    workers: u32,
    pinned: Option<&Arc<Pinned>>,
) -> Result<Engine> {
    match Uring::new(image.clone(), depth, workers) {
        Ok(mut uring) => {
            if let Some(Err(error)) = pinned.map(|pinned| uring.pin(pinned.clone())) {
                log::warn!(
                    "`pin_memory` has no effect on a disk queue ({error}): guest memory must not lie in a file, and the limit on locked memory (ulimit -l) has to be as large as it for each queue"
                );
            }
            Ok(Engine::Uring(Box::new(uring)))
        }
        Err(error) => {
            log::info!(
                "io_uring is not available ({error}); a disk queue uses {workers} threads instead"
            );
            threads(image, depth, workers)
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn waiting_engine(
    image: &Arc<Image>,
    depth: usize,
    workers: u32,
    _pinned: Option<&Arc<Pinned>>,
) -> Result<Engine> {
    threads(image, depth, workers)
}

impl BlockQueue for FileQueue {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        let room = self.depth - self.waiting - self.done.len();
        let alone = batch.len() == 1 && self.waiting == 0;
        let mut taken = 0;
        let extent = self.image.extent();
        (self.info.bytes, self.intact) = (extent.bytes(), extent.intact());
        for request in batch.iter().take(room) {
            if let Some(code) = self.at_once(request, alone) {
                self.done.push_back(request.done(code));
            } else {
                let pushed = match &mut self.engine {
                    Engine::Inline => false,
                    #[cfg(target_os = "linux")]
                    Engine::Uring(uring) => uring.push(request),
                    Engine::Pool(pool) => pool.push(request),
                };
                if !pushed {
                    break;
                }
                self.waiting += 1;
            }
            taken += 1;
        }
        match &mut self.engine {
            Engine::Inline => {}
            #[cfg(target_os = "linux")]
            Engine::Uring(uring) => uring.start(),
            Engine::Pool(pool) => pool.start(),
        }
        taken
    }

    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let first = done.len().min(self.done.len());
        for (slot, completion) in done.iter_mut().zip(self.done.drain(..first)) {
            *slot = completion;
        }
        let rest = &mut done[first..];
        let more = match &mut self.engine {
            _ if self.waiting == 0 => 0,
            Engine::Inline => 0,
            #[cfg(target_os = "linux")]
            Engine::Uring(uring) => uring.reap(rest),
            Engine::Pool(pool) => pool.reap(rest),
        };
        self.waiting -= more;
        first + more
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.engine {
            Engine::Inline => None,
            #[cfg(target_os = "linux")]
            Engine::Uring(uring) => Some(uring.fd()),
            Engine::Pool(pool) => Some(pool.fd()),
        }
    }
}

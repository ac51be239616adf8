//! The test's block backend: a disk in memory that the test can hold, break and look into.

#![allow(unsafe_code)] // a second plugin root in one binary has to be made by hand: only one can carry the exported name

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use vmm_plugin_api::abi::block::{BLOCK_DISCARD, BLOCK_VOLATILE_CACHE, BLOCK_WRITE_ZEROES};
use vmm_plugin_api::abi::{Host as AbiHost, Obj, Opt, Root, Sink, Str};
use vmm_plugin_api::private::{CreateCall, create_block, root};
use vmm_plugin_api::{
    BlockBackend, BlockDone, BlockInfo, BlockOp, BlockQueue, BlockRequest, EventFd, GuestSlice,
    Host, Options, Result,
};

unsafe extern "C" fn create(
    host: *const AbiHost,
    _kind: u32,
    _name: Str,
    opts: *const Opt,
    opt_count: usize,
    out: *mut Obj,
    err: *const Sink,
) -> i32 {
    // SAFETY: these are the values of this call.
    let call = unsafe { CreateCall::new(host, opts, opt_count, out, err) };
    create_block::<TestDisk>(&call)
}

pub static ROOT: Root = root(b"", create);

/// What the disk says it is.
#[derive(Clone, Copy)]
pub struct Shape {
    pub info: BlockInfo,
    /// Requests complete on a thread of the backend's instead of in submit.
    pub threaded: bool,
    /// Requests succeed at once, without data and without allocating.
    pub null: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            info: BlockInfo {
                bytes: 4 << 20,
                logical: 512,
                physical: 4096,
                features: BLOCK_DISCARD | BLOCK_WRITE_ZEROES | BLOCK_VOLATILE_CACHE,
                max_segments: 128,
                alignment: 1,
                max_discard: 1 << 20,
            },
            threaded: false,
            null: false,
        }
    }
}

/// What the test does to the disk, and what it sees of it.
pub struct Control {
    shape: Shape,
    data: Mutex<Vec<u8>>,
    /// Every operation that was carried out: the operation, offset, length, scatter elements.
    pub log: Mutex<Vec<(BlockOp, u64, u64, usize)>>,
    /// While set, a threaded disk completes nothing.
    held: Mutex<bool>,
    released: Condvar,
    /// Requests that touch this byte fail with EIO.
    pub bad: AtomicU64,
    /// Submit takes nothing.
    pub dead: AtomicBool,
    /// Most requests that submit takes at once.
    pub room: AtomicUsize,
    pub submits: AtomicUsize,
    pub panic: AtomicBool,
}

static CONTROLS: Mutex<BTreeMap<u64, Arc<Control>>> = Mutex::new(BTreeMap::new());

impl Control {
    pub fn new(shape: Shape) -> (Arc<Self>, u64) {
        let control = Arc::new(Self {
            data: Mutex::new(vec![0; shape.info.bytes as usize]),
            shape,
            log: Mutex::default(),
            held: Mutex::new(false),
            released: Condvar::new(),
            bad: AtomicU64::new(u64::MAX),
            dead: AtomicBool::new(false),
            room: AtomicUsize::new(usize::MAX),
            submits: AtomicUsize::new(0),
            panic: AtomicBool::new(false),
        });
        let mut all = CONTROLS.lock().unwrap();
        let id = all.len() as u64;
        all.insert(id, control.clone());
        (control, id)
    }

    pub fn hold(&self, hold: bool) {
        *self.held.lock().unwrap() = hold;
        self.released.notify_all();
    }

    fn wait_released(&self) {
        let mut held = self.held.lock().unwrap();
        while *held {
            held = self.released.wait(held).unwrap();
        }
    }

    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        self.data.lock().unwrap()[offset..offset + len].to_vec()
    }

    pub fn ops(&self) -> Vec<(BlockOp, u64, u64, usize)> {
        self.log.lock().unwrap().clone()
    }

    fn run(&self, job: &Job) -> i32 {
        if job.error != 0 {
            return job.error;
        }
        let bad = self.bad.load(Ordering::Relaxed);
        if (job.offset..job.offset + job.len).contains(&bad) {
            return -libc::EIO;
        }
        let entry = (job.op, job.offset, job.len, job.segments.len());
        self.log.lock().unwrap().push(entry);
        let mut data = self.data.lock().unwrap();
        let range = job.offset as usize..(job.offset + job.len) as usize;
        let mut rest = &mut data[range];
        match job.op {
            BlockOp::Read | BlockOp::Write { .. } => {
                for segment in &job.segments {
                    assert!(
                        (segment.as_ptr() as usize)
                            .is_multiple_of(self.shape.info.alignment as usize)
                    );
                    let (own, others) = rest.split_at_mut(segment.len());
                    if job.op == BlockOp::Read {
                        segment.write(0, own);
                    } else {
                        segment.read(0, own);
                    }
                    rest = others;
                }
            }
            BlockOp::Flush => {}
            BlockOp::Discard => rest.fill(0xdd),
            BlockOp::WriteZeroes { .. } => rest.fill(0),
        }
        0
    }
}

struct Job {
    token: u64,
    op: BlockOp,
    offset: u64,
    len: u64,
    segments: Vec<GuestSlice>,
    error: i32,
}

struct TestDisk(Arc<Control>);

impl BlockBackend for TestDisk {
    type Queue = TestQueue;

    fn create(options: &Options<'_>, _host: &Host) -> Result<Self> {
        let id = options.u64("control")?;
        Ok(Self(CONTROLS.lock().unwrap()[&id].clone()))
    }

    fn info(&self) -> BlockInfo {
        self.0.shape.info
    }

    fn open_queue(&self, depth: u32) -> Result<TestQueue> {
        let shared = Arc::new(Shared {
            jobs: Mutex::default(),
            added: Condvar::new(),
            done: Mutex::new(VecDeque::with_capacity(depth as usize)),
            event: EventFd::new()?,
        });
        let thread = self.0.shape.threaded.then(|| {
            let (shared, control) = (shared.clone(), self.0.clone());
            std::thread::spawn(move || shared.serve(&control))
        });
        Ok(TestQueue {
            control: self.0.clone(),
            shared,
            thread,
            depth: depth as usize,
            busy: 0,
        })
    }
}

struct Shared {
    jobs: Mutex<(VecDeque<Job>, bool)>,
    added: Condvar,
    done: Mutex<VecDeque<BlockDone>>,
    event: EventFd,
}

impl Shared {
    fn serve(&self, control: &Control) {
        loop {
            let mut jobs = self.jobs.lock().unwrap();
            let job = loop {
                if let Some(job) = jobs.0.pop_front() {
                    break job;
                }
                if jobs.1 {
                    return;
                }
                jobs = self.added.wait(jobs).unwrap();
            };
            drop(jobs);
            control.wait_released();
            let result = control.run(&job);
            self.finish(job.token, result);
            self.event.signal();
        }
    }

    fn finish(&self, token: u64, result: i32) {
        self.done.lock().unwrap().push_back(BlockDone {
            token,
            result,
            reserved: 0,
        });
    }
}

struct TestQueue {
    control: Arc<Control>,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
    depth: usize,
    busy: usize,
}

impl BlockQueue for TestQueue {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        assert!(!self.control.panic.load(Ordering::Relaxed), "told to panic");
        self.control.submits.fetch_add(1, Ordering::Relaxed);
        if self.control.dead.load(Ordering::Relaxed) {
            return 0;
        }
        let room = self.control.room.load(Ordering::Relaxed);
        let room = room.min(self.depth - self.busy);
        for request in batch.iter().take(room) {
            if self.control.shape.null {
                self.busy += 1;
                self.shared.finish(request.token(), 0);
                continue;
            }
            let job = Job {
                token: request.token(),
                op: request.op().unwrap(),
                offset: request.offset(),
                len: request.len(),
                segments: request.segments().to_vec(),
                error: request.check(&self.control.shape.info),
            };
            self.busy += 1;
            if self.thread.is_some() {
                self.shared.jobs.lock().unwrap().0.push_back(job);
                self.shared.added.notify_one();
            } else {
                self.shared.finish(job.token, self.control.run(&job));
            }
        }
        batch.len().min(room)
    }

    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let mut ready = self.shared.done.lock().unwrap();
        let n = ready.len().min(done.len());
        for (to, from) in done.iter_mut().zip(ready.drain(..n)) {
            *to = from;
        }
        self.busy -= n;
        n
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.thread.as_ref().map(|_| self.shared.event.as_fd())
    }
}

impl Drop for TestQueue {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.shared.jobs.lock().unwrap().1 = true;
            self.shared.added.notify_one();
            thread.join().unwrap();
        }
    }
}

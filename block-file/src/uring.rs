//! io_uring (io_uring(7)): a batch of requests with one system call, no thread, no allocation.

#![allow(unsafe_code)] // gives the kernel pointers to scatter lists and guest memory

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use vmm_plugin_api::{BlockDone, BlockOp, BlockRequest, EventFd};

use crate::image::Image;
use crate::linux::{punch_mode, zero_mode};
use crate::pinned::Pinned;
use crate::queue::Job;

/// One queue's ring.
pub struct Uring {
    ring: IoUring,
    image: Arc<Image>,
    ready: EventFd,
    jobs: Vec<Job>,
    idle: Vec<usize>,
    /// Jobs pushed since the last system call, oldest first.
    pushed: VecDeque<usize>,
    /// Completions that did not come through the ring.
    done: VecDeque<(usize, i32)>,
    /// The ring has refused a system call for good; requests are done by the queue's own thread from then on.
    broken: bool,
    /// The ring has registered these.
    pinned: Option<Arc<Pinned>>,
}

impl Uring {
    /// Sets up a ring for `depth` requests; the kernel may use `workers` threads for what can't be done without.
    ///
    /// # Errors
    /// There is no io_uring here (`ENOSYS`, or `EPERM` by policy), it is older than Linux 5.12, or memory is short.
    pub fn new(image: Arc<Image>, depth: usize, workers: u32) -> io::Result<Self> {
        let entries = u32::try_from(depth).map_err(|_| io::ErrorKind::InvalidInput)?;
        // The queue's thread reaps when it likes: completions need not interrupt it (Linux 5.19).
        let ring = IoUring::builder().setup_coop_taskrun().build(entries);
        let ring = ring.or_else(|_| IoUring::new(entries))?;
        if !ring.params().is_feature_native_workers() {
            return Err(io::Error::other("it is older than Linux 5.12"));
        }
        let ready = EventFd::new()?;
        let submitter = ring.submitter();
        submitter.register_eventfd(ready.as_fd().as_raw_fd())?;
        // Linux 5.15; without it the kernel chooses.
        if let Err(error) = submitter.register_iowq_max_workers(&mut [workers, workers]) {
            log::debug!("io_uring keeps its own number of workers: {error}");
        }
        Ok(Self {
            ring,
            image,
            ready,
            jobs: std::iter::repeat_with(Job::default).take(depth).collect(),
            idle: (0..depth).collect(),
            pushed: VecDeque::with_capacity(depth),
            done: VecDeque::with_capacity(depth),
            broken: false,
            pinned: None,
        })
    }

    /// Registers guest memory with the ring, for requests of one piece each: the others need a list, which the kernel takes from
    /// unregistered memory only.
    ///
    /// # Errors
    /// `ENOMEM`: more than this user may lock (RLIMIT_MEMLOCK). `EOPNOTSUPP`: memory in a file. Requests go without.
    pub fn pin(&mut self, pinned: Arc<Pinned>) -> io::Result<()> {
        let pieces = pinned.pieces();
        // SAFETY: `transfer` asserts the layout; guest memory stays mapped for the life of the process.
        unsafe {
            let buffers = std::slice::from_raw_parts(pieces.as_ptr().cast(), pieces.len());
            self.ring.submitter().register_buffers(buffers)?;
        }
        self.pinned = Some(pinned);
        Ok(())
    }

    /// Takes a request into the batch; false when there is no room.
    pub fn push(&mut self, request: &BlockRequest) -> bool {
        let Some(&slot) = self.idle.last() else {
            return false;
        };
        self.jobs[slot].set(request);
        if !self.broken {
            let entry = entry(&self.image, self.pinned.as_deref(), &self.jobs[slot]);
            let entry = entry.user_data(slot as u64);
            // SAFETY: the scatter list belongs to the job, which stays untouched until its completion is reaped, and
            // `drop` waits for that; guest memory stays mapped for the life of the process.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                return false;
            }
            self.pushed.push_back(slot);
        } else {
            self.done
                .push_back((slot, self.jobs[slot].perform(&self.image, 0)));
        }
        self.idle.pop();
        true
    }

    /// Hands the batch to the kernel. Completions that come during the call do not signal: the caller reaps next.
    pub fn start(&mut self) {
        if self.pushed.is_empty() {
            return;
        }
        self.ring.completion().disable_eventfd();
        while !self.pushed.is_empty() {
            match self.ring.submit() {
                Ok(count) => drop(self.pushed.drain(..count.min(self.pushed.len()))),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // The kernel is short of memory for requests; it frees some as others complete.
                    Some(libc::EAGAIN | libc::EBUSY) => {
                        std::thread::sleep(Duration::from_millis(1))
                    }
                    _ => self.give_up(&error),
                },
            }
        }
        self.ring.completion().enable_eventfd();
        // Orders the flag before the caller's look at the ring. The kernel posts, then looks at the flag: one of the two sees
        // the other's store, so no completion is left without a signal.
        fence(Ordering::SeqCst);
    }

    /// What the kernel has not taken is done here and now.
    fn give_up(&mut self, error: &io::Error) {
        log::error!("io_uring fails ({error}); the disk goes on without it, slower");
        self.broken = true;
        for slot in self.pushed.drain(..) {
            self.done
                .push_back((slot, self.jobs[slot].perform(&self.image, 0)));
        }
    }

    /// Stores completions; returns how many.
    pub fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let mut count = 0;
        while count < done.len() {
            let (slot, code) = if let Some(finished) = self.done.pop_front() {
                finished
            } else if let Some(entry) = self.ring.completion().next() {
                let slot = entry.user_data() as usize;
                (slot, finish(&self.image, &self.jobs[slot], entry.result()))
            } else {
                break;
            };
            done[count] = self.jobs[slot].done(code);
            self.idle.push(slot);
            count += 1;
        }
        count
    }

    /// Readable when something has completed.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

/// Waits for what is in flight: the kernel has pointers to the jobs' scatter lists.
impl Drop for Uring {
    fn drop(&mut self) {
        let mut done = [BlockDone::default(); 32];
        while self.idle.len() < self.jobs.len() {
            if self.reap(&mut done) > 0 {
                continue;
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // Without a way to wait, keep what the kernel may still use.
                Err(_) => return std::mem::forget(std::mem::take(&mut self.jobs)),
            }
        }
    }
}

/// What the kernel is asked for a job. The file is not registered with the ring: a ring gives registered files up some time
/// after the process is gone, and a VM that is started again would find its image locked.
fn entry(image: &Image, pinned: Option<&Pinned>, job: &Job) -> squeue::Entry {
    let file = types::Fd(image.fd().as_raw_fd());
    let (list, count) = (
        job.segments.as_ptr().cast::<libc::iovec>(),
        job.segments.len() as u32,
    );
    let flags = match job.op {
        BlockOp::Write { fua: true } if !image.skips_flush() => libc::RWF_DSYNC,
        _ => 0,
    };
    match (job.op, job.segments.as_slice()) {
        // One piece needs no list.
        (BlockOp::Read, [only]) if let Ok(len) = u32::try_from(only.len()) => {
            match pinned.and_then(|pinned| pinned.find(only)) {
                Some(buffer) => opcode::ReadFixed::new(file, only.as_ptr(), len, buffer)
                    .offset(job.offset)
                    .build(),
                None => opcode::Read::new(file, only.as_ptr(), len)
                    .offset(job.offset)
                    .build(),
            }
        }
        (BlockOp::Write { .. }, [only]) if let Ok(len) = u32::try_from(only.len()) => {
            match pinned.and_then(|pinned| pinned.find(only)) {
                Some(buffer) => opcode::WriteFixed::new(file, only.as_ptr(), len, buffer)
                    .offset(job.offset)
                    .rw_flags(flags)
                    .build(),
                None => opcode::Write::new(file, only.as_ptr(), len)
                    .offset(job.offset)
                    .rw_flags(flags)
                    .build(),
            }
        }
        (BlockOp::Read, _) => opcode::Readv::new(file, list, count)
            .offset(job.offset)
            .build(),
        (BlockOp::Write { .. }, _) => opcode::Writev::new(file, list, count)
            .offset(job.offset)
            .rw_flags(flags)
            .build(),
        (BlockOp::Flush, _) => opcode::Fsync::new(file)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        (BlockOp::Discard, _) => allocate(file, job, punch_mode().bits()),
        (BlockOp::WriteZeroes { unmap }, _) if image.frees(unmap) => {
            allocate(file, job, punch_mode().bits())
        }
        (BlockOp::WriteZeroes { .. }, _) => allocate(file, job, zero_mode().bits()),
    }
}

fn allocate(file: types::Fd, job: &Job, mode: u32) -> squeue::Entry {
    opcode::Fallocate::new(file, job.len)
        .offset(job.offset)
        .mode(mode.cast_signed())
        .build()
}

/// What the kernel's `result` means for a job; what it has left undone is done here.
fn finish(image: &Image, job: &Job, result: i32) -> i32 {
    let transfers = matches!(job.op, BlockOp::Read | BlockOp::Write { .. });
    match usize::try_from(result) {
        Ok(moved) if transfers && (moved as u64) < job.len => job.perform(image, moved),
        Ok(_) if matches!(job.op, BlockOp::Flush | BlockOp::Write { fua: true }) => {
            image.flushed(0)
        }
        Ok(_) => 0,
        // Cancelled: the thread that submitted it has ended.
        Err(_)
            if matches!(
                -result,
                libc::EINTR | libc::EAGAIN | libc::ECANCELED | libc::EOPNOTSUPP
            ) =>
        {
            job.perform(image, 0)
        }
        Err(_) if matches!(job.op, BlockOp::WriteZeroes { .. }) && result == -libc::EINVAL => {
            job.perform(image, 0)
        }
        Err(_) if job.op == BlockOp::Flush => image.flushed(result),
        // The write has reached the cache, but not the disk.
        Err(_) if result == -libc::EIO && job.op == (BlockOp::Write { fua: true }) => {
            image.flushed(result)
        }
        Err(_) => result,
    }
}

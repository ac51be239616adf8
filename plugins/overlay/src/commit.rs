//! The thread that makes the map durable: data first, then the map that tells of it.
//!
//! A flush that finds changes in the map comes here, from whatever queue; those that arrive while one is under way share the
//! next. The order is what an overlay stands on: a bit reaches the file only after the data that it tells of is on stable
//! storage, so that after a power cut a block reads as it was before or after, never as what happened to lie in the file.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context;
use vmm_plugin_api::{EventFd, Host, Lower, Result};

use crate::blocking::Blocking;
use crate::layout::Layout;
use crate::map::{Map, PAGE_BYTES};

/// Where a queue finds what was committed for it.
pub struct Mailbox {
    done: Mutex<VecDeque<(usize, i32)>>,
    event: EventFd,
}

impl Mailbox {
    /// For a queue of `depth` requests.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(depth: usize) -> Result<Self> {
        Ok(Self {
            done: Mutex::new(VecDeque::with_capacity(depth)),
            event: EventFd::new().context("no descriptor left for a disk queue")?,
        })
    }

    /// The next slot that was committed, and its result.
    pub fn take(&self) -> Option<(usize, i32)> {
        lock(&self.done).pop_front()
    }

    /// Takes the readiness from the descriptor.
    pub fn drain(&self) {
        self.event.drain();
    }

    /// Readable when something has been committed.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[derive(Default)]
struct Waiting {
    requests: Vec<(Arc<Mailbox>, usize)>,
    closing: bool,
}

struct Shared {
    waiting: Mutex<Waiting>,
    wake: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread.
pub struct Committer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Committer {
    /// Starts it, with a queue of its own on the store.
    ///
    /// # Errors
    /// Out of threads.
    pub fn new<Q: Lower + 'static>(
        host: &Host,
        map: Arc<Map>,
        layout: Layout,
        queue: Blocking<Q>,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            waiting: Mutex::default(),
            wake: Condvar::new(),
        });
        let mut writer = Writer {
            map,
            layout,
            queue,
            pages: Vec::new(),
            copies: Vec::new(),
        };
        let of_thread = shared.clone();
        let thread = host
            .spawn("overlay", move || writer.serve(&of_thread))
            .context("no thread left for the overlay")?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Makes all that the map tells now durable, then puts `slot` into the mailbox.
    pub fn request(&self, mailbox: &Arc<Mailbox>, slot: usize) {
        let mut waiting = lock(&self.shared.waiting);
        waiting.requests.push((mailbox.clone(), slot));
        drop(waiting);
        self.shared.wake.notify_one();
    }
}

/// What was written without a flush is made durable as well: the VM ends in order.
impl Drop for Committer {
    fn drop(&mut self) {
        lock(&self.shared.waiting).closing = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic in it has been reported.
            let _ = thread.join();
        }
    }
}

struct Writer<Q> {
    map: Arc<Map>,
    layout: Layout,
    queue: Blocking<Q>,
    pages: Vec<usize>,
    /// The pages as they were before the data was flushed.
    copies: Vec<u8>,
}

impl<Q: Lower> Writer<Q> {
    fn serve(&mut self, shared: &Shared) {
        let mut requests = Vec::new();
        loop {
            let mut waiting = lock(&shared.waiting);
            while waiting.requests.is_empty() && !waiting.closing {
                waiting = shared
                    .wake
                    .wait(waiting)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            std::mem::swap(&mut requests, &mut waiting.requests);
            drop(waiting);
            let last = requests.is_empty();
            let result = if last && self.map.is_settled() {
                Ok(())
            } else {
                self.commit()
            };
            if last {
                if let Err(error) = result {
                    log::error!(
                        "the overlay's map can't be written, what was not flushed is lost: {error}"
                    );
                }
                return;
            }
            let code = match result {
                Ok(()) => 0,
                Err(error) => -error.raw_os_error().unwrap_or(libc_eio()),
            };
            for (mailbox, slot) in requests.drain(..) {
                lock(&mailbox.done).push_back((slot, code));
                mailbox.event.signal();
            }
        }
    }

    fn commit(&mut self) -> io::Result<()> {
        self.pages.clear();
        self.copies.clear();
        self.map.take_dirty(&mut self.pages);
        for page in &self.pages {
            self.map.copy(*page, &mut self.copies);
        }
        let result = self.write();
        match result {
            Ok(()) => self.map.settled(self.pages.len()),
            Err(_) => self.pages.iter().for_each(|page| self.map.put_back(*page)),
        }
        result
    }

    fn write(&mut self) -> io::Result<()> {
        self.queue.flush()?;
        if self.pages.is_empty() {
            return Ok(());
        }
        for (page, copy) in self.pages.iter().zip(self.copies.chunks_exact(PAGE_BYTES)) {
            let at = self.layout.map + (*page * PAGE_BYTES) as u64;
            self.queue.write(at, copy)?;
        }
        self.queue.flush()
    }
}

/// What a store that gives no number has failed with.
fn libc_eio() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}

//! A test's use of a block backend: submits, sleeps and reaps as a device does.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{Batch, BlockDone, BlockOp, BlockQueueHandle, GuestSlice, Result};

/// How long a completion may take.
const LIMIT: Duration = Duration::from_secs(20);

/// Submits the whole batch and waits for it; token and result of each.
///
/// # Errors
/// A token comes twice or was not submitted, or no completion and no signal comes for 20 s.
pub fn run_batch(queue: &mut BlockQueueHandle, batch: &mut Batch) -> Result<BTreeMap<u64, i32>> {
    let (mut results, mut done) = (BTreeMap::new(), [BlockDone::default(); 7]);
    let mut expected = 0;
    loop {
        expected += queue.submit(batch);
        loop {
            let count = queue.reap(&mut done);
            for one in &done[..count] {
                let fresh = results.insert(one.token, one.result).is_none();
                ensure!(fresh, "token {} came twice", one.token);
            }
            if count < done.len() {
                break;
            }
        }
        ensure!(results.len() <= expected, "a completion of nothing");
        if batch.is_empty() && results.len() == expected {
            return Ok(results);
        }
        if results.len() < expected {
            sleep(queue)?;
        }
    }
}

/// Does one read or write of the scatter list; 0 or `-errno`.
///
/// # Errors
/// As [`run_batch`].
pub fn run_transfer(
    queue: &mut BlockQueueHandle,
    op: BlockOp,
    offset: u64,
    list: &[GuestSlice],
) -> Result<i32> {
    let mut batch = Batch::default();
    batch.transfer(0, op, offset, list);
    one(queue, &mut batch)
}

/// Does one flush, discard or write-zeroes; 0 or `-errno`.
///
/// # Errors
/// As [`run_batch`].
pub fn run_control(
    queue: &mut BlockQueueHandle,
    op: BlockOp,
    offset: u64,
    len: u64,
) -> Result<i32> {
    let mut batch = Batch::default();
    batch.control(0, op, offset, len);
    one(queue, &mut batch)
}

fn one(queue: &mut BlockQueueHandle, batch: &mut Batch) -> Result<i32> {
    let results = run_batch(queue, batch)?;
    results.get(&0).copied().context("no completion")
}

/// Sleeps until the queue's descriptor is readable.
fn sleep(queue: &BlockQueueHandle) -> Result<()> {
    let fd = queue
        .fd()
        .context("a queue without a descriptor has not completed inside submit")?;
    let limit = Timespec::try_from(LIMIT)?;
    let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit))?;
    ensure!(ready == 1, "no completion and no signal in {LIMIT:?}");
    queue.drain();
    Ok(())
}

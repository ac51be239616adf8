//! What an overlay remembers of its base: a checksum of blocks spread over it. It finds a base that was booted writable,
//! replaced or cut, without reading all of it; a change elsewhere goes unseen.

use vmm_plugin_api::{BlockInfo, GuestSlice, Lower, Result};

use crate::blocking::Blocking;
use crate::layout::{HASH_START, hash};

/// What is read at each place.
const SAMPLE: u64 = 4096;
/// Places in even distances, from the first block to the last.
const PLACES: u64 = 64;
/// The first places, one after the other: partition tables, boot sectors, superblocks, which hold times of the last use.
const FIRST: u64 = 16;

/// Reads the samples through a queue of the base.
///
/// # Errors
/// The base can't be read.
pub fn of<Q: Lower>(queue: Q, info: &BlockInfo, buffer: GuestSlice) -> Result<u64> {
    let len = SAMPLE.max(info.logical.into()).min(info.bytes);
    let mut queue = Blocking::new(queue, buffer);
    let mut sample = vec![0; usize::try_from(len)?];
    let last = (info.bytes - len) / len;
    let first = 0..FIRST.min(last);
    let spread =
        (0..PLACES).map(|i| (u128::from(last) * u128::from(i) / u128::from(PLACES - 1)) as u64);
    let mut sum = hash(HASH_START, &info.bytes.to_le_bytes());
    let mut previous = None;
    for place in first.chain(spread) {
        if previous.replace(place) == Some(place) {
            continue;
        }
        queue.read(place * len, &mut sample)?;
        sum = hash(sum, &sample);
    }
    Ok(sum)
}

//! Which blocks the overlay has itself: one bit for each, in pages that are made when the first of their blocks is written.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Bytes of a page of the map, in memory and in the file.
pub const PAGE_BYTES: usize = 4096;
const WORDS: usize = PAGE_BYTES / 8;
/// Blocks that one page tells about.
pub const PAGE_BLOCKS: u64 = PAGE_BYTES as u64 * 8;

type Page = [AtomicU64; WORDS];

/// The map. Bits are only ever set: a block that is discarded or zeroed is one that the overlay has, as a hole in its file.
pub struct Map {
    pages: Vec<OnceLock<Box<Page>>>,
    /// A bit for each page that has changed since it was last taken by [`Map::take_dirty`].
    dirty: Vec<AtomicU64>,
    /// Pages that have changed and are not known to be in the file yet.
    unsettled: AtomicUsize,
}

impl Map {
    /// For `blocks` blocks, none of which the overlay has.
    pub fn new(blocks: u64) -> Self {
        let pages = usize::try_from(blocks.div_ceil(PAGE_BLOCKS)).unwrap_or(usize::MAX);
        Self {
            pages: std::iter::repeat_with(OnceLock::new).take(pages).collect(),
            dirty: std::iter::repeat_with(AtomicU64::default)
                .take(pages.div_ceil(64))
                .collect(),
            unsettled: AtomicUsize::new(0),
        }
    }

    /// Pages.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Fills a page with what the file says of it.
    pub fn load(&self, page: usize, bytes: &[u8]) {
        if bytes.iter().all(|byte| *byte == 0) {
            return;
        }
        if let Some(words) = self.made(page) {
            for (word, bytes) in words.iter().zip(bytes.as_chunks::<8>().0) {
                word.store(u64::from_le_bytes(*bytes), Ordering::Release);
            }
        }
    }

    /// Appends a page as it goes into the file.
    pub fn copy(&self, page: usize, to: &mut Vec<u8>) {
        match self.pages.get(page).and_then(OnceLock::get) {
            Some(words) => {
                for word in words.iter() {
                    to.extend_from_slice(&word.load(Ordering::Acquire).to_le_bytes());
                }
            }
            None => to.resize(to.len() + PAGE_BYTES, 0),
        }
    }

    fn made(&self, page: usize) -> Option<&Page> {
        let fresh = || Box::new([const { AtomicU64::new(0) }; WORDS]);
        self.pages.get(page).map(|page| &**page.get_or_init(fresh))
    }

    /// Whether the overlay has `block`, and for how many blocks from there on, at most `count`, that is so.
    #[inline]
    pub fn run(&self, block: u64, count: u64) -> (bool, u64) {
        let (present, mut len) = self.run_in_word(block);
        while len < count {
            let (same, more) = self.run_in_word(block + len);
            if same != present {
                break;
            }
            len += more;
        }
        (present, len.min(count))
    }

    /// As [`Map::run`], as far as one look tells.
    #[inline]
    fn run_in_word(&self, block: u64) -> (bool, u64) {
        let (page, at) = ((block / PAGE_BLOCKS) as usize, block % PAGE_BLOCKS);
        let Some(words) = self.pages.get(page).and_then(OnceLock::get) else {
            return (false, PAGE_BLOCKS - at);
        };
        let bit = at % 64;
        let word = words[(at / 64) as usize].load(Ordering::Acquire) >> bit;
        let present = word & 1 == 1;
        let run = if present {
            word.trailing_ones()
        } else {
            word.trailing_zeros()
        };
        (present, u64::from(run).min(64 - bit))
    }

    /// The overlay has these blocks from now on. Whether one of them is new.
    pub fn mark(&self, mut block: u64, mut count: u64) -> bool {
        let mut changed = false;
        while count > 0 {
            let (page, at) = ((block / PAGE_BLOCKS) as usize, block % PAGE_BLOCKS);
            let now = count.min(PAGE_BLOCKS - at);
            let Some(words) = self.made(page) else {
                return changed;
            };
            // Most writes are to blocks that are there: a look shares the cache line, a change takes it from the other queues.
            if !pieces(at, now)
                .all(|(word, mask)| words[word].load(Ordering::Acquire) & mask == mask)
            {
                // Counted before a bit is seen: whoever sees all bits set and the count at zero may trust the file.
                self.unsettled.fetch_add(1, Ordering::AcqRel);
                for (word, mask) in pieces(at, now) {
                    words[word].fetch_or(mask, Ordering::AcqRel);
                }
                self.put_back(page);
                changed = true;
            }
            block += now;
            count -= now;
        }
        changed
    }

    /// A page that was taken has not reached the file.
    pub fn put_back(&self, page: usize) {
        let bit = 1 << (page % 64);
        if self.dirty[page / 64].fetch_or(bit, Ordering::AcqRel) & bit != 0 {
            self.settled(1);
        }
    }

    /// Moves the pages that have changed into `pages`.
    pub fn take_dirty(&self, pages: &mut Vec<usize>) {
        for (i, word) in self.dirty.iter().enumerate() {
            let mut bits = word.swap(0, Ordering::AcqRel);
            while bits != 0 {
                pages.push(i * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }

    /// `pages` pages that were taken are safe in the file.
    pub fn settled(&self, pages: usize) {
        self.unsettled.fetch_sub(pages, Ordering::AcqRel);
    }

    /// Whether all that was marked is safe in the file.
    #[inline]
    pub fn is_settled(&self) -> bool {
        self.unsettled.load(Ordering::Acquire) == 0
    }
}

/// The words of a page that hold `count` bits from `at` on, each with those bits of it.
fn pieces(mut at: u64, count: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = at + count;
    std::iter::from_fn(move || {
        let (word, bit) = ((at / 64) as usize, at % 64);
        let now = (64 - bit).min(end - at);
        at += now;
        (now > 0).then(|| (word, (u64::MAX >> (64 - now)) << bit))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_what_bit_by_bit_says() {
        let blocks = 3 * PAGE_BLOCKS + 70;
        let map = Map::new(blocks);
        let mut plain = vec![false; blocks as usize];
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let mut below = |n: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % n
        };
        for _ in 0..300 {
            let at = below(blocks);
            let count = (1 + below(700)).min(blocks - at);
            let range = at as usize..(at + count) as usize;
            let fresh = plain[range.clone()].iter().any(|there| !there);
            assert_eq!(map.mark(at, count), fresh);
            plain[range].fill(true);
            let at = below(blocks);
            let most = (1 + below(5000)).min(blocks - at);
            let there = plain[at as usize];
            let same = plain[at as usize..(at + most) as usize]
                .iter()
                .take_while(|other| **other == there)
                .count();
            assert_eq!(map.run(at, most), (there, same as u64));
        }
        // A copy through the file's form is the same map.
        let (copy, mut bytes) = (Map::new(blocks), Vec::new());
        for page in 0..map.pages() {
            bytes.clear();
            map.copy(page, &mut bytes);
            copy.load(page, &bytes);
        }
        for block in 0..blocks {
            assert_eq!(copy.run(block, 1).0, plain[block as usize]);
        }
    }

    #[test]
    fn a_page_is_settled_when_its_last_change_is() {
        let map = Map::new(2 * PAGE_BLOCKS);
        let mut pages = Vec::new();
        assert!(map.is_settled());
        map.mark(5, 2);
        map.mark(PAGE_BLOCKS, 1);
        map.take_dirty(&mut pages);
        assert_eq!(pages, [0, 1]);
        // It changes again while it is written.
        map.mark(9, 1);
        map.settled(2);
        assert!(!map.is_settled());
        pages.clear();
        map.take_dirty(&mut pages);
        assert_eq!(pages, [0]);
        // Writing fails, after it has changed once more.
        map.mark(11, 1);
        map.put_back(0);
        pages.clear();
        map.take_dirty(&mut pages);
        assert_eq!(pages, [0]);
        map.settled(1);
        assert!(map.is_settled());
        assert!(!map.mark(5, 2), "they were there");
        assert!(map.is_settled());
    }
}

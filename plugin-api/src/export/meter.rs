//! What a block backend's queues do, counted where requests enter its code and completions leave it: the same for every backend,
//! whoever uses it, without its help.
//!
//! The counters are the host's, of the backend's own object. A batch costs two atomic additions for each run of requests of one kind.
//! Latency is that of samples, since to read a clock costs as much as ten requests do: one request at a time, the first of a batch,
//! is followed until it is reaped, and the larger the batches, the fewer of them: after one of n requests, n - 1 are let pass.

use std::time::Instant;

use vmm_abi::block::{BlockDone, BlockReq};

use crate::{Counter, Host, probes};

/// Requests and bytes, by `OP_*`. Bytes of a flush are none.
const NAMES: [(&str, &str); 5] = [
    ("reads", "read_bytes"),
    ("writes", "write_bytes"),
    ("flushes", "flush_bytes"),
    ("discards", "discard_bytes"),
    ("write_zeroes", "write_zeroes_bytes"),
];

/// Latencies are told apart by powers of two: the first is below 2^8 ns, the last has all from 2^32 ns (4 s) on.
const FIRST: u32 = 8;
const BUCKETS: usize = 26;

/// The counters of a queue's backend, and the request that the queue follows.
pub(super) struct Meter {
    /// What the backend is called.
    disk: &'static str,
    kinds: [(Counter, Counter); NAMES.len()],
    errors: Counter,
    latency: [Counter; BUCKETS],
    followed: Option<(u64, Instant)>,
    /// Batches to let pass before the next request is followed.
    pass: usize,
}

impl Meter {
    pub(super) fn new(host: &Host) -> Self {
        Self {
            disk: host.name(),
            kinds: NAMES.map(|(count, bytes)| (host.counter(count), host.counter(bytes))),
            errors: host.counter("errors"),
            latency: std::array::from_fn(|index| {
                host.counter(&format!("latency/{:02}", FIRST as usize + index))
            }),
            followed: None,
            pass: 0,
        }
    }

    /// A batch comes. Returns when, if one of its requests is to be followed.
    pub(super) fn begin(&mut self, requests: &[BlockReq]) -> Option<Instant> {
        for request in requests {
            probes::request_start(self.disk, request);
        }
        if self.followed.is_some() {
            return None;
        }
        if self.pass > 0 {
            self.pass -= 1;
            return None;
        }
        Some(Instant::now())
    }

    /// The backend has taken these requests of it.
    pub(super) fn taken(&mut self, taken: &[BlockReq], begun: Option<Instant>) {
        // By runs of one kind, which stay in registers: to add to memory for each request would take as long as the rest.
        let (mut kind, mut count, mut bytes) = (0, 0, 0);
        for request in taken {
            if request.op != kind {
                self.add(kind, count, bytes);
                (kind, count, bytes) = (request.op, 0, 0);
            }
            count += 1;
            bytes += request.len;
        }
        self.add(kind, count, bytes);
        if let (Some(begun), Some(first)) = (begun, taken.first()) {
            self.followed = Some((first.token, begun));
            self.pass = taken.len() - 1;
        }
    }

    fn add(&self, kind: u32, count: u64, bytes: u64) {
        if let Some((requests, all)) = self.kinds.get(kind as usize)
            && count != 0
        {
            requests.add(count);
            if bytes != 0 {
                all.add(bytes);
            }
        }
    }

    /// These completions go out.
    pub(super) fn reaped(&mut self, done: &[BlockDone]) {
        for done in done {
            probes::request_done(self.disk, done);
        }
        let errors: u64 = done.iter().map(|done| u64::from(done.result < 0)).sum();
        if errors != 0 {
            self.errors.add(errors);
        }
        if let Some((token, begun)) = self.followed
            && done.iter().any(|done| done.token == token)
        {
            self.followed = None;
            let nanoseconds = begun.elapsed().as_nanos();
            let bits = u128::BITS - nanoseconds.leading_zeros();
            let index = bits.saturating_sub(FIRST) as usize;
            self.latency[index.min(BUCKETS - 1)].add(1);
        }
    }
}

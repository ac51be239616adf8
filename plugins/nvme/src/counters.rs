//! What is counted: for the host's counters and for the guest's SMART log (section 5.14.1.2).

use vmm_plugin_api::{BlockOp, Counter, Host};

/// The device's counters, shared by its queues.
#[derive(Clone, Copy)]
pub(crate) struct Counters {
    pub(crate) reads: Counter,
    pub(crate) writes: Counter,
    flushes: Counter,
    discards: Counter,
    compares: Counter,
    pub(crate) read_bytes: Counter,
    pub(crate) write_bytes: Counter,
    errors: Counter,
}

impl Counters {
    pub(crate) fn new(host: &Host) -> Self {
        Self {
            reads: host.counter("reads"),
            writes: host.counter("writes"),
            flushes: host.counter("flushes"),
            discards: host.counter("discards"),
            compares: host.counter("compares"),
            read_bytes: host.counter("read_bytes"),
            write_bytes: host.counter("write_bytes"),
            errors: host.counter("errors"),
        }
    }
}

/// What has been counted since it was last added to the shared counters: queues share no cache line per command.
#[derive(Default)]
pub(crate) struct Tally {
    reads: u64,
    writes: u64,
    flushes: u64,
    discards: u64,
    compares: u64,
    read_bytes: u64,
    write_bytes: u64,
    errors: u64,
}

impl Tally {
    pub(crate) fn done(&mut self, op: BlockOp, len: u64) {
        match op {
            BlockOp::Read => {
                self.reads += 1;
                self.read_bytes += len;
            }
            BlockOp::Write { .. } => {
                self.writes += 1;
                self.write_bytes += len;
            }
            BlockOp::Flush => self.flushes += 1,
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => self.discards += 1,
        }
    }

    /// Of a comparison, which moves no data.
    pub(crate) fn compared(&mut self) {
        self.compares += 1;
    }

    pub(crate) fn failed(&mut self) {
        self.errors += 1;
    }

    pub(crate) fn add_to(&mut self, counters: &Counters) {
        let pairs = [
            (&mut self.reads, counters.reads),
            (&mut self.writes, counters.writes),
            (&mut self.flushes, counters.flushes),
            (&mut self.discards, counters.discards),
            (&mut self.compares, counters.compares),
            (&mut self.read_bytes, counters.read_bytes),
            (&mut self.write_bytes, counters.write_bytes),
            (&mut self.errors, counters.errors),
        ];
        for (tally, counter) in pairs {
            if *tally != 0 {
                counter.add(std::mem::take(tally));
            }
        }
    }
}

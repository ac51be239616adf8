//! The queue compared with an independent implementation, rust-vmm's virtio-queue, on the same random rings.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use virtio_queue::{Queue as Oracle, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_plugin_api::testing::FakeHost;
use vmm_plugin_api::{Chain, GuestSlice, Queue, QueueConfig};

const RAM: usize = 1 << 18;
const SIZE: u16 = 16;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const TABLES: u64 = 0x4000;
const DATA: u64 = 0x8000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn put(ram: &mut [u8], at: u64, bytes: &[u8]) {
    ram[at as usize..][..bytes.len()].copy_from_slice(bytes);
}

fn descriptor(ram: &mut [u8], table: u64, index: u64, fields: (u64, u32, u16, u16)) {
    let (address, len, flags, next) = fields;
    let high = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
    let bytes = (u128::from(address) | u128::from(high) << 64).to_le_bytes();
    put(ram, table + 16 * index, &bytes);
}

/// A random piece of the data area, and now and then something no driver should write.
fn buffer(random: &mut Random) -> (u64, u32) {
    match random.below(60) {
        0 => (RAM as u64 - 8, 16),
        1 => (DATA, 0),
        _ => (DATA + random.below(0x10000), 1 + random.below(4096) as u32),
    }
}

/// A chain of `n` entries of `table`, entry after entry in an order of its own; returns its first.
fn chain(random: &mut Random, ram: &mut [u8], table: u64, indexes: &[u64]) -> u16 {
    let writable_from = random.below(indexes.len() as u64 + 1) as usize;
    for (i, &index) in indexes.iter().enumerate() {
        let (address, len) = buffer(random);
        let mut flags = if i >= writable_from { WRITE } else { 0 };
        let next = indexes.get(i + 1).copied();
        flags |= if next.is_some() { NEXT } else { 0 };
        if random.below(200) == 0 {
            flags |= NEXT;
        }
        let next = next.unwrap_or(random.below(20)) as u16;
        descriptor(ram, table, index, (address, len, flags, next));
    }
    indexes[0] as u16
}

/// Fills the descriptor table with chains, direct, indirect and both; returns their heads.
fn chains(random: &mut Random, ram: &mut [u8]) -> Vec<u16> {
    let mut heads = Vec::new();
    let mut free: Vec<u64> = (0..SIZE.into()).collect();
    for i in (1..free.len()).rev() {
        free.swap(i, random.below(i as u64 + 1) as usize);
    }
    while !free.is_empty() {
        let n = 1 + random.below(4.min(free.len() as u64)) as usize;
        let own: Vec<u64> = free.drain(..n).collect();
        let head = chain(random, ram, DESC, &own);
        if random.below(3) == 0 {
            // The last descriptor points at a table instead.
            let last = own[n - 1];
            let table = TABLES + 0x100 * last;
            let entries = 1 + random.below(6);
            let all: Vec<u64> = (0..entries).collect();
            chain(random, ram, table, &all);
            let bytes = 16 * entries as u32;
            descriptor(ram, DESC, last, (table, bytes, INDIRECT, 0));
        }
        heads.push(head);
    }
    heads
}

/// Guest addresses, lengths and directions of a chain.
type Segments = Vec<(u64, usize, bool)>;

fn ours(chain: &Chain, base: u64) -> Segments {
    let place = |write: bool| move |s: &GuestSlice| (s.as_ptr() as u64 - base, s.len(), write);
    let readable = chain.readable().iter().map(place(false));
    readable
        .chain(chain.writable().iter().map(place(true)))
        .collect()
}

fn oracle(event_index: bool) -> Oracle {
    let mut queue = Oracle::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(DESC as u32), None);
    queue.set_avail_ring_address(Some(AVAIL as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_event_idx(event_index);
    queue.set_ready(true);
    queue
}

#[test]
fn both_read_the_same_chains_and_write_the_same_used_ring() {
    let host = FakeHost::new(RAM as u64);
    let memory = host.memory();
    let base = memory.readable(0, 1).unwrap().as_ptr() as u64;
    let theirs = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut good, mut refused) = (0, 0);
    for round in 0..3000 {
        let event_index = round % 2 == 0;
        let mut ram = vec![0u8; RAM];
        let heads = chains(&mut random, &mut ram);
        for (i, head) in (0u64..).zip(&heads) {
            put(&mut ram, AVAIL + 4 + 2 * i, &head.to_le_bytes());
        }
        put(&mut ram, AVAIL + 2, &(heads.len() as u16).to_le_bytes());
        put(&mut ram, AVAIL, &(random.below(2) as u16).to_le_bytes());
        let used_event = random.below(8) as u16;
        put(
            &mut ram,
            AVAIL + 4 + 2 * u64::from(SIZE),
            &used_event.to_le_bytes(),
        );
        memory.write(0, &ram).unwrap();
        theirs.write_slice(&ram, GuestAddress(0)).unwrap();

        let mut queue = Queue::new(
            memory,
            QueueConfig {
                size: SIZE,
                descriptors: DESC,
                available: AVAIL,
                used: USED,
                max_chain: SIZE,
                event_index,
                indirect: true,
            },
        )
        .unwrap();
        let mut oracle = oracle(event_index);
        let mut chain = Chain::default();
        let mut broken = false;
        loop {
            match queue.pop(&mut chain) {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => {
                    broken = true;
                    break;
                }
            }
            let other = oracle.pop_descriptor_chain(&theirs).expect("a chain");
            assert_eq!(other.head_index(), chain.head());
            let expected: Segments = other
                .map(|d| (d.addr().0, d.len() as usize, d.is_write_only()))
                .collect();
            assert_eq!(ours(&chain, base), expected, "round {round}");
            good += 1;
            let written = random.below(1 << 20) as u32;
            queue.push(chain.head(), written);
            oracle.add_used(&theirs, chain.head(), written).unwrap();
            if event_index {
                let wants = oracle.needs_notification(&theirs).unwrap();
                assert_eq!(queue.publish(), wants, "round {round}");
            } else {
                // The oracle leaves the flag to its caller.
                let wants = ram[AVAIL as usize] & 1 == 0;
                assert_eq!(queue.publish(), wants);
            }
        }
        if broken {
            refused += 1;
            continue;
        }
        assert!(oracle.pop_descriptor_chain(&theirs).is_none());
        assert!(!queue.enable_notify().unwrap());
        assert!(!oracle.enable_notification(&theirs).unwrap());
        let len = 6 + 8 * u64::from(SIZE);
        let (mut a, mut b) = (vec![0; len as usize], vec![0; len as usize]);
        memory.read(USED, &mut a).unwrap();
        theirs.read_slice(&mut b, GuestAddress(USED)).unwrap();
        assert_eq!(a, b, "round {round}: the used rings");
    }
    println!("{good} chains compared, {refused} rings refused");
    assert!(good > 5000 && refused > 100);
}

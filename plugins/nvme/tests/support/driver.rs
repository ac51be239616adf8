//! The guest driver's side of an NVMe controller, well-behaved or not.

use std::time::Instant;

use vmm_plugin_api::GuestMemory;
use vmm_plugin_api::testing::{FakeDevice, FakeHost};

use super::WAIT;

pub const CAP: u64 = 0;
pub const VS: u64 = 8;
pub const INTMS: u64 = 0x0c;
pub const INTMC: u64 = 0x10;
pub const CC: u64 = 0x14;
pub const CSTS: u64 = 0x1c;
pub const AQA: u64 = 0x24;
pub const ASQ: u64 = 0x28;
pub const ACQ: u64 = 0x30;
pub const DOORBELLS: u64 = 0x1000;

/// `CC` with 64 and 16 byte entries, enabled.
pub const ENABLE: u64 = 0x46_0001;

pub const READ: u8 = 2;
pub const WRITE: u8 = 1;
pub const FLUSH: u8 = 0;
pub const COMPARE: u8 = 5;
pub const WRITE_ZEROES: u8 = 8;
pub const DSM: u8 = 9;

/// Status fields without flags.
pub const OK: u16 = 0;
pub const INVALID_OPCODE: u16 = 1;
pub const INVALID_FIELD: u16 = 2;
pub const TRANSFER_ERROR: u16 = 4;
pub const INTERNAL: u16 = 6;
pub const ABORTED: u16 = 7;
pub const INVALID_NAMESPACE: u16 = 0xb;
pub const SEQUENCE_ERROR: u16 = 0xc;
pub const PRP_OFFSET: u16 = 0x13;
pub const WRITE_PROTECTED: u16 = 0x20;
pub const LBA_RANGE: u16 = 0x80;
pub const QUEUE_ID: u16 = 0x101;
pub const QUEUE_SIZE: u16 = 0x102;
pub const CAPACITY_EXCEEDED: u16 = 0x81;
pub const WRITE_FAULT: u16 = 0x280;
pub const READ_ERROR: u16 = 0x281;
pub const COMPARE_FAILURE: u16 = 0x285;

/// A command to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cmd(pub [u32; 16]);

impl Cmd {
    pub fn new(opcode: u8) -> Self {
        let mut cmd = Self::default();
        cmd.0[0] = opcode.into();
        cmd
    }

    pub fn nsid(mut self, nsid: u32) -> Self {
        self.0[1] = nsid;
        self
    }

    pub fn dw(mut self, n: usize, value: u32) -> Self {
        self.0[n] = value;
        self
    }

    pub fn qw(self, n: usize, value: u64) -> Self {
        self.dw(n, value as u32).dw(n + 1, (value >> 32) as u32)
    }

    pub fn prp(self, first: u64, second: u64) -> Self {
        self.qw(6, first).qw(8, second)
    }

    /// One SGL descriptor as the data pointer.
    pub fn sgl(mut self, address: u64, len: u32, kind: u8) -> Self {
        self.0[0] |= 1 << 14;
        self.qw(6, address).dw(8, len).dw(9, u32::from(kind) << 24)
    }

    /// Read, write, compare or write zeroes of `blocks` blocks from `lba` on.
    pub fn rw(opcode: u8, lba: u64, blocks: u32) -> Self {
        Self::new(opcode).nsid(1).qw(10, lba).dw(12, blocks - 1)
    }
}

/// A completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cqe {
    pub result: u32,
    pub sq_head: u16,
    pub sq: u16,
    pub cid: u16,
    /// Code and type; flags are apart.
    pub status: u16,
    pub more: bool,
    pub dnr: bool,
}

/// A submission queue and its completion queue.
#[derive(Clone, Debug)]
pub struct Pair {
    pub id: u16,
    pub cq: u16,
    pub sq_at: u64,
    pub sq_size: u32,
    pub tail: u32,
    pub cq_at: u64,
    pub cq_size: u32,
    pub head: u32,
    pub phase: bool,
    pub next: u16,
    /// The tail that the device knows.
    pub told: u32,
    /// Doorbell writes to the register.
    pub kicks: u64,
}

pub struct Driver<'a> {
    pub device: &'a FakeDevice,
    pub memory: GuestMemory,
    pub free: u64,
    pub admin: Pair,
    /// Shadow doorbells and event indexes.
    pub shadow: Option<(u64, u64)>,
}

impl<'a> Driver<'a> {
    pub fn new(host: &FakeHost, device: &'a FakeDevice) -> Self {
        let mut driver = Self {
            device,
            memory: host.memory(),
            free: 0x1_0000,
            admin: empty(0),
            shadow: None,
        };
        driver.admin = driver.rings(0, 32, 32);
        driver
    }

    pub fn reg(&self, at: u64) -> u64 {
        self.device.read(0, at, 4)
    }

    pub fn set_reg(&self, at: u64, value: u64) {
        self.device.write(0, at, 4, value);
    }

    pub fn allocate(&mut self, bytes: u64, align: u64) -> u64 {
        let at = self.free.next_multiple_of(align);
        self.free = at + bytes;
        self.memory
            .readable(at, bytes)
            .expect("the fake host has RAM left")
            .fill(0);
        at
    }

    pub fn page(&mut self) -> u64 {
        self.allocate(4096, 4096)
    }

    pub fn rings(&mut self, id: u16, sq_size: u32, cq_size: u32) -> Pair {
        if let Some((doorbells, events)) = self.shadow {
            let slot = 8 * u64::from(id);
            self.memory.write(doorbells + slot, &[0; 8]).unwrap();
            self.memory.write(events + slot, &[0; 8]).unwrap();
        }
        Pair {
            sq_at: self.allocate(64 * u64::from(sq_size), 4096),
            sq_size,
            cq_at: self.allocate(16 * u64::from(cq_size), 4096),
            cq_size,
            ..empty(id)
        }
    }

    /// Enables the controller with fresh admin queues.
    pub fn enable(&mut self) {
        self.begin_disable();
        self.wait_ready(false);
        let (sq, cq) = (self.admin.sq_size, self.admin.cq_size);
        self.memory
            .readable(self.admin.cq_at, 16 * u64::from(cq))
            .unwrap()
            .fill(0);
        self.admin = Pair {
            tail: 0,
            told: 0,
            head: 0,
            phase: true,
            ..self.admin.clone()
        };
        self.shadow = None;
        self.set_reg(AQA, u64::from((cq - 1) << 16 | (sq - 1)));
        self.device.write(0, ASQ, 8, self.admin.sq_at);
        self.device.write(0, ACQ, 8, self.admin.cq_at);
        self.set_reg(CC, ENABLE);
        self.wait_ready(true);
    }

    pub fn begin_disable(&self) {
        self.set_reg(CC, 0x46_0000);
    }

    pub fn wait_ready(&self, ready: bool) {
        let end = Instant::now() + WAIT;
        while self.reg(CSTS) & 1 != u64::from(ready) {
            assert!(Instant::now() < end, "CSTS.RDY does not get {ready}");
            std::thread::sleep(std::time::Duration::from_micros(20));
        }
    }

    pub fn doorbell(&self, id: u16, completion: bool) -> u64 {
        DOORBELLS + 8 * u64::from(id) + 4 * u64::from(completion)
    }

    /// Puts a command into the queue; the device is not told.
    pub fn add(&self, pair: &mut Pair, mut cmd: Cmd) -> u16 {
        let cid = pair.next;
        pair.next = pair.next.wrapping_add(1);
        cmd.0[0] = cmd.0[0] & 0xffff | u32::from(cid) << 16;
        let bytes: Vec<u8> = cmd.0.iter().flat_map(|w| w.to_le_bytes()).collect();
        let at = pair.sq_at + 64 * u64::from(pair.tail);
        self.memory.write(at, &bytes).unwrap();
        pair.tail = (pair.tail + 1) % pair.sq_size;
        cid
    }

    fn shadow_write(&self, slot: u64, old: u32, new: u32) -> bool {
        let Some((doorbells, events)) = self.shadow else {
            return true;
        };
        self.memory
            .write(doorbells + 4 * slot, &new.to_le_bytes())
            .unwrap();
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let mut event = [0; 4];
        self.memory.read(events + 4 * slot, &mut event).unwrap();
        let event = u32::from_le_bytes(event) as u16;
        let (new, old) = (new as u16, old as u16);
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Tells the device of new commands, through the shadow if there is one.
    pub fn ring(&self, pair: &mut Pair) {
        let old = std::mem::replace(&mut pair.told, pair.tail);
        let shadowed = pair.id != 0;
        if !shadowed || self.shadow_write(2 * u64::from(pair.id), old, pair.tail) {
            pair.kicks += 1;
            self.set_reg(self.doorbell(pair.id, false), pair.tail.into());
        }
    }

    /// The next completion, if it is there; the device is not told that it was taken.
    pub fn take(&self, pair: &mut Pair) -> Option<Cqe> {
        let at = pair.cq_at + 16 * u64::from(pair.head);
        let mut cqe = [0; 16];
        self.memory.read(at, &mut cqe).unwrap();
        let half = |at: usize| u16::from_le_bytes([cqe[at], cqe[at + 1]]);
        if (half(14) & 1 != 0) != pair.phase {
            return None;
        }
        // What the phase announces may have been read before it.
        self.memory.read(at, &mut cqe).unwrap();
        let half = |at: usize| u16::from_le_bytes([cqe[at], cqe[at + 1]]);
        pair.head += 1;
        if pair.head == pair.cq_size {
            pair.head = 0;
            pair.phase = !pair.phase;
        }
        let status = half(14) >> 1;
        Some(Cqe {
            result: u32::from(half(0)) | u32::from(half(2)) << 16,
            sq_head: half(8),
            sq: half(10),
            cid: half(12),
            status: status & 0x7ff,
            more: status & 1 << 13 != 0,
            dnr: status & 1 << 14 != 0,
        })
    }

    /// Tells the device that completions were taken.
    pub fn acknowledge(&self, pair: &Pair, before: u32) {
        let shadowed = pair.cq != 0;
        if !shadowed || self.shadow_write(2 * u64::from(pair.cq) + 1, before, pair.head) {
            self.set_reg(self.doorbell(pair.cq, true), pair.head.into());
        }
    }

    pub fn wait(&self, pair: &mut Pair) -> Cqe {
        let end = Instant::now() + WAIT;
        loop {
            let before = pair.head;
            if let Some(cqe) = self.take(pair) {
                self.acknowledge(pair, before);
                return cqe;
            }
            assert!(Instant::now() < end, "no completion in queue {}", pair.id);
            std::thread::yield_now();
        }
    }

    /// One command after the other.
    pub fn run(&self, pair: &mut Pair, cmd: Cmd) -> Cqe {
        let cid = self.add(pair, cmd);
        self.ring(pair);
        let cqe = self.wait(pair);
        assert_eq!((cqe.cid, cqe.sq), (cid, pair.id), "{cmd:?}: {cqe:?}");
        cqe
    }

    pub fn admin(&mut self, cmd: Cmd) -> Cqe {
        let mut pair = self.admin.clone();
        let cqe = self.run(&mut pair, cmd);
        self.admin = pair;
        cqe
    }

    /// An admin command that has to succeed.
    pub fn must(&mut self, cmd: Cmd) -> u32 {
        let cqe = self.admin(cmd);
        assert_eq!(cqe.status, OK, "{cmd:?}: {cqe:?}");
        cqe.result
    }

    pub fn create_cq(pair: &Pair, vector: u16) -> Cmd {
        Cmd::new(5)
            .prp(pair.cq_at, 0)
            .dw(10, u32::from(pair.cq) | (pair.cq_size - 1) << 16)
            .dw(11, 3 | u32::from(vector) << 16)
    }

    pub fn create_sq(pair: &Pair) -> Cmd {
        Cmd::new(1)
            .prp(pair.sq_at, 0)
            .dw(10, u32::from(pair.id) | (pair.sq_size - 1) << 16)
            .dw(11, 1 | u32::from(pair.cq) << 16)
    }

    /// A pair of I/O queues.
    pub fn pair(&mut self, id: u16, size: u32, vector: u16) -> Pair {
        let pair = self.rings(id, size, size);
        self.must(Self::create_cq(&pair, vector));
        self.must(Self::create_sq(&pair));
        pair
    }

    pub fn enable_shadow(&mut self) {
        let (doorbells, events) = (self.page(), self.page());
        self.must(Cmd::new(0x7c).prp(doorbells, events));
        self.shadow = Some((doorbells, events));
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(at, &mut bytes).unwrap();
        bytes
    }

    /// An admin command that fills a page.
    pub fn page_of(&mut self, cmd: Cmd) -> Result<Vec<u8>, u16> {
        let page = self.page();
        let cqe = self.admin(cmd.prp(page, 0));
        if cqe.status == OK {
            Ok(self.bytes(page, 4096))
        } else {
            Err(cqe.status)
        }
    }

    pub fn identify(&mut self, cns: u32, nsid: u32) -> Result<Vec<u8>, u16> {
        self.page_of(Cmd::new(6).nsid(nsid).dw(10, cns))
    }

    /// Gives a command data in `pages` separate pages from `at` on, with a PRP list where one is needed.
    pub fn with_prps(&mut self, cmd: Cmd, at: u64, len: u64) -> Cmd {
        let first = 4096 - at % 4096;
        if len <= first {
            return cmd.prp(at, 0);
        }
        let pages: Vec<u64> = (0..(len - first).div_ceil(4096))
            .map(|i| at + first + 4096 * i)
            .collect();
        if pages.len() == 1 {
            return cmd.prp(at, pages[0]);
        }
        let list = self.page();
        let bytes: Vec<u8> = pages.iter().flat_map(|p| p.to_le_bytes()).collect();
        assert!(bytes.len() <= 4096);
        self.memory.write(list, &bytes).unwrap();
        cmd.prp(at, list)
    }

    pub fn write(&mut self, pair: &mut Pair, lba: u64, data: &[u8]) {
        let at = self.allocate(data.len() as u64, 4096);
        self.memory.write(at, data).unwrap();
        let cmd = Cmd::rw(WRITE, lba, data.len() as u32 / 512);
        let cmd = self.with_prps(cmd, at, data.len() as u64);
        let cqe = self.run(pair, cmd);
        assert_eq!(cqe.status, OK, "write at block {lba}: {cqe:?}");
    }

    pub fn read(&mut self, pair: &mut Pair, lba: u64, len: usize) -> Vec<u8> {
        let at = self.allocate(len as u64, 4096);
        let cmd = Cmd::rw(READ, lba, len as u32 / 512);
        let cmd = self.with_prps(cmd, at, len as u64);
        let cqe = self.run(pair, cmd);
        assert_eq!(cqe.status, OK, "read at block {lba}: {cqe:?}");
        self.bytes(at, len)
    }
}

fn empty(id: u16) -> Pair {
    Pair {
        id,
        cq: id,
        sq_at: 0,
        sq_size: 0,
        tail: 0,
        cq_at: 0,
        cq_size: 0,
        head: 0,
        phase: true,
        next: 0,
        told: 0,
        kicks: 0,
    }
}

//! Power is cut at many moments: of what the file was given since its last flush, any part may be lost, sector by sector. What the
//! overlay acknowledged before is there, every block is one that was written, and the file can be opened.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests

mod support;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use support::made::root_of;
use support::{Disk, FUA, MIB, Random, WRITE, pattern};
use vmm_plugin_api::abi::Root;
use vmm_plugin_api::testing::{Backend, FakeHost, Value, load};
use vmm_plugin_api::{
    BlockBackend, BlockDone, BlockInfo, BlockOp, BlockQueue, BlockRequest, Host, Options, Result,
};
use vmm_plugin_overlay::layout::Layout;
use vmm_plugin_overlay::overlay::{Base, Overlay, Writes};
use vmm_plugin_overlay::queue::OverlayQueue;
use vmm_plugin_overlay::upper::Upper;

const SECTOR: usize = 512;
const BYTES: u64 = MIB;

/// What was done to the store, in order.
enum Event {
    /// Offset, bytes, whether it was durable by itself.
    Stored(u64, Vec<u8>, bool),
    Flushed,
}

/// A store that remembers how it came to be what it is.
#[derive(Default)]
struct Store {
    data: Vec<u8>,
    log: Vec<Event>,
    /// Flushes are answered and do nothing.
    lies: bool,
}

#[derive(Clone)]
struct Recorder(Arc<Mutex<Store>>);

impl Upper for Recorder {
    type Queue = RecorderQueue;
    fn open_queue(&self, depth: u32) -> Result<RecorderQueue> {
        Ok(RecorderQueue(
            self.0.clone(),
            VecDeque::with_capacity(depth as usize),
        ))
    }
    fn frees(&self) -> bool {
        true
    }
}

struct RecorderQueue(Arc<Mutex<Store>>, VecDeque<BlockDone>);

impl BlockQueue for RecorderQueue {
    fn submit(&mut self, batch: &[BlockRequest]) -> usize {
        let mut store = self.0.lock().unwrap();
        for request in batch {
            let at = request.offset() as usize;
            let end = at + request.len() as usize;
            match request.op().unwrap() {
                BlockOp::Read => {
                    let mut at = at;
                    for segment in request.segments() {
                        segment.write(0, &store.data[at..at + segment.len()]);
                        at += segment.len();
                    }
                }
                BlockOp::Flush if store.lies => {}
                BlockOp::Flush => store.log.push(Event::Flushed),
                op => {
                    let mut bytes = vec![0; end - at];
                    let mut done = 0;
                    for segment in request.segments() {
                        done += segment.read(0, &mut bytes[done..]);
                    }
                    store.data[at..end].copy_from_slice(&bytes);
                    let durable = op == FUA && !store.lies;
                    store
                        .log
                        .push(Event::Stored(request.offset(), bytes, durable));
                }
            }
            self.1.push_back(request.done(0));
        }
        batch.len()
    }

    fn reap(&mut self, done: &mut [BlockDone]) -> usize {
        let count = done.len().min(self.1.len());
        for (slot, one) in done.iter_mut().zip(self.1.drain(..count)) {
            *slot = one;
        }
        count
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// An overlay on a store.
struct OnStore(Overlay<Recorder>);

static STORES: Mutex<BTreeMap<u64, Recorder>> = Mutex::new(BTreeMap::new());
static ROOT: Root = root_of::<OnStore>();

impl BlockBackend for OnStore {
    type Queue = OverlayQueue<RecorderQueue>;
    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let store = STORES.lock().unwrap()[&options.u64("store")?].clone();
        let base = Base::new(options.block("backing")?)?;
        Ok(Self(Overlay::open(host, base, store, Writes::Kept)?))
    }
    fn info(&self) -> BlockInfo {
        self.0.info()
    }
    fn open_queue(&self, depth: u32) -> Result<Self::Queue> {
        self.0.open_queue(depth)
    }
}

fn open(host: &FakeHost, base: &Backend, store: &Recorder) -> Backend {
    let mut stores = STORES.lock().unwrap();
    let id = stores.len() as u64;
    stores.insert(id, store.clone());
    drop(stores);
    let options = [("backing", Value::from(base)), ("store", id.into())];
    host.block(&ROOT, "on-store", &options).unwrap()
}

/// What a block held from a point of the log on.
#[derive(Clone)]
struct Version {
    from: usize,
    bytes: Vec<u8>,
}

/// A moment at which the overlay said that all versions up to some are safe.
struct Promise {
    at: usize,
    /// For each block that was written, the index of its version.
    floor: Vec<usize>,
}

struct Run {
    store: Recorder,
    versions: Vec<Vec<Version>>,
    promises: Vec<Promise>,
}

/// Writes, zeroes and flushes at random, with each block's history.
fn write(host: &FakeHost, base: &Backend, bytes: &[u8], lies: bool, seed: u64) -> Run {
    let layout = Layout::new(&base.as_block().unwrap().info().unwrap());
    let store = Recorder(Arc::new(Mutex::new(Store {
        data: vec![0; layout.file_bytes() as usize],
        log: Vec::new(),
        lies,
    })));
    let backend = open(host, base, &store);
    let mut disk = Disk {
        host: host.clone(),
        queue: backend.as_block().unwrap().open_queue(8).unwrap(),
    };
    let mut versions: Vec<Vec<Version>> = bytes
        .chunks(SECTOR)
        .map(|bytes| {
            vec![Version {
                from: 0,
                bytes: bytes.to_vec(),
            }]
        })
        .collect();
    let blocks = versions.len() as u64;
    let (mut promises, mut random) = (Vec::<Promise>::new(), Random(seed));
    let position = || store.0.lock().unwrap().log.len();
    for step in 0..300 {
        let first = random.below(64) + random.below(3) * 900;
        let count = 1 + random.below(12).min(blocks - first - 1);
        let (at, len) = (first * SECTOR as u64, count * SECTOR as u64);
        let range = first as usize..(first + count) as usize;
        let from = position();
        let (mut durable, mut flush) = (false, false);
        let written = match random.below(8) {
            0 => {
                assert_eq!(
                    disk.control(BlockOp::WriteZeroes { unmap: true }, at, len),
                    0
                );
                Some(vec![0; len as usize])
            }
            1 => {
                disk.flush();
                (durable, flush) = (true, true);
                None
            }
            kind => {
                let bytes = pattern(step, len as usize);
                let op = if kind == 2 { FUA } else { WRITE };
                assert_eq!(disk.write(op, at, &bytes), 0);
                durable = op == FUA;
                Some(bytes)
            }
        };
        if let Some(bytes) = written {
            for (versions, bytes) in versions[range.clone()].iter_mut().zip(bytes.chunks(SECTOR)) {
                versions.push(Version {
                    from,
                    bytes: bytes.to_vec(),
                });
            }
        }
        let latest = || versions.iter().map(|v| v.len() - 1);
        let floor: Vec<usize> = match (durable, promises.last()) {
            (false, _) => continue,
            // A flush promises all that was written, a durable write only itself.
            (true, Some(Promise { floor, .. })) if !flush => floor
                .iter()
                .zip(latest())
                .enumerate()
                .map(|(block, (old, new))| if range.contains(&block) { new } else { *old })
                .collect(),
            (true, None) if !flush => latest()
                .enumerate()
                .map(|(block, new)| if range.contains(&block) { new } else { 0 })
                .collect(),
            (true, _) => latest().collect(),
        };
        promises.push(Promise {
            at: position(),
            floor,
        });
    }
    // What is in the log from here on, the end in order, is no part of the run.
    let end = position();
    drop(disk);
    drop(backend);
    store.0.lock().unwrap().log.truncate(end);
    Run {
        store,
        versions,
        promises,
    }
}

/// The store as a power cut after `cut` events may leave it.
fn after_cut(run: &Run, cut: usize, random: &mut Random) -> Recorder {
    let store = run.store.0.lock().unwrap();
    let mut data = vec![0; store.data.len()];
    let flushed = store.log[..cut]
        .iter()
        .rposition(|event| matches!(event, Event::Flushed))
        .unwrap_or(0);
    let most = random.below(4);
    for (i, event) in store.log[..cut].iter().enumerate() {
        let Event::Stored(at, bytes, durable) = event else {
            continue;
        };
        for (n, sector) in bytes.chunks(SECTOR).enumerate() {
            // Sometimes nearly all is lost, sometimes nearly nothing.
            let survives = *durable || i < flushed || random.below(4) >= most;
            if survives {
                let at = *at as usize + n * SECTOR;
                data[at..at + sector.len()].copy_from_slice(sector);
            }
        }
    }
    Recorder(Arc::new(Mutex::new(Store {
        data,
        ..Store::default()
    })))
}

/// Cuts the power at random; the first block that is not what it may be.
fn cut_everywhere(lies: bool) -> Result<usize, String> {
    let host = FakeHost::new(8 * MIB);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let bytes = pattern(3, BYTES as usize);
    std::fs::write(dir.path().join("base"), &bytes).unwrap();
    let path = dir.path().join("base");
    let options: [(&str, Value); 7] = [
        ("path", path.to_str().unwrap().into()),
        ("read_only", true.into()),
        ("block_size", 512u64.into()),
        ("workers", 1u64.into()),
        ("skip_flush", false.into()),
        ("direct", false.into()),
        ("discard", true.into()),
    ];
    let base = host
        .block(load("vmm-plugin-file").unwrap(), "file", &options)
        .unwrap();
    let mut random = Random(0x5eed);
    let mut cuts = 0;
    for seed in 1..=4 {
        let run = write(&host, &base, &bytes, lies, seed);
        let events = run.store.0.lock().unwrap().log.len();
        for _ in 0..40 {
            let cut = random.below(events as u64 + 1) as usize;
            let left = after_cut(&run, cut, &mut random);
            let backend = open(&host, &base, &left);
            let mut disk = Disk {
                host: host.clone(),
                queue: backend.as_block().unwrap().open_queue(8).unwrap(),
            };
            let found = disk.read(0, BYTES as usize);
            let promise = run.promises.iter().rev().find(|promise| promise.at <= cut);
            for (block, (found, versions)) in found.chunks(SECTOR).zip(&run.versions).enumerate() {
                let floor = promise.map_or(0, |promise| promise.floor[block]);
                let may = |v: &Version| v.bytes == found;
                let mut candidates = versions[floor..].iter().enumerate();
                if !candidates.any(|(i, v)| (i == 0 || v.from < cut) && may(v)) {
                    return Err(format!(
                        "seed {seed}, cut after {cut} of {events}: block {block}"
                    ));
                }
            }
            cuts += 1;
        }
    }
    assert_eq!(host.faults(), Vec::<String>::new());
    Ok(cuts)
}

#[test]
fn what_was_acknowledged_survives_a_power_cut() {
    let cuts = cut_everywhere(false).unwrap();
    println!("{cuts} power cuts survived");
}

#[test]
fn the_check_finds_a_disk_that_does_not_flush() {
    let lost = cut_everywhere(true).unwrap_err();
    println!("found: {lost}");
}

//! What is left of an image when the power fails at any point, or the disk it is on refuses to write: judged by qemu-img.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, RwLock};

use vmm_plugin_api::testing::FakeHost;
use vmm_plugin_api::{BlockOp, GuestSlice};

use crate::disk::{Disk, Request};
use crate::open::Settings;
use crate::scratch::Work;
use crate::trace::Event;

const SECTOR: u64 = 512;
const SIZE: u64 = 4 << 20;

fn qemu_img(arguments: &[&str]) -> Option<i32> {
    let output = match Command::new("qemu-img").args(arguments).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        output => output.unwrap(),
    };
    let code = output.status.code().unwrap();
    if code != 0 {
        println!("{}", String::from_utf8_lossy(&output.stdout));
        println!("{}", String::from_utf8_lossy(&output.stderr));
    }
    Some(code)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// A disk, and what each of its sectors may have in it. A sector's content is a number, and 0 for zeroes.
struct Rig {
    disk: Disk,
    user: Arc<RwLock<()>>,
    work: Work,
    memory: GuestSlice,
    next: u64,
    /// By sector: event before which it was written, content.
    history: BTreeMap<u64, Vec<(usize, u64)>>,
    /// Events after which everything before an event is safe: (end of the flush, start of the flush).
    flushes: Vec<(usize, usize)>,
}

impl Rig {
    fn open(path: &Path) -> Self {
        let settings = Settings {
            path: path.into(),
            read_only: false,
            skip_flush: false,
            discard: true,
            backing_format: None,
        };
        let disk = Disk::open(&settings, 512).unwrap();
        disk.trace().start();
        let host = FakeHost::new(1 << 20);
        Self {
            user: disk.join(),
            disk,
            work: Work::default(),
            memory: host.memory().writable(0, 1 << 20).unwrap(),
            next: 1,
            history: BTreeMap::new(),
            flushes: Vec::new(),
        }
    }

    fn perform(&mut self, op: BlockOp, offset: u64, len: u64) -> i32 {
        let list = [self.memory.part(0, len as usize)];
        let moves = matches!(op, BlockOp::Read | BlockOp::Write { .. });
        let segments = if moves { &list[..] } else { &[] };
        let request = Request {
            op,
            offset,
            len,
            segments,
        };
        self.disk.perform(request, &self.user, &mut self.work)
    }

    fn note(&mut self, from: u64, sectors: u64, content: impl Fn(u64) -> u64) {
        let event = self.disk.trace().len();
        for i in 0..sectors {
            self.history
                .entry(from + i)
                .or_default()
                .push((event, content(i)));
        }
    }

    /// Something at random, and its result.
    fn step(&mut self, random: &mut Random) -> i32 {
        let from = random.below(SIZE / SECTOR);
        let sectors = (1 + random.below(48)).min(SIZE / SECTOR - from);
        let (offset, len) = (from * SECTOR, sectors * SECTOR);
        match random.below(20) {
            0 | 1 => {
                let start = self.disk.trace().len();
                let code = self.perform(BlockOp::Flush, 0, 0);
                if code == 0 {
                    self.flushes.push((self.disk.trace().len(), start));
                }
                code
            }
            2 => {
                self.note(from, sectors, |_| 0);
                self.perform(
                    BlockOp::WriteZeroes {
                        unmap: from.is_multiple_of(2),
                    },
                    offset,
                    len,
                )
            }
            3 => {
                self.note(from, sectors, |_| 0);
                self.perform(BlockOp::Discard, offset, len)
            }
            _ => {
                let first = self.next;
                self.next += sectors;
                for i in 0..sectors {
                    let bytes = (first + i).to_le_bytes().repeat(SECTOR as usize / 8);
                    self.memory.write((i * SECTOR) as usize, &bytes);
                }
                self.note(from, sectors, |i| first + i);
                self.perform(BlockOp::Write { fua: false }, offset, len)
            }
        }
    }
}

/// The file after the first `cut` events, if of those since the last sync each sector reached the disk or did not.
fn after_power_cut(start: &[u8], events: &[Event], cut: usize, random: &mut Random) -> Vec<u8> {
    let synced = events[..cut]
        .iter()
        .rposition(|e| matches!(e, Event::Sync))
        .unwrap_or(0);
    let mut file = start.to_vec();
    for (index, event) in events[..cut].iter().enumerate() {
        let mut kept = || index < synced || random.below(2) == 0;
        match event {
            Event::Write(at, bytes) => {
                // A write that does not reach the end of a sector is stored with the rest of it or not at all.
                let mut at = *at as usize;
                let mut rest = bytes.as_slice();
                while !rest.is_empty() {
                    let piece = rest.len().min(SECTOR as usize - at % SECTOR as usize);
                    if kept() {
                        file.resize(file.len().max(at + piece), 0);
                        file[at..at + piece].copy_from_slice(&rest[..piece]);
                    }
                    (at, rest) = (at + piece, &rest[piece..]);
                }
            }
            Event::Grow(len) if kept() => file.resize(file.len().max(*len as usize), 0),
            Event::Punch(at, len) if kept() => {
                let (from, to) = (*at as usize, ((at + len) as usize).min(file.len()));
                file[from.min(to)..to].fill(0);
            }
            _ => {}
        }
    }
    file
}

fn contents(raw: &Path) -> Vec<u64> {
    let bytes = std::fs::read(raw).unwrap();
    let sector = |sector: &[u8]| {
        let number = u64::from_le_bytes(sector[..8].try_into().unwrap());
        let whole = sector.chunks_exact(8).all(|c| c == number.to_le_bytes());
        assert!(whole, "a sector of two writes");
        number
    };
    bytes.chunks_exact(SECTOR as usize).map(sector).collect()
}

/// An image with a backing file whose sectors have numbers above a million.
fn make(dir: &Path, options: &str) -> Option<(PathBuf, Vec<u64>)> {
    let (base, image) = (dir.join("base.raw"), dir.join("disk.qcow2"));
    let numbers: Vec<u64> = (0..SIZE / SECTOR)
        .map(|i| if i % 5 == 0 { 0 } else { 1_000_000 + i })
        .collect();
    let bytes = numbers
        .iter()
        .flat_map(|n| n.to_le_bytes().repeat(SECTOR as usize / 8));
    std::fs::write(&base, bytes.collect::<Vec<u8>>()).unwrap();
    let with_base = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.raw",
        "-F",
        "raw",
        "-o",
        options,
        text(&image),
    ];
    let code = qemu_img(&with_base)?;
    assert_eq!(code, 0);
    Some((image, numbers))
}

#[test]
fn power_cuts_leave_sound_images_with_all_that_was_flushed() {
    let options = [
        "cluster_size=4096",
        "cluster_size=512",
        "cluster_size=65536",
        "cluster_size=4096,compat=0.10",
    ];
    for (seed, options) in options.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let Some((path, base)) = make(dir.path(), options) else {
            println!("SKIPPED: power cuts of qcow2 images: no qemu-img on this machine");
            return;
        };
        let start = std::fs::read(&path).unwrap();
        let mut random = Random(0x9e37_79b9 + seed as u64);
        let mut rig = Rig::open(&path);
        for _ in 0..120 {
            assert_eq!(rig.step(&mut random), 0);
        }
        let Rig {
            disk,
            history,
            flushes,
            ..
        } = rig;
        let events = disk.trace().take();
        drop(disk);
        assert!(
            flushes.len() > 3 && events.len() > 200,
            "{} events",
            events.len()
        );
        let (cut_image, raw) = (dir.path().join("cut.qcow2"), dir.path().join("cut.raw"));
        for _ in 0..20 {
            let cut = random.below(events.len() as u64) as usize;
            std::fs::write(
                &cut_image,
                after_power_cut(&start, &events, cut, &mut random),
            )
            .unwrap();
            let code = qemu_img(&["check", "-q", text(&cut_image)]).unwrap();
            assert!(
                code == 0 || code == 3,
                "{options}: after {cut} events: qemu-img check says {code}"
            );
            let convert = [
                "convert",
                "-f",
                "qcow2",
                "-O",
                "raw",
                text(&cut_image),
                text(&raw),
            ];
            assert_eq!(qemu_img(&convert), Some(0));
            let safe = flushes
                .iter()
                .rev()
                .find(|(end, _)| *end <= cut)
                .map_or(0, |(_, start)| *start);
            for (sector, found) in contents(&raw).into_iter().enumerate() {
                let writes = history.get(&(sector as u64)).map_or(&[][..], Vec::as_slice);
                let flushed = writes.iter().rposition(|(event, _)| *event < safe);
                let before = flushed.map_or(base[sector], |index| writes[index].1);
                let later = &writes[flushed.map_or(0, |index| index + 1)..];
                // A discard of less than a cluster changes nothing.
                let discarded = flushed.is_some_and(|index| writes[index].1 == 0);
                assert!(
                    found == before
                        || discarded
                        || later.iter().any(|(_, content)| *content == found),
                    "{options}: after {cut} events: sector {sector} has {found}, not {before}"
                );
            }
        }
    }
}

#[test]
fn refused_writes_are_errors_and_leave_sound_images() {
    for (seed, error) in [
        (1, libc::ENOSPC),
        (2, libc::EIO),
        (3, libc::ENOSPC),
        (4, libc::EIO),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let Some((path, _)) = make(dir.path(), "cluster_size=4096") else {
            println!("SKIPPED: refused writes to qcow2 images: no qemu-img on this machine");
            return;
        };
        let mut random = Random(0x1234_5678 + seed);
        let mut rig = Rig::open(&path);
        let mut failed = 0;
        for round in 0..300 {
            // Most of the time nothing works after some events, then everything again.
            let left = (round % 10 < 7).then(|| random.below(4));
            rig.disk.trace().fail_after(left, error);
            let code = rig.step(&mut random);
            assert!(code == 0 || code == -error || code == -libc::EIO, "{code}");
            failed += usize::from(code != 0);
        }
        assert!(failed > 20, "{failed} failures");
        rig.disk.trace().fail_after(None, 0);
        drop(rig);
        let code = qemu_img(&["check", "-q", text(&path)]).unwrap();
        assert!(code == 0 || code == 3, "qemu-img check says {code}");
    }
}

//! Kills the process of a disk at random moments, many times, and compares the disk with what it had acknowledged.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use vmm_crash::devices::{DEVICES, Guest};
use vmm_crash::disks::{BYTES, DISKS, Judge, Open, RAW};
use vmm_crash::sector::{self, SECTOR};
use vmm_plugin_api::testing::{FakeHost, run_transfer};
use vmm_plugin_api::{BlockOp, Result};

const SECTORS: u64 = BYTES / SECTOR as u64;
/// Kills of each disk under each device, for a test run.
const KILLS: u64 = 8;
const CHILD: &str = "VMM_CRASH_CHILD";
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// A number that the environment may give.
fn setting(name: &str, or: u64) -> u64 {
    let text = std::env::var(name);
    text.map_or(or, |text| text.parse().expect(name))
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

/// Writes without end; each `+` line is a write that has been flushed: first sector, sectors, sequence.
fn write_for_ever(guest: &mut dyn Guest, seed: u64, mut sequence: u64) -> Result<()> {
    let mut random = Random(seed);
    let mut out = std::io::stdout().lock();
    loop {
        let (mut writes, mut lines) = (Vec::new(), String::new());
        // Writes at once lie in parts of the disk of their own; hot places, so that there is something to be reordered.
        for part in 0..1 + random.below(12) {
            sequence += 1;
            let first = part * (SECTORS / 12) + random.below(64) * 3;
            let count = 1 + random.below(16);
            let bytes = (first..first + count).flat_map(|index| sector::make(index, sequence));
            writes.push((first, bytes.collect()));
            lines.push_str(&format!("+ {first} {count} {sequence}\n"));
        }
        guest.write(&writes)?;
        if random.below(3) == 0 {
            // Overwritten before the flush: the second has to win.
            sequence += 1;
            let (first, bytes) = &mut writes[0];
            let count = (bytes.len() / SECTOR) as u64;
            let again = (*first..*first + count).flat_map(|index| sector::make(index, sequence));
            *bytes = again.collect();
            lines.push_str(&format!("+ {first} {count} {sequence}\n"));
            guest.write(&writes[..1])?;
        }
        guest.flush()?;
        out.write_all(lines.as_bytes())?;
        out.flush()?;
    }
}

fn child(argument: &str) {
    let mut words = argument.splitn(5, ' ');
    let mut word = || words.next().expect("disk, device, seed, sequence, folder");
    let (disk, device) = (word(), word());
    let seed = word().parse().expect("a number");
    let sequence = word().parse().expect("a number");
    let dir = Path::new(word());
    let (_, open, _) = DISKS
        .iter()
        .find(|(name, ..)| *name == disk)
        .expect("a disk");
    let (_, run) = DEVICES
        .iter()
        .find(|(name, _)| *name == device)
        .expect("a device");
    let host = FakeHost::new(8 << 20);
    let disk = open(&host, dir).expect("open the disk");
    let end = run(&host, &disk, &mut |guest| {
        write_for_ever(guest, seed, sequence)
    });
    panic!("the guest has ended: {end:?}");
}

/// Compares the disk with what it must have: the sequence of each sector that was acknowledged last. Returns the latest.
fn check(open: Open, dir: &Path, floor: &[u64]) -> Result<u64, String> {
    let host = FakeHost::new(8 << 20);
    let disk = open(&host, dir).map_err(|error| format!("it can't be opened: {error:#}"))?;
    let mut queue = disk.as_block().unwrap().open_queue(4).unwrap();
    let slice = host.memory().writable(0, 1 << 16).unwrap();
    let (mut bytes, mut latest) = (vec![0; 1 << 16], 0);
    for at in (0..BYTES).step_by(bytes.len()) {
        assert_eq!(
            run_transfer(&mut queue, BlockOp::Read, at, &[slice]).unwrap(),
            0
        );
        slice.read(0, &mut bytes);
        latest = latest.max(compare(at / SECTOR as u64, &bytes, floor)?);
    }
    Ok(latest)
}

/// Compares sectors from `first` on with what they must have. Returns the latest.
fn compare(first: u64, bytes: &[u8], floor: &[u64]) -> Result<u64, String> {
    let mut latest = 0;
    for (index, found) in (first..).zip(bytes.chunks(SECTOR)) {
        let sequence = sector::read(index, found)?;
        let least = floor[index as usize];
        if sequence < least {
            return Err(format!(
                "sector {index} is of {sequence}, but {least} was acknowledged"
            ));
        }
        latest = latest.max(sequence);
    }
    Ok(latest)
}

/// What is there after a kill: as another program sees it, if there is one for this disk, and as we do, and what we leave.
fn check_all(open: Open, judge: Judge, dir: &Path, floor: &[u64]) -> Result<u64, String> {
    let judged = |when: &str| {
        judge(dir).map_err(|error| format!("{when}: {error:#}"))?;
        let Ok(raw) = std::fs::read(dir.join(RAW)) else {
            return Ok(0);
        };
        assert_eq!(raw.len() as u64, BYTES);
        compare(0, &raw, floor).map_err(|error| format!("{when}, for another program: {error}"))
    };
    let before = judged("as it was left by the kill")?;
    let ours = check(open, dir, floor)?;
    let after = judged("opened and closed")?;
    assert!([0, ours].contains(&before) && [0, ours].contains(&after));
    Ok(ours)
}

/// One life of a child: lets it write for a while, kills it, and takes over what it has acknowledged.
fn live_and_die(argument: &str, moment: Duration, floor: &mut [u64]) -> u64 {
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "acknowledged_writes_survive_kill_9",
            "--nocapture",
        ])
        .env(CHILD, argument)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let (mut latest, mut first) = (0, true);
    // A line that was cut by the kill was not acknowledged: it has no end, or fewer numbers.
    while let Some(Ok(line)) = lines.next() {
        let Some(numbers) = line.strip_prefix("+ ") else {
            continue;
        };
        let numbers: Vec<u64> = numbers.split(' ').filter_map(|n| n.parse().ok()).collect();
        let [start, count, sequence] = numbers[..] else {
            break;
        };
        for index in start..start + count {
            floor[index as usize] = floor[index as usize].max(sequence);
        }
        latest = latest.max(sequence);
        if std::mem::take(&mut first) {
            std::thread::sleep(moment);
            process.kill().unwrap();
        }
    }
    let end = process.wait().unwrap();
    assert!(!first, "the child has acknowledged nothing");
    assert_eq!(end.signal(), Some(9), "the child ended by itself: {end}");
    latest
}

#[test]
fn acknowledged_writes_survive_kill_9() {
    if let Ok(argument) = std::env::var(CHILD) {
        return child(&argument);
    }
    let (seed, kills) = (
        setting("VMM_CRASH_SEED", SEED),
        setting("VMM_CRASH_KILLS", KILLS),
    );
    println!("VMM_CRASH_SEED={seed} VMM_CRASH_KILLS={kills}");
    let mut random = Random(seed.max(1));
    for (disk, open, judge) in DISKS {
        for (device, _) in DEVICES {
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            if let Err(error) = open(&FakeHost::new(1 << 20), dir.path()) {
                let may = disk.contains("direct") || format!("{error:#}").starts_with("qemu-img: ");
                assert!(may, "{disk}: {error:#}");
                println!("SKIPPED: {disk}: {error:#}");
                continue;
            }
            let mut floor = vec![0; SECTORS as usize];
            let (mut sequence, mut acknowledged) = (0, 0);
            for kill in 0..kills {
                // What the child writes and when it dies; at which write that is, the machine decides.
                let (seed, moment) = (1 + random.below(1 << 62), random.below(60_000));
                let dir = dir.path();
                let argument = format!("{disk} {device} {seed} {sequence} {}", dir.display());
                let start = sequence;
                let last = live_and_die(&argument, Duration::from_micros(moment), &mut floor);
                acknowledged += last - start;
                match check_all(*open, *judge, dir, &floor) {
                    Ok(latest) => sequence = latest.max(last),
                    Err(error) => panic!(
                        "{disk} under {device}, kill {kill} after {moment} us, writes of {seed}: {error}"
                    ),
                }
            }
            println!(
                "{disk} under {device}: {kills} kills, {acknowledged} writes acknowledged, all there"
            );
        }
    }
}

#[test]
fn the_check_finds_a_lost_write_and_a_torn_sector() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (_, open, _) = DISKS[0];
    drop(open(&FakeHost::new(1 << 20), dir.path()).unwrap());
    let image = std::fs::File::options()
        .write(true)
        .open(dir.path().join("disk"))
        .unwrap();
    let put = |index: u64, bytes: &[u8]| {
        std::os::unix::fs::FileExt::write_all_at(&image, bytes, index * SECTOR as u64).unwrap();
    };
    let mut floor = vec![0; SECTORS as usize];
    put(3, &sector::make(3, 7));
    floor[3] = 7;
    assert_eq!(check(open, dir.path(), &floor), Ok(7));
    floor[3] = 8;
    assert!(
        check(open, dir.path(), &floor)
            .unwrap_err()
            .contains("8 was acknowledged")
    );
    floor[3] = 0;
    put(3, &sector::make(3, 9)[..100]);
    assert!(
        check(open, dir.path(), &floor)
            .unwrap_err()
            .contains("neither old nor new")
    );
    put(3, &sector::make(4, 9));
    assert!(
        check(open, dir.path(), &floor)
            .unwrap_err()
            .contains("belongs to 4")
    );
}

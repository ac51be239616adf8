//! A process that writes to an image and is killed: what it had flushed is there, and the image is sound.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use support::{Disk, MIB, Random, SECTOR, Setup};
use vmm_plugin_api::testing::FakeHost;

const CHILD: &str = "VMM_TEST_CHILD";

/// Writes for ever: sector `i` of the disk gets numbers that grow. After each flush it says which number is safe.
fn write_for_ever(path: &str, seed: u64) -> ! {
    let host = FakeHost::new(2 * MIB);
    let mut disk = Disk::new(&host, support::open(&host, path.as_ref(), &[]).unwrap(), 0);
    let mut random = Random(seed);
    let mut number = 0u64;
    loop {
        for _ in 0..random.below(12) {
            number += 1;
            let sector = random.below(disk.size / SECTOR);
            disk.write(sector * SECTOR, &number.to_le_bytes().repeat(64));
            println!("wrote {number} {sector}");
        }
        disk.flush();
        println!("safe {number}");
        std::io::stdout().flush().unwrap();
    }
}

#[test]
fn killed_processes_leave_what_they_flushed() {
    if let Ok(argument) = std::env::var(CHILD) {
        let (path, seed) = argument.rsplit_once(' ').unwrap();
        write_for_ever(path, seed.parse().unwrap());
    }
    let Some(setup) = Setup::new() else { return };
    let mut random = Random(2024);
    for (round, options) in [
        "cluster_size=4096",
        "cluster_size=65536",
        "cluster_size=512",
    ]
    .into_iter()
    .cycle()
    .take(12)
    .enumerate()
    {
        setup.create("disk.qcow2", &["-o", options], "8M");
        let path = setup.path("disk.qcow2");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "killed_processes_leave_what_they_flushed",
                "--nocapture",
            ])
            .env(CHILD, format!("{} {}", path.display(), 1000 + round))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || lines.map_while(Result::ok).collect::<Vec<_>>());
        std::thread::sleep(Duration::from_millis(150 + random.below(250)));
        child.kill().unwrap();
        child.wait().unwrap();
        let lines = reader.join().unwrap();
        // What is said of a sector: the last number known to be safe, and all that may have come later.
        let mut written = std::collections::BTreeMap::<u64, Vec<u64>>::new();
        let mut safe = 0;
        for line in &lines {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["wrote", number, sector] => {
                    written
                        .entry(sector.parse().unwrap())
                        .or_default()
                        .push(number.parse().unwrap());
                }
                ["safe", number] => safe = number.parse().unwrap(),
                _ => {}
            }
        }
        setup.check_sound("disk.qcow2");
        // Opened by us: nothing is needed to go on.
        let contents = setup.open("disk.qcow2", &[]).contents();
        for (sector, numbers) in &written {
            let at = (sector * SECTOR) as usize;
            let found = u64::from_le_bytes(contents[at..at + 8].try_into().unwrap());
            let least = numbers
                .iter()
                .copied()
                .filter(|n| *n <= safe)
                .max()
                .unwrap_or(0);
            assert!(
                found >= least,
                "{options}: sector {sector} has {found}, but {least} was flushed"
            );
        }
        println!("{options}: {} writes, {safe} of them safe", written.len());
        setup.check_sound("disk.qcow2");
    }
}

//! A guest of virtio-block (virtio 1.2, sections 2.7 and 5.2).

use std::cell::OnceCell;

use vmm_plugin_api::abi::Root;
use vmm_plugin_api::testing::{Buffer, DriverQueue, VirtioDriver};
use vmm_plugin_api::{GuestMemory, Result};

use crate::input::Input;
use crate::{Subject, WAIT, pattern};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
/// Guest memory that descriptors mostly point to.
const POOL: u64 = 0x8000;
/// Pieces of it have this many bytes.
const UNIT: u64 = 1024;
/// Most steps of one guest.
const STEPS: usize = 200;

thread_local! {
    static SUBJECTS: OnceCell<[Subject; 2]> = const { OnceCell::new() };
}

/// Runs the guest that `bytes` are. `root` is the plugin, the same for all calls of a thread.
///
/// # Panics
/// The device does what it must not.
#[allow(clippy::expect_used)] // that is how a failure is told
pub fn run(root: &'static Root, bytes: &[u8]) {
    SUBJECTS.with(|subjects| {
        let subjects = subjects
            .get_or_init(|| Subject::pair(root, "pci-virtio-block").expect("create the device"));
        let mut input = Input(bytes);
        let subject = &subjects[usize::from(input.below(2))];
        misbehave(subject, &mut input).expect("a guest can be reset and start anew");
        subject.unhinder();
        behave(subject).expect("the next driver has a disk");
        subject.verify();
    });
}

fn misbehave(subject: &Subject, input: &mut Input<'_>) -> Result<()> {
    let device = &subject.device;
    let mut driver = VirtioDriver::modern(&subject.host, device)?;
    let mut features = if input.below(4) == 0 {
        input.long()
    } else {
        u64::MAX
    };
    driver.negotiate(features)?;
    let size = input.of(&[64, 1, 2, 8, 128, 256]);
    let mut queue = driver.queue(0, size, input.below(2).into())?;
    driver.ready()?;
    let pool = driver.allocate(POOL, 4096);
    let memory = driver.memory();
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        match input.below(16) {
            0..=2 => request(input, &mut queue, memory, pool, size)?,
            3 => {
                let flags = input.of(&[NEXT, WRITE, NEXT | WRITE, 0, INDIRECT, 0xffff]);
                let next = u16::from(input.byte());
                queue.set_descriptor(
                    u16::from(input.byte()) % size,
                    input.address(pool, UNIT),
                    length(input),
                    flags,
                    next,
                );
            }
            4 => queue.publish(input.half()),
            5 => queue.publish(u16::from(input.byte()) % size),
            6 | 7 => queue.notify(device),
            8 => while queue.take_used().is_some() {},
            9 => {
                let bytes = input.long().to_le_bytes();
                let at = pool + u64::from(input.half()) % (POOL - 8);
                memory.write(at, &bytes)?;
            }
            10 => {
                let (region, width) = (input.of(&[2, 2, 0]), 1 << input.below(4));
                let offset = u64::from(input.half()) % 0x4000;
                device.write(region, offset, width, input.value());
                let _ = device.read(region, offset, width);
            }
            11 => {
                // Common configuration, where most registers are.
                let width = 1 << input.below(4);
                device.write(2, input.below(64).into(), width, input.value());
            }
            12 => {
                let offset = input.below(24).into();
                device.write_capability(4, offset, 1 << input.below(3), input.word());
                let _ = device.read_capability(4, offset, 4);
            }
            13 => subject.pause(input.below(3) == 0)?,
            14 => subject.hinder(input),
            _ => {
                device.enable_msix(input.below(2) == 0);
                driver = VirtioDriver::modern(&subject.host, device)?;
                features = features.rotate_left(input.below(64).into());
                driver.negotiate(features)?;
                queue = driver.queue(0, size, 0)?;
                driver.ready()?;
                // The same places again: rings and pool.
                let _ = driver.allocate(POOL, 4096);
            }
        }
    }
    device.enable_msix(true);
    Ok(())
}

/// A length of a buffer.
fn length(input: &mut Input<'_>) -> u32 {
    match input.below(8) {
        0 => input.word(),
        1 => u32::from(input.byte()),
        2 => 16,
        n => u32::from(n - 2) * 512,
    }
}

/// A request as the specification wants it, but for what the input has changed: a header, up to 3 buffers and a status byte.
fn request(
    input: &mut Input<'_>,
    queue: &mut DriverQueue,
    memory: GuestMemory,
    pool: u64,
    size: u16,
) -> Result<()> {
    let kinds = [0, 1, 4, 8, 11, 13, 0, 1, 2, 14, u32::MAX];
    let (kind, sector) = (input.of(&kinds), u64::from(input.half()) % 8200);
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    memory.write(pool, &header)?;
    let mut chain = vec![Buffer::readable(pool, 16)];
    for _ in 0..input.below(4) {
        chain.push(Buffer {
            address: input.address(pool, UNIT),
            len: length(input),
            writable: kind == T_IN || kind == 8,
        });
    }
    if matches!(kind, 11 | 13) {
        // Its ranges (5.2.6): sector, sectors, flags.
        let mut range = (u64::from(input.half()) % 8200).to_le_bytes().to_vec();
        range.extend(u32::from(input.half()).to_le_bytes());
        range.extend(u32::from(input.below(3)).to_le_bytes());
        memory.write(pool + UNIT, &range)?;
        chain.push(Buffer::readable(
            pool + UNIT,
            16 * u32::from(input.below(3)),
        ));
    }
    if input.below(16) != 0 {
        chain.push(Buffer::writable(pool + 512, 1));
    }
    let indirect = input.below(3) == 0;
    let table = pool + 0x4000 + u64::from(input.below(4)) * 0x100;
    let first = u16::from(input.byte()) % size;
    for (i, buffer) in (0..).zip(&chain) {
        let last = usize::from(i) + 1 == chain.len();
        let next = (first + i + 1) % size;
        let flags = if last { 0 } else { NEXT } | if buffer.writable { WRITE } else { 0 };
        if indirect {
            let mut entry = buffer.address.to_le_bytes().to_vec();
            entry.extend(buffer.len.to_le_bytes());
            entry.extend(flags.to_le_bytes());
            entry.extend((i + 1).to_le_bytes());
            memory.write(table + 16 * u64::from(i), &entry)?;
        } else {
            let at = (first + i) % size;
            queue.set_descriptor(at, buffer.address, buffer.len, flags, next);
        }
    }
    if indirect {
        queue.set_descriptor(first, table, 16 * chain.len() as u32, INDIRECT, 0);
    }
    queue.publish(first);
    Ok(())
}

/// A driver as it should be writes and reads what it has written.
fn behave(subject: &Subject) -> Result<()> {
    let mut driver = VirtioDriver::modern(&subject.host, &subject.device)?;
    driver.negotiate(u64::MAX)?;
    let mut queue = driver.queue(0, 16, 0)?;
    driver.ready()?;
    let (header, data) = (driver.allocate(32, 16), driver.allocate(4096, 4096));
    let memory = driver.memory();
    for kind in [T_OUT, T_IN] {
        let mut head = [0; 17];
        head[..4].copy_from_slice(&kind.to_le_bytes());
        head[8] = 5;
        head[16] = 0xee;
        memory.write(header, &head)?;
        let filled = if kind == T_OUT {
            pattern(1, 4096)
        } else {
            vec![0; 4096]
        };
        memory.write(data, &filled)?;
        queue.add(&[
            Buffer::readable(header, 16),
            Buffer {
                address: data,
                len: 4096,
                writable: kind == T_IN,
            },
            Buffer::writable(header + 16, 1),
        ]);
        queue.kick(&subject.device);
        assert!(queue.wait(WAIT).is_some(), "request {kind} has no answer");
        memory.read(header, &mut head)?;
        assert_eq!(head[16], 0, "the status of request {kind}");
    }
    let mut read = vec![0; 4096];
    memory.read(data, &mut read)?;
    assert!(read == pattern(1, 4096), "what was written is not read");
    driver.reset(WAIT)
}

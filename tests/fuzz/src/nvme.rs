//! A guest of the NVMe controller (NVM Express 1.4).

use std::cell::OnceCell;

use vmm_plugin_api::Result;
use vmm_plugin_api::abi::Root;

use crate::input::Input;
use crate::{Subject, WAIT, pattern};
use driver::{CC, Cmd, DOORBELLS, Driver, ENABLE, Pair};

/// The driver of the controller's own tests.
#[path = "../../../plugins/nvme/tests/support/driver.rs"]
#[allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used)]
mod driver;

/// Pages that commands mostly point to.
const POOL: u64 = 0x1_0000;
/// Most steps of one guest.
const STEPS: usize = 200;

thread_local! {
    static SUBJECTS: OnceCell<[Subject; 2]> = const { OnceCell::new() };
}

/// Runs the guest that `bytes` are. `root` is the plugin, the same for all calls of a thread.
///
/// # Panics
/// The controller does what it must not.
#[allow(clippy::expect_used)] // that is how a failure is told
pub fn run(root: &'static Root, bytes: &[u8]) {
    SUBJECTS.with(|subjects| {
        let subjects =
            subjects.get_or_init(|| Subject::pair(root, "pci-nvme").expect("create the device"));
        let mut input = Input(bytes);
        let subject = &subjects[usize::from(input.below(2))];
        misbehave(subject, &mut input).expect("pause, reset and resume work");
        subject.unhinder();
        subject.device.enable_msix(true);
        behave(subject);
        subject.verify();
    });
}

fn misbehave(subject: &Subject, input: &mut Input<'_>) -> Result<()> {
    let device = &subject.device;
    let mut driver = Driver::new(&subject.host, device);
    driver.enable();
    let sizes = [input.of(&[16, 2, 7, 64]), input.of(&[7, 2, 3, 64])];
    let mut pairs = [driver.pair(1, sizes[0], 1), driver.pair(2, sizes[1], 2)];
    let (doorbells, events) = (driver.page(), driver.page());
    let pool = driver.allocate(POOL, 4096);
    let memory = driver.memory;
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        match input.below(16) {
            0..=3 => {
                let cmd = command(input, pool);
                driver.add(&mut pairs[usize::from(input.below(2))], cmd);
            }
            4 | 5 => {
                let cmd = admin(input, pool, &pairs);
                let mut queue = driver.admin.clone();
                driver.add(&mut queue, cmd);
                driver.ring(&mut queue);
                driver.admin = queue;
            }
            6 | 7 => driver.ring(&mut pairs[usize::from(input.below(2))]),
            8 => {
                let pair = &mut pairs[usize::from(input.below(2))];
                let before = pair.head;
                while driver.take(pair).is_some() {}
                driver.acknowledge(pair, before);
            }
            9 => {
                let mut queue = driver.admin.clone();
                let before = queue.head;
                while driver.take(&mut queue).is_some() {}
                driver.acknowledge(&queue, before);
                driver.admin = queue;
            }
            10 => {
                let (width, value) = (1 << input.below(4), input.value());
                let offset = match input.below(3) {
                    0 => u64::from(input.half()) % 0x4000,
                    1 => DOORBELLS + u64::from(input.below(32)),
                    _ => input.below(0x40).into(),
                };
                device.write(0, offset, width, value);
                let _ = device.read(0, offset, width);
            }
            11 => {
                let value = input.of(&[ENABLE, 0x46_0000, ENABLE | 1 << 14, ENABLE | 2 << 14]);
                driver.set_reg(CC, value);
            }
            12 => {
                // A page of a list, or an SGL descriptor.
                let at = pool + u64::from(input.half()) % (POOL / 8) * 8;
                let value = match input.below(4) {
                    0 => input.long(),
                    1 => u64::from(input.of(&[0u8, 0x10, 0x20, 0x30])) << 56 | 4096,
                    _ => input.address(pool, 4096),
                };
                memory.write(at, &value.to_le_bytes())?;
            }
            13 => subject.pause(input.below(3) == 0)?,
            14 => subject.hinder(input),
            _ => match input.below(3) {
                0 => device.enable_msix(input.below(2) == 0),
                1 => {
                    let cmd = Cmd::new(0x7c).prp(doorbells, events);
                    let mut queue = driver.admin.clone();
                    driver.add(&mut queue, cmd);
                    driver.ring(&mut queue);
                    driver.admin = queue;
                    driver.shadow = Some((doorbells, events));
                }
                _ => {
                    let wrong = input.word().to_le_bytes();
                    let slot = 4 * u64::from(input.below(8));
                    memory.write(doorbells + slot, &wrong)?;
                }
            },
        }
    }
    Ok(())
}

/// An I/O command, with what the input has changed in it.
fn command(input: &mut Input<'_>, pool: u64) -> Cmd {
    let mut cmd = Cmd::default();
    let psdt = input.of(&[0, 0, 0, 1, 2, 3]);
    let opcode = input.of(&[1, 2, 1, 2, 0, 5, 8, 9, 4, 0x0c, 0x80]);
    let fused = if input.below(16) == 0 { 1 << 8 } else { 0 };
    cmd.0[0] = opcode | fused | psdt << 14;
    cmd.0[1] = input.of(&[1, 1, 1, 1, 0, 2, u32::MAX]);
    let lba = match input.below(8) {
        0 => input.long(),
        _ => u64::from(input.half()) % 8300,
    };
    let blocks = match input.below(4) {
        0 => input.word(),
        1 => u32::from(input.half()),
        _ => u32::from(input.below(64)),
    };
    let mut cmd = cmd
        .prp(input.address(pool, 4096), input.address(pool, 4096))
        .qw(10, lba)
        .dw(12, blocks);
    if opcode == 9 {
        cmd = cmd
            .dw(10, input.byte().into())
            .dw(11, input.below(8).into());
    }
    if psdt != 0 {
        cmd.0[8] = u32::from(input.below(4)) * 4096 + u32::from(input.below(33)) * 16;
        cmd.0[9] = input.of(&[0, 0x20, 0x30, 0x10, 0x4f]) << 24;
    }
    cmd
}

/// An admin command, mostly one that the controller knows.
fn admin(input: &mut Input<'_>, pool: u64, pairs: &[Pair; 2]) -> Cmd {
    match input.below(8) {
        0 => Driver::create_cq(&pairs[usize::from(input.below(2))], input.below(4).into()),
        1 => Driver::create_sq(&pairs[usize::from(input.below(2))]),
        2 => Cmd::new(input.of(&[0, 4])).dw(10, input.below(4).into()),
        3 => command(input, pool),
        _ => {
            let opcodes = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 0x7c, 0x80];
            Cmd::new(input.of(&opcodes))
                .nsid(input.of(&[1, 0, 2, u32::MAX]))
                .prp(input.address(pool, 4096), input.address(pool, 4096))
                .dw(10, input.value() as u32)
                .dw(11, input.value() as u32)
                .dw(12, input.value() as u32)
                .dw(13, input.value() as u32)
        }
    }
}

/// A driver as it should be writes and reads what it has written.
fn behave(subject: &Subject) {
    let mut driver = Driver::new(&subject.host, &subject.device);
    driver.enable();
    let controller = driver.identify(1, 0);
    assert!(controller.is_ok(), "identify: {controller:?}");
    let mut pair = driver.pair(1, 16, 1);
    driver.write(&mut pair, 40, &pattern(4, 4096));
    assert!(
        driver.read(&mut pair, 40, 4096) == pattern(4, 4096),
        "what was written is not read"
    );
}

//! The disk as a device sees it through the ABI.

#![allow(clippy::expect_used, dead_code)] // helpers of several test programs

use vmm_plugin_api::testing::{Backend, FakeHost, Value};
use vmm_plugin_api::{Batch, BlockDone, BlockOp, BlockQueueHandle};
use vmm_plugin_cloudinit::VMM_PLUGIN;

pub const MIB: usize = 1 << 20;

/// A disk with the given options, over the defaults that the manifest gives.
pub fn disk(host: &FakeHost, given: &[(&str, &str)], block: u64) -> Result<Backend, String> {
    let mut options: Vec<(&str, Value)> = vec![
        ("block_size", block.into()),
        ("read_only", true.into()),
        ("skip_flush", false.into()),
    ];
    options.extend(given.iter().map(|(key, text)| (*key, (*text).into())));
    host.block(&VMM_PLUGIN, "cloudinit", &options)
        .map_err(|error| format!("{error:#}"))
}

/// Submits a batch and returns the completions.
pub fn finish(queue: &mut BlockQueueHandle, batch: &mut Batch) -> Vec<(u64, i32)> {
    queue.submit(batch);
    let mut done = [BlockDone::default(); 64];
    let count = queue.reap(&mut done);
    done[..count].iter().map(|d| (d.token, d.result)).collect()
}

/// The whole disk, read in requests of up to 1 MiB, each in three odd pieces.
pub fn contents(host: &FakeHost, backend: &Backend) -> Vec<u8> {
    let block = backend.as_block().expect("block");
    let size = block.info().expect("info").bytes as usize;
    let mut queue = block.open_queue(8).expect("queue");
    let memory = host.memory();
    let mut batch = Batch::default();
    let mut bytes = vec![0; size];
    for (at, part) in (0..).step_by(MIB).zip(bytes.chunks_mut(MIB)) {
        let buffer = memory.writable(0, part.len() as u64).expect("RAM");
        let pieces = [
            buffer.part(0, 7),
            buffer.part(7, 400),
            buffer.part(407, part.len() - 407),
        ];
        batch.transfer(1, BlockOp::Read, at, &pieces);
        assert_eq!(finish(&mut queue, &mut batch), [(1, 0)]);
        buffer.read(0, part);
    }
    bytes
}

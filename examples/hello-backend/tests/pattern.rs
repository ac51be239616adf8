//! Plays the device, without a VM.

use hello_backend::VMM_PLUGIN;
use vmm_plugin_api::testing::FakeHost;
use vmm_plugin_api::{Batch, BlockDone, BlockOp, Result};

#[test]
fn every_word_holds_its_offset() -> Result<()> {
    let host = FakeHost::new(1 << 20);
    let memory = host.memory();
    let disk = host.block(
        &VMM_PLUGIN,
        "hello-pattern",
        &[("size", (1u64 << 30).into())],
    )?;
    let mut queue = disk.as_block()?.open_queue(4)?;
    let mut batch = Batch::default();
    // Two pieces that split a word.
    let pieces = [memory.writable(0, 1021)?, memory.writable(1021, 3075)?];
    batch.transfer(1, BlockOp::Read, 512 << 20, &pieces);
    batch.transfer(2, BlockOp::Read, 1 << 30, &pieces);
    batch.transfer(3, BlockOp::Write { fua: false }, 0, &pieces);
    assert_eq!(queue.submit(&mut batch), 3);
    let mut done = [BlockDone::default(); 4];
    assert_eq!(queue.reap(&mut done), 3);
    assert_eq!((done[0].token, done[0].result), (1, 0));
    assert_eq!((done[1].token, done[1].result), (2, -libc::EINVAL));
    assert_eq!((done[2].token, done[2].result), (3, -libc::EROFS));
    let mut bytes = [0; 4096];
    memory.read(0, &mut bytes)?;
    for (i, word) in (0u64..).zip(bytes.chunks_exact(8)) {
        assert_eq!(word, ((512 << 20) + i * 8).to_le_bytes());
    }
    Ok(())
}

#[test]
fn odd_sizes_are_refused() {
    let host = FakeHost::new(1 << 20);
    for size in [0u64, 1000] {
        let error = host
            .block(&VMM_PLUGIN, "hello-pattern", &[("size", size.into())])
            .err();
        assert!(error.is_some_and(|e| e.to_string().contains("multiple of 512")));
    }
}

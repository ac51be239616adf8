//! Runs what the fuzzers have kept: `fuzz/corpus` has a folder for each target.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests

use std::path::Path;

use vmm_plugin_api::abi::Root;
use vmm_plugin_api::testing::load;

fn replay(target: &str, run: fn(&'static Root, &[u8])) {
    let root = load(format!("vmm-plugin-{target}")).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let entries = std::fs::read_dir(&folder).unwrap();
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    for file in &files {
        let bytes = std::fs::read(file).unwrap();
        // Which one it was, if it fails.
        println!("{}", file.display());
        run(root, &bytes);
    }
}

#[test]
fn virtio_block_survives_what_has_been_kept() {
    replay("virtio-block", vmm_fuzz::virtio_block::run);
}

#[test]
fn nvme_survives_what_has_been_kept() {
    replay("nvme", vmm_fuzz::nvme::run);
}

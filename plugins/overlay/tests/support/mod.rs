//! A folder with a base and overlays over it, all from their plugins.

#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used)] // each test program uses its part

pub mod made;

use std::path::{Path, PathBuf};

use vmm_plugin_api::testing::{Backend, FakeHost, Value, load, run_control, run_transfer};
use vmm_plugin_api::{BlockOp, BlockQueueHandle};
use vmm_plugin_overlay::VMM_PLUGIN;

pub const MIB: u64 = 1 << 20;
pub const WRITE: BlockOp = BlockOp::Write { fua: false };
pub const FUA: BlockOp = BlockOp::Write { fua: true };

pub struct Setup {
    pub host: FakeHost,
    pub dir: tempfile::TempDir,
}

impl Setup {
    /// On the workspace's filesystem.
    pub fn new() -> Self {
        Self::within(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap()
    }

    pub fn within(parent: &Path) -> std::io::Result<Self> {
        Ok(Self {
            host: FakeHost::new(16 * MIB),
            dir: tempfile::tempdir_in(parent)?,
        })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An image of bytes that tell where they are.
    pub fn image(&self, name: &str, bytes: u64) -> Vec<u8> {
        let data = pattern(7, bytes as usize);
        std::fs::write(self.path(name), &data).unwrap();
        data
    }

    pub fn file(&self, name: &str, options: &[(&str, Value)]) -> Backend {
        let path = self.path(name);
        let defaults: [(&str, Value); 7] = [
            ("path", path.to_str().unwrap().into()),
            ("read_only", true.into()),
            ("block_size", 512u64.into()),
            ("workers", 3u64.into()),
            ("skip_flush", false.into()),
            ("direct", false.into()),
            ("discard", true.into()),
        ];
        let root = load("vmm-plugin-file").unwrap();
        self.host
            .block(root, "file", &merged(&defaults, options))
            .unwrap()
    }

    pub fn try_overlay(
        &self,
        base: &Backend,
        name: &str,
        options: &[(&str, Value)],
    ) -> Result<Backend, String> {
        let path = self.path(name);
        let defaults: [(&str, Value); 5] = [
            ("backing", base.into()),
            ("path", path.to_str().unwrap().into()),
            ("keep", true.into()),
            ("read_only", false.into()),
            ("workers", 3u64.into()),
        ];
        self.host
            .block(&VMM_PLUGIN, "overlay", &merged(&defaults, options))
            .map_err(|e| format!("{e:#}"))
    }

    pub fn overlay(&self, base: &Backend, name: &str) -> Backend {
        self.try_overlay(base, name, &[]).unwrap()
    }

    pub fn disk(&self, backend: &Backend) -> Disk {
        Disk {
            host: self.host.clone(),
            queue: backend.as_block().unwrap().open_queue(16).unwrap(),
        }
    }
}

pub fn merged<'a>(
    defaults: &[(&'a str, Value)],
    options: &[(&str, Value)],
) -> Vec<(&'a str, Value)> {
    let given = |key: &str| options.iter().find(|o| o.0 == key).map(|o| o.1.clone());
    defaults
        .iter()
        .map(|(key, value)| (*key, given(key).unwrap_or_else(|| value.clone())))
        .collect()
}

/// A queue and guest memory to read to and write from.
pub struct Disk {
    pub host: FakeHost,
    pub queue: BlockQueueHandle,
}

impl Disk {
    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let to = self.host.memory().writable(0, len as u64).unwrap();
        to.fill(0xee);
        assert_eq!(
            run_transfer(&mut self.queue, BlockOp::Read, offset, &[to]).unwrap(),
            0
        );
        let mut bytes = vec![0; len];
        to.read(0, &mut bytes);
        bytes
    }

    pub fn write(&mut self, op: BlockOp, offset: u64, bytes: &[u8]) -> i32 {
        let from = self.host.memory().writable(0, bytes.len() as u64).unwrap();
        from.write(0, bytes);
        run_transfer(&mut self.queue, op, offset, &[from]).unwrap()
    }

    pub fn control(&mut self, op: BlockOp, offset: u64, len: u64) -> i32 {
        run_control(&mut self.queue, op, offset, len).unwrap()
    }

    pub fn flush(&mut self) {
        assert_eq!(self.control(BlockOp::Flush, 0, 0), 0);
    }
}

/// Bytes that tell where they belong; no block is like its neighbour, none is zero.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| ((seed + 1) * 31 + i * 7 + (i >> 9) * 13) as u8 | 1)
        .collect()
}

/// Deterministic random numbers (xorshift64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

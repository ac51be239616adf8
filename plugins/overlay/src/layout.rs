//! How the overlay's file is laid out: a header, the map, and the data, each block at the same distance from the start of
//! the data as on the disk. What was not written are holes.

use anyhow::{Result, bail, ensure};
use vmm_plugin_api::BlockInfo;

use crate::map::{PAGE_BLOCKS, PAGE_BYTES};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 4096;
/// What the data is aligned to, so that large pages and extents of filesystems line up.
const DATA_ALIGNMENT: u64 = 1 << 20;
const MAGIC: [u8; 8] = *b"vmm-ovl\n";
const VERSION: u32 = 1;
/// Bytes of the header that its checksum covers.
const COVERED: usize = 48;

/// Where things are, for a base of a certain shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of the disk.
    pub bytes: u64,
    /// Bytes in a block, of which the map has a bit each.
    pub block: u32,
    /// Offset of the map.
    pub map: u64,
    /// Pages of the map.
    pub pages: u64,
    /// Offset of the data.
    pub data: u64,
}

impl Layout {
    /// For a base.
    pub fn new(base: &BlockInfo) -> Self {
        let blocks = base.bytes / u64::from(base.logical);
        let pages = blocks.div_ceil(PAGE_BLOCKS);
        let map = HEADER_BYTES as u64;
        Self {
            bytes: base.bytes,
            block: base.logical,
            map,
            pages,
            data: (map + pages * PAGE_BYTES as u64).next_multiple_of(DATA_ALIGNMENT),
        }
    }

    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.bytes / u64::from(self.block)
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.data + self.bytes
    }

    /// The header of an overlay over a base that [`crate::identity`] gives `identity`.
    pub fn header(&self, identity: u64) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            header[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&self.block.to_le_bytes());
        put(&self.bytes.to_le_bytes());
        put(&identity.to_le_bytes());
        put(&self.map.to_le_bytes());
        put(&self.data.to_le_bytes());
        let sum = hash(HASH_START, &header[..COVERED]);
        header[COVERED..COVERED + 8].copy_from_slice(&sum.to_le_bytes());
        header
    }

    /// Checks that `header` is that of an overlay over this base.
    ///
    /// # Errors
    /// It is no overlay, damaged, of another version, or over another base or one that has changed; the text goes on after the
    /// file's name.
    pub fn check(&self, identity: u64, header: &[u8; HEADER_BYTES]) -> Result<()> {
        ensure!(
            header.starts_with(&MAGIC),
            "is no overlay, and is left as it is; give `path` a name of its own"
        );
        let version = word32(header, 8);
        ensure!(
            version == VERSION,
            "is an overlay of version {version}; this vmm-host knows version {VERSION}"
        );
        ensure!(
            word64(header, COVERED) == hash(HASH_START, &header[..COVERED]),
            "is an overlay whose header is damaged"
        );
        let (block, bytes) = (word32(header, 12), word64(header, 16));
        if block != self.block {
            bail!(
                "was made over a disk with blocks of {block} bytes, not {}; give the base `block_size = {block}`",
                self.block
            );
        }
        if bytes != self.bytes {
            bail!(
                "was made over a disk of {bytes} bytes, but its base has {}: it is another base, or one that has been changed, and its blocks would not fit together",
                self.bytes
            );
        }
        ensure!(
            word64(header, 24) == identity,
            "was made over a disk with other contents: its base has been changed or replaced since, and its blocks would not fit together; restore the base, or start a new overlay with another `path`"
        );
        ensure!(
            (word64(header, 32), word64(header, 40)) == (self.map, self.data),
            "is an overlay with a layout that this vmm-host does not know"
        );
        Ok(())
    }
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// What [`hash`] starts with.
pub const HASH_START: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a with 64 bits, going on from `state`. It finds accidents; nobody is to be kept out by it.
pub fn hash(state: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(state, |state, byte| {
        (state ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

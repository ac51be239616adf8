//! How an image maps what the guest sees to what is in the file (qcow2 specification, "Cluster mapping").

/// Bit 63 of entries of L1 and L2: nobody else refers to what the entry names.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of entries of L2: a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of entries of L2, since version 3: the cluster reads as zeroes.
pub const ZERO: u64 = 1;
/// Where entries have an offset into the file.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Tables are read and written in pieces of at most this many bytes.
const SLICE: u64 = 4096;

/// The numbers that everything is computed from. They have been checked: a cluster has 512 bytes to 2 MiB.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Logarithm of the bytes in a cluster.
    pub cluster_bits: u32,
    /// The image's version is 3, which has clusters that read as zeroes.
    pub zero_flag: bool,
    /// Bytes that the guest sees.
    pub size: u64,
}

impl Geometry {
    /// Bytes in a cluster.
    pub fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// `offset` within its cluster.
    pub fn within(self, offset: u64) -> u64 {
        offset & (self.cluster() - 1)
    }

    /// Bytes of a table that are held as one piece.
    pub fn slice_bytes(self) -> u64 {
        self.cluster().min(SLICE)
    }

    /// Bytes of the disk that one L2 table maps.
    pub fn table_reach(self) -> u64 {
        self.cluster() / 8 * self.cluster()
    }

    /// Bytes of the disk that one piece of an L2 table maps.
    pub fn slice_reach(self) -> u64 {
        self.slice_bytes() / 8 * self.cluster()
    }

    /// Entries that the L1 table needs for the whole disk.
    pub fn l1_entries(self) -> u64 {
        self.size.div_ceil(self.table_reach())
    }

    /// Where in the L1 table the disk's byte `offset` is looked up.
    pub fn l1_index(self, offset: u64) -> usize {
        usize::try_from(offset / self.table_reach()).unwrap_or(usize::MAX)
    }

    /// In which piece of its L2 table, as bytes from the table's start, and at which entry there.
    pub fn l2_index(self, offset: u64) -> (u64, usize) {
        let in_table = offset % self.table_reach();
        let piece = in_table / self.slice_reach();
        let entry = (in_table % self.slice_reach()) >> self.cluster_bits;
        (piece * self.slice_bytes(), entry as usize)
    }
}

/// What an entry of an L2 table says about a cluster of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Nothing: the backing file shows through, or zeroes.
    Unallocated,
    /// Zeroes; a cluster of the file may be kept for it all the same.
    Zero {
        /// That cluster.
        host: Option<u64>,
    },
    /// A cluster of the file.
    Data {
        /// Its offset in the file.
        host: u64,
        /// Nobody else refers to it, so that it may be written to.
        owned: bool,
    },
    /// Compressed data.
    Compressed {
        /// Where it starts in the file.
        at: u64,
        /// The most bytes it can have.
        bytes: u64,
    },
}

impl Mapping {
    /// Reads an entry; the error says what is wrong with it.
    pub fn decode(entry: u64, geometry: Geometry) -> Result<Self, &'static str> {
        if entry & COMPRESSED != 0 {
            // The offset has the low bits, the number of further sectors those above ("Compressed Clusters Descriptor").
            let bits = 62 - (geometry.cluster_bits - 8);
            let at = entry & ((1 << bits) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> bits;
            return Ok(Self::Compressed {
                at,
                bytes: (sectors + 1) * 512 - at % 512,
            });
        }
        let host = entry & OFFSET;
        if geometry.within(host) != 0 {
            return Err("an offset inside of a cluster");
        }
        if entry & ZERO != 0 {
            if !geometry.zero_flag {
                return Err("the zero flag, which version 2 does not have");
            }
            let host = (host != 0).then_some(host);
            return Ok(Self::Zero { host });
        }
        if host == 0 {
            return Ok(Self::Unallocated);
        }
        let owned = entry & COPIED != 0;
        Ok(Self::Data { host, owned })
    }

    /// Whether a cluster with this mapping and the next with `next` can be read or written as one.
    pub fn continues(self, clusters: u64, next: Self, geometry: Geometry) -> bool {
        match (self, next) {
            (Self::Unallocated, Self::Unallocated) | (Self::Zero { .. }, Self::Zero { .. }) => true,
            (
                Self::Data { host, owned },
                Self::Data {
                    host: other,
                    owned: same,
                },
            ) => owned == same && host.checked_add(clusters * geometry.cluster()) == Some(other),
            _ => false,
        }
    }

    /// The clusters of the file that it refers to: offset of the first, number.
    pub fn clusters(self, geometry: Geometry) -> (u64, u64) {
        match self {
            Self::Unallocated | Self::Zero { host: None } => (0, 0),
            Self::Zero { host: Some(host) } | Self::Data { host, .. } => (host, 1),
            Self::Compressed { at, bytes } => {
                let first = at >> geometry.cluster_bits;
                let last = (at + bytes - 1) >> geometry.cluster_bits;
                (first << geometry.cluster_bits, last - first + 1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: Geometry = Geometry {
        cluster_bits: 16,
        zero_flag: true,
        size: 1 << 40,
    };

    #[test]
    fn entries_say_what_the_specification_says() {
        let decode = |entry| Mapping::decode(entry, G);
        assert_eq!(decode(0), Ok(Mapping::Unallocated));
        assert_eq!(decode(1), Ok(Mapping::Zero { host: None }));
        assert_eq!(
            decode(COPIED | 0x50001),
            Ok(Mapping::Zero {
                host: Some(0x50000)
            })
        );
        assert_eq!(
            decode(0x50000),
            Ok(Mapping::Data {
                host: 0x50000,
                owned: false
            })
        );
        assert_eq!(
            decode(COPIED | 0x50000),
            Ok(Mapping::Data {
                host: 0x50000,
                owned: true
            })
        );
        assert!(decode(0x50200).is_err());
        let old = Geometry {
            zero_flag: false,
            ..G
        };
        assert!(Mapping::decode(1, old).is_err());
        // 64 KiB clusters: the offset has 54 bits, the sectors 8.
        let compressed = decode(COMPRESSED | (3 << 54) | 0x5_0123).unwrap();
        assert_eq!(
            compressed,
            Mapping::Compressed {
                at: 0x5_0123,
                bytes: 4 * 512 - 0x123
            }
        );
        assert_eq!(compressed.clusters(G), (0x50000, 1));
    }

    #[test]
    fn the_highest_entries_overflow_nothing() {
        for cluster_bits in 9..=21 {
            for zero_flag in [false, true] {
                let geometry = Geometry {
                    cluster_bits,
                    zero_flag,
                    size: 1 << 60,
                };
                for entry in [
                    u64::MAX,
                    u64::MAX >> 1,
                    !ZERO,
                    !COMPRESSED,
                    OFFSET,
                    OFFSET | COPIED,
                ] {
                    let Ok(mapping) = Mapping::decode(entry, geometry) else {
                        continue;
                    };
                    let (_, count) = mapping.clusters(geometry);
                    assert!(count <= 3 || matches!(mapping, Mapping::Compressed { .. }));
                    assert!(!mapping.continues(
                        1,
                        Mapping::Data {
                            host: 0,
                            owned: true
                        },
                        geometry
                    ));
                }
            }
        }
    }
}

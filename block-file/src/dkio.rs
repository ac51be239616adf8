//! Requests to disk drivers, as illumos `sys/dkio.h` lays them out (dkio(4I)). Nothing here calls the kernel.

use std::mem::{offset_of, size_of};

/// Numbers of disk requests start here.
const DKIOC: i32 = 0x04 << 8;
/// Waits until the device's own cache is on stable storage. Takes no argument.
pub const DKIOCFLUSHWRITECACHE: i32 = DKIOC | 34;
/// Whether the device's cache keeps writes: an `int`.
pub const DKIOCGETWCE: i32 = DKIOC | 36;
/// Sets that: an `int`.
pub const DKIOCSETWCE: i32 = DKIOC | 37;
/// Size of the medium and its logical blocks: [`MediaInfo`].
pub const DKIOCGMEDIAINFO: i32 = DKIOC | 42;
/// The same with physical blocks: [`MediaInfoExt`].
pub const DKIOCGMEDIAINFOEXT: i32 = DKIOC | 48;
/// Frees ranges: [`FreeList`].
pub const DKIOCFREE: i32 = DKIOC | 50;
/// Whether [`DKIOCFREE`] does anything: an `int`.
pub const DKIOC_CANFREE: i32 = DKIOC | 60;

/// `struct dk_minfo`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MediaInfo {
    /// What kind of medium it is.
    pub media_type: u32,
    /// Bytes in a logical block.
    pub logical: u32,
    /// Logical blocks.
    pub capacity: u64,
}

/// `struct dk_minfo_ext`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MediaInfoExt {
    /// What [`DKIOCGMEDIAINFO`] gives.
    pub basic: MediaInfo,
    /// Bytes in a physical block.
    pub physical: u32,
}

/// `dkioc_free_list_ext_t`, in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeExtent {
    /// First byte, counted from the list's offset.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// `dkioc_free_list_t` with one extent: `DFL_SZ(1)` bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FreeList {
    /// 0: a later flush makes the freeing last; `DF_WAIT_SYNC` would wait for it now.
    pub flags: u64,
    /// Extents that follow; the driver refuses 0.
    pub count: u64,
    /// Added to the start of each extent.
    pub offset: i64,
    /// The one.
    pub extents: [FreeExtent; 1],
}

const _: () = assert!(size_of::<MediaInfo>() == 16);
const _: () = assert!(offset_of!(MediaInfo, logical) == 4);
const _: () = assert!(offset_of!(MediaInfo, capacity) == 8);
const _: () = assert!(size_of::<MediaInfoExt>() == 24);
const _: () = assert!(offset_of!(MediaInfoExt, physical) == 16);
const _: () = assert!(size_of::<FreeExtent>() == 16);
const _: () = assert!(offset_of!(FreeExtent, length) == 8);
const _: () = assert!(size_of::<FreeList>() == 40);
const _: () = assert!(offset_of!(FreeList, count) == 8);
const _: () = assert!(offset_of!(FreeList, offset) == 16);
const _: () = assert!(offset_of!(FreeList, extents) == 24);

impl MediaInfo {
    /// Bytes on the medium; `None` if the driver's numbers make no sense.
    pub fn bytes(&self) -> Option<u64> {
        self.capacity.checked_mul(u64::from(self.logical))
    }

    /// Logical and physical block size for a driver that tells the logical one only.
    pub fn blocks(&self) -> Option<(u32, u32)> {
        self.logical
            .is_power_of_two()
            .then_some((self.logical, self.logical))
    }
}

impl MediaInfoExt {
    /// Logical and physical block size. A driver that does not know the physical one leaves it 0.
    pub fn blocks(&self) -> Option<(u32, u32)> {
        let (logical, same) = self.basic.blocks()?;
        let physical = self.physical;
        let told = physical.is_power_of_two() && physical >= logical;
        Some((logical, if told { physical } else { same }))
    }
}

impl FreeList {
    /// For `length` bytes from `start` on. Drivers round it to what their devices can free, always to the inside.
    pub fn new(start: u64, length: u64) -> Self {
        Self {
            flags: 0,
            count: 1,
            offset: 0,
            extents: [FreeExtent { start, length }],
        }
    }
}

/// The part of a range that F_FREESP may be asked for in a file of `size` bytes: offset and length. Two of its cases are traps: a length
/// of 0 cuts the file off, and a range that reaches behind the end makes the file longer, which would hide that it had been cut.
pub fn freeable(offset: u64, len: u64, size: u64) -> Option<(i64, i64)> {
    let end = offset.checked_add(len)?.min(size);
    let len = end.checked_sub(offset).filter(|len| *len > 0)?;
    Some((i64::try_from(offset).ok()?, i64::try_from(len).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_one_extent() {
        let list = FreeList::new(1 << 20, 4096);
        assert_eq!((list.flags, list.count, list.offset), (0, 1, 0));
        let (start, length) = (1 << 20, 4096);
        assert_eq!(list.extents, [FreeExtent { start, length }]);
    }

    #[test]
    fn request_numbers() {
        assert_eq!(DKIOCFLUSHWRITECACHE, 0x422);
        assert_eq!((DKIOCGETWCE, DKIOCSETWCE), (0x424, 0x425));
        assert_eq!((DKIOCGMEDIAINFO, DKIOCGMEDIAINFOEXT), (0x42a, 0x430));
        assert_eq!((DKIOCFREE, DKIOC_CANFREE), (0x432, 0x43c));
    }

    #[test]
    fn freeing_never_cuts_or_grows_a_file() {
        assert_eq!(freeable(0, 512, 4096), Some((0, 512)));
        assert_eq!(freeable(4096, 4096, 8192), Some((4096, 4096)));
        assert_eq!(freeable(4096, 4096, 5000), Some((4096, 904)));
        assert_eq!(freeable(4096, 4096, 4096), None);
        assert_eq!(freeable(4096, 0, 8192), None);
        assert_eq!(freeable(8192, 4096, 4096), None);
        assert_eq!(freeable(u64::MAX, 2, u64::MAX), None);
        assert_eq!(freeable(1 << 63, 2, u64::MAX), None);
    }

    #[test]
    fn block_sizes_that_drivers_tell() {
        let media = |logical, physical, capacity| MediaInfoExt {
            basic: MediaInfo {
                media_type: 0,
                logical,
                capacity,
            },
            physical,
        };
        assert_eq!(media(512, 8192, 0).blocks(), Some((512, 8192)));
        assert_eq!(media(4096, 0, 0).blocks(), Some((4096, 4096)));
        assert_eq!(media(4096, 512, 0).blocks(), Some((4096, 4096)));
        assert_eq!(media(0, 512, 0).blocks(), None);
        assert_eq!(media(520, 520, 0).blocks(), None);
        assert_eq!(media(512, 0, 2048).basic.bytes(), Some(1 << 20));
        assert_eq!(media(4096, 0, u64::MAX).basic.bytes(), None);
    }
}

//! Guest RAM: where it lies in the guest's physical address space and in ours, and safe access to it.
//!
//! RAM below 3 GiB is one region, the rest starts at 4 GiB. Plugins get the host pointers, and the file that both regions
//! are parts of if there is one. The host itself touches guest memory only here, with volatile, bounds-checked copies: a
//! guest changes it at any time.
#![allow(unsafe_code)] // hands the mapped ranges to vm-memory, and views the dirty bitmap as atomics

mod sparse;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::hypervisor::backing::{self, Backing, Mapping, Opened};

/// RAM below 4 GiB ends here at the latest: above are PCI windows, interrupt controllers and firmware.
pub const LOW_END: u64 = 3 << 30;
/// RAM that doesn't fit below [`LOW_END`] goes on here.
pub const HIGH_START: u64 = 4 << 30;
/// A PC keeps tables here, a few pages of which are ever touched, and a start waits for each large page that has to be zeroed.
const FIRST: usize = 2 << 20;
/// Guest page size, and what one bit of the dirty bitmap stands for.
pub const PAGE: u64 = 4096;

/// One contiguous range of guest RAM.
#[derive(Debug)]
pub struct Region {
    /// Guest physical address of the first byte; a multiple of 2 MiB.
    pub gpa: u64,
    /// Length in bytes; a multiple of 4 KiB.
    pub len: u64,
    /// Where the region starts in [`GuestMemory::fd`], if there is such a file.
    pub offset: u64,
    mapping: Mapping,
    dirty: Mapping,
}

impl Region {
    /// Host address of the first byte, congruent with the guest address modulo 2 MiB; valid as long as the
    /// [`GuestMemory`] lives. Access it with volatile or atomic operations only.
    pub fn host(&self) -> NonNull<u8> {
        self.mapping.pointer()
    }

    /// The dirty bitmap: bit `n % 64` of word `n / 64` is page `n` of the region, set by whoever writes to the page
    /// on a device's behalf while [`GuestMemory::tracking`] is not 0. Backed lazily: all zeros until touched.
    pub fn dirty(&self) -> &[AtomicU64] {
        let words = (self.len / PAGE).div_ceil(64) as usize;
        // SAFETY: the mapping holds `words` zero-initialised, page-aligned u64 (see `region`), lives as long as
        // `self`, and is only ever accessed through atomics.
        unsafe { std::slice::from_raw_parts(self.dirty.pointer().as_ptr().cast(), words) }
    }

    fn contains(&self, gpa: u64) -> bool {
        gpa >= self.gpa && gpa - self.gpa < self.len
    }
}

/// All RAM of one VM.
#[derive(Debug)]
pub struct GuestMemory {
    // The view borrows the regions' mappings by address: it is declared first and so dropped first.
    view: GuestMemoryMmap<()>,
    regions: Vec<Region>,
    fd: Option<OwnedFd>,
    /// Pages stay allocated when they are zeroed.
    keep: bool,
    tracking: AtomicU32,
}

/// Where RAM of `bytes` lies: guest address, length and offset in the backing file of each region.
pub fn layout(bytes: u64) -> Vec<(u64, u64, u64)> {
    let low = bytes.min(LOW_END);
    let mut ranges = vec![(0, low, 0)];
    if bytes > low {
        ranges.push((HIGH_START, bytes - low, low));
    }
    ranges
}

/// Checks a VM's memory size before anything is created.
///
/// # Errors
/// 0, no multiple of 4 KiB, or more than this machine has. The text says both figures.
pub fn check_size(bytes: u64) -> Result<()> {
    ensure!(
        bytes != 0,
        "Guest memory is 0 bytes: give the VM some, for instance memory = \"512M\""
    );
    ensure!(
        bytes.is_multiple_of(PAGE),
        "Guest memory of {bytes} bytes is not a multiple of 4 KiB"
    );
    if let Some(total) = machine_memory()
        && bytes > total
    {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        bail!(
            "Guest memory of {} MiB is more than the {} MiB this machine has",
            mib(bytes),
            total >> 20
        );
    }
    Ok(())
}

fn machine_memory() -> Option<u64> {
    // SAFETY: sysconf reads numbers and touches nothing of ours.
    let (pages, page) = unsafe {
        (
            libc::sysconf(libc::_SC_PHYS_PAGES),
            libc::sysconf(libc::_SC_PAGESIZE),
        )
    };
    // -1 stands for "unknown".
    let (pages, page) = (u64::try_from(pages).ok()?, u64::try_from(page).ok()?);
    (pages != 0).then(|| pages.saturating_mul(page))
}

impl GuestMemory {
    /// RAM of `bytes`, all zeros. No page is allocated before it is touched.
    ///
    /// # Errors
    /// As [`check_size`], or out of address space.
    pub fn new(bytes: u64) -> Result<Self> {
        Self::with(bytes, &Backing::default())
    }

    /// RAM of `bytes`, all zeros, made of what `backing` says.
    ///
    /// # Errors
    /// As [`check_size`] and [`backing::open`], or out of address space or descriptors.
    pub fn with(bytes: u64, backing: &Backing) -> Result<Self> {
        check_size(bytes)?;
        let opened = backing::open(backing, bytes)?;
        let regions = layout(bytes).into_iter();
        let regions = regions.map(|range| region(&opened, range));
        let memory = Self::of(regions.collect::<Result<_>>()?, opened)?;
        if backing.prefault {
            for region in &memory.regions {
                region.mapping.populate()?;
            }
        }
        Ok(memory)
    }

    /// RAM of `bytes`, all zeros, which a hypervisor has made: `mappings` are the ranges of [`layout`]. It stays allocated.
    ///
    /// # Errors
    /// They are of other lengths, or out of address space.
    pub fn mapped(bytes: u64, mappings: Vec<Mapping>) -> Result<Self> {
        let ranges = layout(bytes);
        ensure!(
            ranges.len() == mappings.len(),
            "Guest memory of {} ranges is mapped in {}",
            ranges.len(),
            mappings.len()
        );
        let regions = ranges
            .into_iter()
            .zip(mappings)
            .map(|(range, mapping)| mapped_region(range, mapping))
            .collect::<Result<_>>()?;
        let opened = Opened {
            fd: None,
            align: backing::ALIGNMENT,
            keep: true,
        };
        Self::of(regions, opened)
    }

    /// RAM of these regions, which lie in what was opened.
    fn of(regions: Vec<Region>, opened: Opened) -> Result<Self> {
        let mut views = Vec::with_capacity(regions.len());
        for region in &regions {
            // SAFETY: the mapping is readable and writable for its whole length, and outlives the view, which
            // `GuestMemory` drops first. vm-memory doesn't unmap regions that it did not map.
            let raw = unsafe {
                MmapRegion::build_raw(
                    region.host().as_ptr(),
                    region.len as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_NORESERVE,
                )
            }?;
            views.push(
                GuestRegionMmap::new(raw, GuestAddress(region.gpa))
                    .context("Guest memory passes 2^64")?,
            );
        }
        let view = GuestMemoryMmap::from_regions(views).context("Guest memory regions overlap")?;
        Ok(Self {
            view,
            regions,
            fd: opened.fd,
            keep: opened.keep,
            tracking: AtomicU32::new(0),
        })
    }

    /// The regions, by ascending guest address. They never change while the VM lives.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The file that all regions lie in, if they lie in one. To be mapped `MAP_SHARED` by those who need it in another
    /// process.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Total RAM in bytes.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    /// End of the RAM below 4 GiB: the first guest address past it.
    pub fn low_end(&self) -> u64 {
        self.regions
            .iter()
            .filter(|region| region.gpa < HIGH_START)
            .map(|region| region.gpa + region.len)
            .max()
            .unwrap_or(0)
    }

    /// End of the RAM above 4 GiB, if there is any.
    pub fn high_end(&self) -> Option<u64> {
        self.regions
            .iter()
            .filter(|region| region.gpa >= HIGH_START)
            .map(|region| region.gpa + region.len)
            .max()
    }

    /// Not 0 while writers have to mark pages in [`Region::dirty`].
    pub fn tracking(&self) -> &AtomicU32 {
        &self.tracking
    }

    /// The same memory for crates that speak vm-memory. Writes through it are not tracked.
    pub fn view(&self) -> &GuestMemoryMmap<()> {
        &self.view
    }

    /// Copies guest memory into `into`.
    ///
    /// # Errors
    /// Part of the range is not RAM; `into` may then be partly filled.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<()> {
        self.view
            .read_slice(into, GuestAddress(gpa))
            .with_context(|| not_ram(gpa, into.len()))
    }

    /// Copies `from` into guest memory.
    ///
    /// # Errors
    /// Part of the range is not RAM; what lies in RAM may then be written.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<()> {
        self.mark_dirty(gpa, from.len() as u64);
        self.view
            .write_slice(from, GuestAddress(gpa))
            .with_context(|| not_ram(gpa, from.len()))
    }

    /// Reads one plain value.
    ///
    /// # Errors
    /// Not all of it is RAM.
    pub fn read_object<T: ByteValued>(&self, gpa: u64) -> Result<T> {
        self.view
            .read_obj(GuestAddress(gpa))
            .with_context(|| not_ram(gpa, size_of::<T>()))
    }

    /// Writes one plain value.
    ///
    /// # Errors
    /// Not all of it is RAM.
    pub fn write_object<T: ByteValued>(&self, gpa: u64, value: T) -> Result<()> {
        self.mark_dirty(gpa, size_of::<T>() as u64);
        self.view
            .write_obj(value, GuestAddress(gpa))
            .with_context(|| not_ram(gpa, size_of::<T>()))
    }

    /// Sets the dirty bits of a range if tracking is on; what is not RAM is skipped.
    pub fn mark_dirty(&self, gpa: u64, len: u64) {
        if self.tracking.load(Ordering::Acquire) == 0 || len == 0 {
            return;
        }
        let end = gpa.saturating_add(len);
        for region in &self.regions {
            let (from, to) = (gpa.max(region.gpa), end.min(region.gpa + region.len));
            if from >= to {
                continue;
            }
            for page in (from - region.gpa) / PAGE..=(to - 1 - region.gpa) / PAGE {
                region.dirty()[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::AcqRel);
            }
        }
    }

    /// Whether all of a range is RAM of one region.
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        self.regions
            .iter()
            .any(|region| region.contains(gpa) && len <= region.len - (gpa - region.gpa))
    }

    /// Zeroes a range and gives its whole pages back if they may go, for a restart. No vCPU and no device may use it meanwhile.
    ///
    /// # Errors
    /// Not all of it is RAM of one region, or the system refused.
    pub fn zero(&self, gpa: u64, len: u64) -> Result<()> {
        let region = self
            .regions
            .iter()
            .find(|region| region.contains(gpa) && len <= region.len - (gpa - region.gpa));
        let Some(region) = region else {
            bail!(not_ram(gpa, usize::try_from(len)?));
        };
        self.mark_dirty(gpa, len);
        let end = gpa + len;
        let (first, last) = (gpa.next_multiple_of(PAGE), end & !(PAGE - 1));
        if first >= last {
            return self.write(gpa, &vec![0; usize::try_from(len)?]);
        }
        self.write(gpa, &vec![0; usize::try_from(first - gpa)?])?;
        self.write(last, &vec![0; usize::try_from(end - last)?])?;
        let from = usize::try_from(first - region.gpa)?;
        let bytes = usize::try_from(last - first)?;
        region.mapping.zero(from, bytes, self.keep)
    }
}

fn region(opened: &Opened, range: (u64, u64, u64)) -> Result<Region> {
    let (gpa, len, offset) = range;
    let bytes = usize::try_from(len)?;
    let mapping = match &opened.fd {
        Some(fd) => Mapping::shared(fd.as_fd(), offset, bytes, opened.align)?,
        None => Mapping::private(bytes)?,
    };
    if gpa == 0 {
        mapping.advise_small(FIRST);
    }
    mapped_region(range, mapping)
}

fn mapped_region((gpa, len, offset): (u64, u64, u64), mapping: Mapping) -> Result<Region> {
    ensure!(
        mapping.len() as u64 == len,
        "Guest memory of {len} bytes at {gpa:#x} is mapped as {}",
        mapping.len()
    );
    let dirty = Mapping::anonymous((len / PAGE).div_ceil(64) as usize * 8)?;
    Ok(Region {
        gpa,
        len,
        offset,
        mapping,
        dirty,
    })
}

fn not_ram(gpa: u64, len: usize) -> String {
    format!(
        "Guest memory {gpa:#x}..{:#x} is not all RAM",
        gpa.saturating_add(len as u64)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::backing::Source;

    #[test]
    fn sizes_are_checked() {
        assert!(check_size(0).unwrap_err().to_string().contains("0 bytes"));
        assert!(check_size(4097).unwrap_err().to_string().contains("4 KiB"));
        let error = check_size(1 << 50).unwrap_err().to_string();
        assert!(
            error.contains("1073741824 MiB") && error.contains("this machine has"),
            "{error}"
        );
        assert!(check_size(1 << 20).is_ok());
    }

    #[test]
    fn memory_of_a_hypervisor_has_the_lengths_of_the_layout() {
        let mapping = |len| Mapping::private(len).unwrap();
        let memory = GuestMemory::mapped(4 << 20, vec![mapping(4 << 20)]).unwrap();
        assert!(memory.fd().is_none() && memory.bytes() == 4 << 20);
        zero_and_compare(&memory);
        for wrong in [
            vec![],
            vec![mapping(2 << 20)],
            vec![mapping(4 << 20), mapping(4096)],
        ] {
            assert!(GuestMemory::mapped(4 << 20, wrong).is_err());
        }
    }

    #[test]
    fn high_memory_starts_at_4_gib() {
        assert_eq!(layout(1 << 30), [(0, 1 << 30, 0)]);
        assert_eq!(
            layout(5 << 30),
            [(0, 3 << 30, 0), (4 << 30, 2 << 30, 3 << 30)]
        );
    }

    #[test]
    fn addresses_are_congruent_and_bounds_hold() {
        let memory = GuestMemory::new(3 << 20).unwrap();
        let region = &memory.regions()[0];
        assert_eq!(region.host().as_ptr() as usize % backing::ALIGNMENT, 0);
        memory.write(0x1000, b"hello").unwrap();
        let mut back = [0; 5];
        memory.read(0x1000, &mut back).unwrap();
        assert_eq!(&back, b"hello");
        memory.write_object((3 << 20) - 8, 7u64).unwrap();
        let error = memory
            .write_object((3 << 20) - 4, 7u64)
            .unwrap_err()
            .to_string();
        assert!(error.contains("is not all RAM"), "{error}");
        assert!(memory.read(u64::MAX - 2, &mut back).is_err());
        assert!(
            memory.contains(0, 3 << 20)
                && !memory.contains(1, 3 << 20)
                && !memory.contains(u64::MAX, 2)
        );
    }

    /// Of anonymous memory and of a file, whose pages are given back, and of pages that stay.
    #[test]
    fn zero_ends_at_its_bounds() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| Source::File(directory.path().join(name));
        for (source, prefault) in [
            (Source::Anonymous, false),
            (Source::Anonymous, true),
            (file("a"), false),
            (file("b"), true),
        ] {
            let backing = Backing { source, prefault };
            let memory = GuestMemory::with(4 << 20, &backing).unwrap();
            zero_and_compare(&memory);
        }
    }

    fn zero_and_compare(memory: &GuestMemory) {
        let fill = vec![0xa5; 0x5000];
        for (start, len) in [
            (0x20_0000, 0x5000),
            (0x20_0ff8, 0x2010),
            (0x20_0010, 0x20),
            (0x20_0ffc, 8),
        ] {
            memory.write(0x20_0000, &fill).unwrap();
            memory.zero(start, len).unwrap();
            let mut bytes = vec![0; fill.len()];
            memory.read(0x20_0000, &mut bytes).unwrap();
            for (at, byte) in (0x20_0000..).zip(bytes) {
                let inside = (start..start + len).contains(&at);
                assert_eq!(
                    byte,
                    if inside { 0 } else { 0xa5 },
                    "{at:#x} of {start:#x}+{len:#x}"
                );
            }
        }
        assert!(memory.zero((4 << 20) - 8, 16).is_err());
        assert!(memory.zero(u64::MAX, 16).is_err());
    }

    #[test]
    fn a_memory_file_starts_empty_and_keeps_what_the_guest_wrote() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ram");
        let backing = Backing {
            source: Source::File(path.clone()),
            prefault: false,
        };
        let written =
            |bytes: &[u8]| u32::from_le_bytes(bytes[0x20_0000..][..4].try_into().unwrap());
        for value in [0x1122_3344_u32, 5] {
            let memory = GuestMemory::with(4 << 20, &backing).unwrap();
            assert_eq!(memory.read_object::<u32>(0x20_0000).unwrap(), 0);
            memory.write_object(0x20_0000, value).unwrap();
            let second = format!("{:#}", GuestMemory::with(4 << 20, &backing).unwrap_err());
            assert!(second.contains("that of another VM"), "{second}");
            drop(memory);
            assert_eq!(written(&std::fs::read(&path).unwrap()), value);
        }
        let other = format!("{:#}", GuestMemory::with(8 << 20, &backing).unwrap_err());
        assert!(other.contains("has 4194304 bytes"), "{other}");
        assert_eq!(written(&std::fs::read(&path).unwrap()), 5, "not its file");
    }

    #[test]
    fn writes_mark_pages_only_while_tracked() {
        let memory = GuestMemory::new(4 << 20).unwrap();
        memory.write_object(0x3000, 1u8).unwrap();
        assert_eq!(memory.regions()[0].dirty()[0].load(Ordering::Relaxed), 0);
        memory.tracking().store(1, Ordering::Release);
        memory.write_object(0x3fff, 1u16).unwrap();
        memory.mark_dirty(65 * PAGE, 1);
        let words = memory.regions()[0].dirty();
        assert_eq!(words[0].load(Ordering::Relaxed), 0b11000);
        assert_eq!(words[1].load(Ordering::Relaxed), 0b10);
        assert_eq!(words.len(), 16);
    }
}

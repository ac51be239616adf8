//! Segments: what guest memory and ROMs are made of, where the guest sees them, and how this process does.
//!
//! RAM is seen through the guest's own addresses, so that the driver's dirty bits know what devices write. A ROM is seen as the
//! segment that it is, which can be written and stays when it is out of the guest's sight.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::abi::*;
use super::driver::Driver;
use super::node::{self, Node};
use super::reservoir;
use crate::hypervisor::backing::{ALIGNMENT, Backing, Mapping, Source};
use crate::hypervisor::rom::{self, Rom};
use crate::memory::{self, GuestMemory, PAGE};

/// How the VM is to be created for such RAM.
pub(super) fn create_flags(backing: &Backing) -> Result<u64> {
    match &backing.source {
        Source::Anonymous => Ok(0),
        Source::Reservoir => Ok(VCF_RESERVOIR_MEM),
        Source::Huge(size) => bail!(
            "bhyve makes guest memory itself, of large pages where it finds them: leave out hugepages (pages of {size}) from [main]"
        ),
        Source::File(path) => bail!(
            "bhyve makes guest memory itself, and it lies in no file: leave out memory_file ({}) from [main]",
            path.display()
        ),
    }
}

/// Makes RAM of `bytes`, a size that was checked, and maps it into the guest and here.
pub(super) fn create_ram<D: Driver>(
    driver: &D,
    node: &Node,
    bytes: u64,
    backing: &Backing,
) -> Result<GuestMemory> {
    let mut mappings = Vec::new();
    for (segid, (gpa, len, _)) in (0..).zip(memory::layout(bytes)) {
        allocate(node, segid, len, "")
            .map_err(|error| no_memory(driver, &error, bytes, backing))?;
        map_segment(node, segid, gpa, len, PROT_READ | PROT_WRITE | PROT_EXEC)?;
        let len = usize::try_from(len)?;
        let (fd, offset) = node
            .file(gpa, len)
            .with_context(|| format!("Guest memory at {gpa:#x} can't be seen"))?;
        mappings.push(Mapping::shared(fd, offset, len, ALIGNMENT)?);
    }
    let memory = GuestMemory::mapped(bytes, mappings)?;
    if backing.prefault {
        touch(&memory)?;
    }
    Ok(memory)
}

/// Has the driver allocate each page: a read of a page that is not there does.
fn touch(memory: &GuestMemory) -> Result<()> {
    for region in memory.regions() {
        for gpa in (region.gpa..region.gpa + region.len).step_by(PAGE as usize) {
            memory.read_object::<u8>(gpa)?;
        }
    }
    Ok(())
}

fn allocate(node: &Node, segid: i32, len: u64, name: &str) -> io::Result<()> {
    let mut request = VmMemseg {
        segid,
        len: len as usize,
        ..Default::default()
    };
    for (to, from) in request.name.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    node.request(&node::ALLOC_MEMSEG, &mut request).map(drop)
}

fn no_memory<D: Driver>(
    driver: &D,
    error: &io::Error,
    bytes: u64,
    backing: &Backing,
) -> anyhow::Error {
    let mib = bytes >> 20;
    if error.raw_os_error() != Some(libc::ENOMEM) {
        return anyhow!("bhyve refused {mib} MiB of guest memory: {error}");
    }
    let figures = match reservoir::query_by(driver) {
        Ok(reservoir) => format!("{reservoir}: "),
        Err(_) => String::new(),
    };
    let remedy = match backing.source {
        Source::Reservoir => {
            "enlarge the reservoir, stop another VM of it, lower `memory`, or leave out `use_reservoir`"
        }
        _ => "stop another VM, shrink the reservoir, or lower `memory`",
    };
    anyhow!("bhyve has no {mib} MiB for the guest: {figures}{remedy}")
}

fn map_segment(node: &Node, segid: i32, gpa: u64, len: u64, prot: i32) -> Result<()> {
    let mut request = VmMemmap {
        gpa,
        segid,
        len: len as usize,
        prot,
        ..Default::default()
    };
    node.request(&node::MMAP_MEMSEG, &mut request)
        .with_context(|| {
            format!(
                "bhyve refused {len:#x} bytes at guest address {gpa:#x}: is something else there?"
            )
        })?;
    Ok(())
}

/// The ROMs of a VM.
pub(super) struct Roms {
    /// Segments of its RAM, whose numbers come first.
    ram: usize,
    slots: Mutex<Vec<Slot>>,
}

struct Slot {
    rom: Arc<Rom>,
    shown: bool,
}

impl Roms {
    pub(super) fn new(ram: usize) -> Self {
        Self {
            ram,
            slots: Mutex::default(),
        }
    }

    /// Makes one and shows it.
    pub(super) fn create(&self, node: &Node, gpa: u64, len: u64) -> Result<Arc<Rom>> {
        rom::check(gpa, len)?;
        let mut slots = self.lock();
        let number = self.ram + slots.len();
        // One mapping each, so that the limit of mappings, which is higher, is kept too.
        ensure!(
            number < SEGMENTS_MAX,
            "bhyve has {SEGMENTS_MAX} segments per VM, of which RAM takes {}: there is no room for another ROM, at {gpa:#x}",
            self.ram
        );
        let segid = i32::try_from(number)?;
        let name = match slots.len() {
            0 => "bootrom".to_owned(),
            other => format!("rom{other}"),
        };
        allocate(node, segid, len, &name)
            .with_context(|| format!("bhyve refused {len} bytes for a ROM at {gpa:#x}"))?;
        let mut request = VmDevmemOffset { segid, offset: 0 };
        node.request(&node::DEVMEM_GETOFFSET, &mut request)
            .context("bhyve does not tell where a ROM can be mapped")?;
        let size = usize::try_from(len)?;
        let (fd, offset) = node
            .file(u64::try_from(request.offset)?, size)
            .with_context(|| format!("The ROM at {gpa:#x} can't be seen"))?;
        let rom = Rom::new(gpa, Mapping::shared(fd, offset, size, ALIGNMENT)?);
        let rom = Arc::new(rom);
        map_segment(node, segid, gpa, len, PROT_READ | PROT_EXEC)?;
        slots.push(Slot {
            rom: Arc::clone(&rom),
            shown: true,
        });
        Ok(rom)
    }

    pub(super) fn show(&self, node: &Node, rom: &Rom, shown: bool) -> Result<()> {
        let mut slots = self.lock();
        let known = slots
            .iter()
            .position(|slot| std::ptr::eq(Arc::as_ptr(&slot.rom), rom))
            .context("It is no ROM of this VM")?;
        if slots[known].shown == shown {
            return Ok(());
        }
        if shown {
            self.map(node, rom, known)?;
        } else {
            let mut request = VmMunmap {
                gpa: rom.gpa(),
                len: usize::try_from(rom.len())?,
            };
            node.request(&node::MUNMAP_MEMSEG, &mut request)
                .with_context(|| format!("bhyve refused to hide the ROM at {:#x}", rom.gpa()))?;
        }
        slots[known].shown = shown;
        Ok(())
    }

    /// After `VM_REINIT`, which keeps the segments but takes all that have names out of the guest's sight.
    pub(super) fn show_again(&self, node: &Node) -> Result<()> {
        let slots = self.lock();
        let shown = slots.iter().enumerate().filter(|(_, slot)| slot.shown);
        shown
            .into_iter()
            .try_for_each(|(index, slot)| self.map(node, &slot.rom, index))
    }

    /// The ROM that shows at `gpa`.
    pub(super) fn at(&self, gpa: u64) -> Option<Arc<Rom>> {
        let slots = self.lock();
        let found = slots.iter().find(|slot| {
            slot.shown && gpa >= slot.rom.gpa() && gpa - slot.rom.gpa() < slot.rom.len()
        });
        found.map(|slot| Arc::clone(&slot.rom))
    }

    fn map(&self, node: &Node, rom: &Rom, index: usize) -> Result<()> {
        let segid = i32::try_from(self.ram + index)?;
        map_segment(node, segid, rom.gpa(), rom.len(), PROT_READ | PROT_EXEC)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::backing::HugePage;

    #[test]
    fn memory_is_bhyves_own() {
        let flags = |source| {
            create_flags(&Backing {
                source,
                prefault: false,
            })
        };
        assert_eq!(flags(Source::Anonymous).unwrap(), 0);
        assert_eq!(flags(Source::Reservoir).unwrap(), VCF_RESERVOIR_MEM);
        let huge = flags(Source::Huge(HugePage::Size2M)).unwrap_err();
        assert!(huge.to_string().contains("leave out hugepages"), "{huge}");
        let file = flags(Source::File("/ram".into())).unwrap_err();
        assert!(
            file.to_string().contains("leave out memory_file (/ram)"),
            "{file}"
        );
    }
}

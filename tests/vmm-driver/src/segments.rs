//! Memory segments, their places in the guest, and what a host maps of them.
#![allow(unsafe_code)] // tells KVM where guest memory lies

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, OnceLock};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags};
use vmm_host::hypervisor::bhyve::abi::*;

use crate::argument::name;
use crate::machine::Machine;
use crate::{control, errno, lock};

const PAGE: u64 = 4096;

struct Segment {
    len: u64,
    name: String,
    file: OwnedFd,
    /// The same, for views of maps that the guest can't write.
    read_only: OwnedFd,
    start: u64,
    reservoir: bool,
}

impl Drop for Segment {
    fn drop(&mut self) {
        control::give(self.len as usize, self.reservoir);
    }
}

struct Map {
    gpa: u64,
    len: u64,
    segment: usize,
    offset: u64,
    prot: i32,
    slot: u32,
    host: NonNull<u8>,
}

// SAFETY: `host` is only handed to KVM and unmapped.
unsafe impl Send for Map {}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: KVM no longer has the slot, or the VM is gone with it; nothing else knows this mapping.
        let _ = unsafe { rustix::mm::munmap(self.host.as_ptr().cast(), self.len as usize) };
    }
}

#[derive(Default)]
pub struct Memory {
    segments: [OnceLock<Segment>; SEGMENTS_MAX],
    /// Where the next segment's view begins.
    next: Mutex<u64>,
    maps: Mutex<Vec<Map>>,
}

impl Machine {
    pub fn alloc_memseg(&self, request: &VmMemseg) -> io::Result<()> {
        let _frozen = self.freeze();
        let len = request.len as u64;
        let slot = self.segment_slot(request.segid)?;
        if let Some(known) = slot.get() {
            let number = if known.len == len {
                libc::EEXIST
            } else {
                libc::EINVAL
            };
            return Err(self.misuse(number, &format!("segment {} again", request.segid)));
        }
        let name = name(&request.name)
            .ok_or_else(|| self.misuse(libc::EINVAL, "a segment's name without an end"))?;
        if len == 0 || !len.is_multiple_of(PAGE) {
            return Err(self.misuse(libc::EINVAL, &format!("a segment of {len} bytes")));
        }
        let reservoir = self.flags & VCF_RESERVOIR_MEM != 0;
        control::take(request.len, reservoir)?;
        let made = self.make(name, len, reservoir);
        let segment = made.inspect_err(|_| control::give(request.len, reservoir))?;
        slot.get_or_init(|| segment);
        Ok(())
    }

    fn make(&self, name: String, len: u64, reservoir: bool) -> io::Result<Segment> {
        let file = rustix::fs::memfd_create("segment", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, len)?;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let read_only = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut next = lock(&self.memory.next);
        let start = DEVMEM_START + *next;
        *next += len;
        Ok(Segment {
            len,
            name,
            file,
            read_only,
            start,
            reservoir,
        })
    }

    fn segment_slot(&self, id: i32) -> io::Result<&OnceLock<Segment>> {
        let slot = usize::try_from(id)
            .ok()
            .and_then(|id| self.memory.segments.get(id));
        slot.ok_or_else(|| self.misuse(libc::EINVAL, &format!("there is no segment id {id}")))
    }

    fn segment(&self, id: i32) -> io::Result<&Segment> {
        let segment = self.segment_slot(id)?.get();
        segment.ok_or_else(|| self.misuse(libc::EINVAL, &format!("segment {id} is not allocated")))
    }

    pub fn get_memseg(&self, request: &mut VmMemseg) -> io::Result<()> {
        request.len = 0;
        request.name = [0; 128];
        if let Some(segment) = self.segment_slot(request.segid)?.get() {
            request.len = segment.len as usize;
            request.name[..segment.name.len()].copy_from_slice(segment.name.as_bytes());
        }
        Ok(())
    }

    pub fn mmap_memseg(&self, request: &VmMemmap) -> io::Result<()> {
        let _frozen = self.freeze();
        let (gpa, len) = (request.gpa, request.len as u64);
        let bad = |what: &str| Err(self.misuse(libc::EINVAL, &format!("map at {gpa:#x}: {what}")));
        if request.prot & !(PROT_READ | PROT_WRITE | PROT_EXEC) != 0 {
            return bad("unknown protection");
        }
        // Bit 0 asks for wired memory, which all of a VM's is.
        if request.flags & !1 != 0 {
            return bad("unknown flags");
        }
        let Ok(offset) = u64::try_from(request.segoff) else {
            return bad("a negative offset");
        };
        if !(gpa | len | offset).is_multiple_of(PAGE) || len == 0 {
            return bad("parts of pages");
        }
        let segment = self.segment(request.segid)?;
        if offset.checked_add(len).is_none_or(|end| end > segment.len) {
            return bad("past the segment's end");
        }
        let mut maps = lock(&self.memory.maps);
        let end = gpa.checked_add(len).filter(|end| *end <= DEVMEM_START);
        let Some(end) = end else {
            return Err(self.misuse(
                libc::ENOMEM,
                &format!("map at {gpa:#x}: past the guest's memory"),
            ));
        };
        if maps
            .iter()
            .any(|map| gpa < map.gpa + map.len && map.gpa < end)
        {
            return Err(self.misuse(libc::ENOMEM, &format!("map at {gpa:#x}: overlaps another")));
        }
        let free = (0..MAPPINGS_MAX as u32).find(|slot| maps.iter().all(|map| map.slot != *slot));
        let Some(slot) = free else {
            return Err(self.misuse(
                libc::ENOSPC,
                &format!("map at {gpa:#x}: more than {MAPPINGS_MAX}"),
            ));
        };
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let host = unsafe {
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap(
                ptr::null_mut(),
                request.len,
                prot,
                MapFlags::SHARED,
                &segment.file,
                offset,
            )
        }?;
        let host = NonNull::new(host.cast()).ok_or(errno(libc::ENOMEM))?;
        let map = Map {
            gpa,
            len,
            segment: request.segid as usize,
            offset,
            prot: request.prot,
            slot,
            host,
        };
        self.show(&map, true)?;
        maps.push(map);
        Ok(())
    }

    /// Gives KVM the slot of `map`, or takes it.
    fn show(&self, map: &Map, shown: bool) -> io::Result<()> {
        let mut flags = 0;
        if map.prot & PROT_WRITE == 0 {
            flags |= KVM_MEM_READONLY;
        } else if self.tracking.load(Ordering::SeqCst) {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kvm_userspace_memory_region {
            slot: map.slot,
            flags,
            guest_phys_addr: map.gpa,
            memory_size: if shown { map.len } else { 0 },
            userspace_addr: map.host.as_ptr() as u64,
        };
        // SAFETY: the range stays mapped until the slot is taken, or the VM goes: `maps` keeps it.
        Ok(unsafe { self.fd.set_user_memory_region(region) }?)
    }

    pub fn munmap_memseg(&self, request: &VmMunmap) -> io::Result<()> {
        let _frozen = self.freeze();
        let mut maps = lock(&self.memory.maps);
        let same = |map: &Map| (map.gpa, map.len) == (request.gpa, request.len as u64);
        let Some(index) = maps.iter().position(same) else {
            return Err(self.misuse(
                libc::ENOENT,
                &format!("no map at {:#x} to remove", request.gpa),
            ));
        };
        self.show(&maps[index], false)?;
        maps.remove(index);
        Ok(())
    }

    pub fn mmap_getnext(&self, request: &mut VmMemmap) -> io::Result<()> {
        let maps = lock(&self.memory.maps);
        let after = maps.iter().filter(|map| map.gpa >= request.gpa);
        let map = after.min_by_key(|map| map.gpa).ok_or(errno(libc::ENOENT))?;
        *request = VmMemmap {
            gpa: map.gpa,
            segid: map.segment as i32,
            segoff: map.offset as i64,
            len: map.len as usize,
            prot: map.prot,
            flags: 0,
        };
        Ok(())
    }

    pub fn devmem_offset(&self, id: i32) -> io::Result<i64> {
        self.segment(id).map(|segment| segment.start as i64)
    }

    /// The file behind `len` bytes at `offset` of the node.
    pub fn file(&self, offset: u64, len: u64) -> io::Result<(BorrowedFd<'_>, u64)> {
        let inside = |start: u64, size: u64| {
            offset >= start
                && offset
                    .checked_add(len)
                    .is_some_and(|end| end <= start + size)
        };
        if offset >= DEVMEM_START {
            let mut segments = self.memory.segments.iter().filter_map(OnceLock::get);
            let segment = segments.find(|segment| inside(segment.start, segment.len));
            let segment = segment.ok_or_else(|| {
                self.misuse(
                    libc::ENODEV,
                    &format!("no segment has a view at {offset:#x}"),
                )
            })?;
            return Ok((segment.file.as_fd(), offset - segment.start));
        }
        let maps = lock(&self.memory.maps);
        let found = maps
            .iter()
            .find(|map| inside(map.gpa, map.len))
            .and_then(|map| {
                let segment = self.memory.segments[map.segment].get()?;
                let file = if map.prot & PROT_WRITE != 0 {
                    &segment.file
                } else {
                    &segment.read_only
                };
                Some((file.as_fd(), offset - map.gpa + map.offset))
            });
        // The kernel maps it, and the first access is a signal.
        found.ok_or_else(|| {
            let what = format!("a view of {len:#x} bytes at {offset:#x}, where no map is");
            self.misuse(libc::ENODEV, &what)
        })
    }

    /// Whether the guest may not write to `gpa`, where it has memory.
    pub fn is_rom(&self, gpa: u64) -> bool {
        let maps = lock(&self.memory.maps);
        maps.iter()
            .any(|map| map.prot & PROT_WRITE == 0 && (map.gpa..map.gpa + map.len).contains(&gpa))
    }

    /// After a change of what KVM notes of it: its slots are taken and given again.
    pub fn show_again(&self) -> io::Result<()> {
        for map in lock(&self.memory.maps).iter() {
            self.show(map, false)?;
            self.show(map, true)?;
        }
        Ok(())
    }

    /// Adds the pages that KVM has noted since.
    pub fn harvest(&self, dirty: &mut BTreeSet<u64>) -> io::Result<()> {
        for map in lock(&self.memory.maps)
            .iter()
            .filter(|map| map.prot & PROT_WRITE != 0)
        {
            let words = self.fd.get_dirty_log(map.slot, map.len as usize)?;
            for (index, word) in (0..).zip(words) {
                let bits = (0..64).filter(|bit| word >> bit & 1 != 0);
                dirty.extend(bits.map(|bit| map.gpa + (index * 64 + bit) * PAGE));
            }
        }
        Ok(())
    }

    /// A byte of the guest's memory.
    pub fn read_byte(&self, gpa: u64) -> Option<u8> {
        let maps = lock(&self.memory.maps);
        let mut maps = maps.iter();
        let map = maps.find(|map| (map.gpa..map.gpa + map.len).contains(&gpa))?;
        // SAFETY: the byte lies in the mapping, which `maps` keeps; the guest may change it at any time.
        Some(unsafe { map.host.add((gpa - map.gpa) as usize).read_volatile() })
    }

    /// Removes the maps of named segments.
    pub fn unmap_devmem(&self) -> io::Result<()> {
        let mut maps = lock(&self.memory.maps);
        let named = |map: &Map| {
            let segment = self.memory.segments[map.segment].get();
            segment.is_some_and(|segment| !segment.name.is_empty())
        };
        for map in maps.iter().filter(|map| named(map)) {
            self.show(map, false)?;
        }
        maps.retain(|map| !named(map));
        Ok(())
    }
}

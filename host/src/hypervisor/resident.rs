//! Gives back the memory that holds code which has done its work: most of a host is what starts a VM.
//!
//! A page of a program or library that nothing can write to is as it is in its file. Without it, the next use of the page gets it
//! from the system's cache again.
#![allow(unsafe_code)] // walks the dynamic linker's list of objects, and advises the system of their mappings

#[cfg(target_os = "linux")]
mod linux {
    use std::ffi::{c_int, c_void};

    use rustix::mm::Advice;

    /// What mappings begin and end at on x86.
    const PAGE: usize = 4096;
    /// Segments of fewer bytes hold too little.
    const WORTH: usize = 64 << 10;
    /// An entry of a dynamic section, `Elf64_Dyn` (System V ABI, "Dynamic Section").
    type Dynamic = [u64; 2];
    const DT_NULL: u64 = 0;
    const DT_TEXTREL: u64 = 22;
    const DT_FLAGS: u64 = 30;
    const DF_TEXTREL: u64 = 1 << 2;

    /// Gives back the unwritable segments of every object that the dynamic linker has mapped.
    pub fn release_code() {
        // SAFETY: the callback takes what the linker passes and unwinds never.
        unsafe { libc::dl_iterate_phdr(Some(release), std::ptr::null_mut()) };
    }

    /// # Safety
    /// `info` describes a mapped object.
    unsafe extern "C" fn release(
        info: *mut libc::dl_phdr_info,
        _: libc::size_t,
        _: *mut c_void,
    ) -> c_int {
        // SAFETY: by this function's contract the description and the program headers that it points to are readable.
        let (base, headers) = unsafe {
            let info = &*info;
            let count = usize::from(info.dlpi_phnum);
            (
                info.dlpi_addr as usize,
                std::slice::from_raw_parts(info.dlpi_phdr, count),
            )
        };
        let address = |header: &libc::Elf64_Phdr| base.wrapping_add(header.p_vaddr as usize);
        let dynamic = headers
            .iter()
            .find(|header| header.p_type == libc::PT_DYNAMIC);
        // SAFETY: the linker has mapped the object's dynamic section where its header says.
        if dynamic.is_some_and(|header| unsafe { is_relocated(address(header) as *const Dynamic) })
        {
            return 0;
        }
        for header in headers {
            // What is written once, by relocation (PT_GNU_RELRO), is part of a writable segment.
            if header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0 {
                let start = address(header) & !(PAGE - 1);
                let end = (address(header) + header.p_memsz as usize).next_multiple_of(PAGE);
                if end - start < WORTH {
                    continue;
                }
                // SAFETY: the segment is mapped from its file, and neither the linker nor the program writes to it: its pages
                // come back with the same contents. A refusal costs memory alone.
                let _ = unsafe {
                    rustix::mm::madvise(start as *mut c_void, end - start, Advice::LinuxDontNeed)
                };
            }
        }
        0
    }

    /// Whether the linker has written to segments that are said to be unwritable.
    ///
    /// # Safety
    /// A whole dynamic section is at `entry`.
    unsafe fn is_relocated(mut entry: *const Dynamic) -> bool {
        loop {
            // SAFETY: by this function's contract: none but the last entry is DT_NULL.
            let [tag, value] = unsafe { *entry };
            match tag {
                DT_NULL => return false,
                DT_TEXTREL => return true,
                DT_FLAGS if value & DF_TEXTREL != 0 => return true,
                // SAFETY: as above, another follows.
                _ => entry = unsafe { entry.add(1) },
            }
        }
    }
}

#[cfg(target_os = "linux")]
pub use linux::release_code;

/// Nothing is known of how other systems count pages that several processes share.
#[cfg(not(target_os = "linux"))]
pub fn release_code() {}

#[cfg(target_os = "linux")]
#[cfg(test)]
mod tests {
    use super::*;

    /// kB of unwritable code and constants of files that this process has in memory.
    fn resident() -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut counts, mut sum) = (false, 0);
        for line in maps.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                [range, rights, ..] if range.contains('-') => {
                    counts = rights.starts_with("r-x") && line.contains('/');
                }
                ["Rss:", kib, "kB"] if counts => sum += kib.parse::<u64>().unwrap(),
                _ => {}
            }
        }
        sum
    }

    #[test]
    fn code_leaves_memory_and_comes_back() {
        // Some of it that is not what measures.
        assert!(toml::from_str::<toml::Table>("a = { b = [1, 2.5, 1979-05-27] }").is_ok());
        let before = resident();
        release_code();
        let after = resident();
        assert!(after < before, "{before} kB, then {after} kB");
        assert!(toml::from_str::<toml::Table>("a = { b = [1, 2.5, 1979-05-27] }").is_ok());
    }
}

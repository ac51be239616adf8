//! What guest RAM is made of: `[main] hugepages`, `memory_file` and `prefault`.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

#[cfg(target_os = "linux")]
use anyhow::{Context, ensure};
use anyhow::{Result, bail};

use super::ALIGNMENT;

/// What a VM file asks of guest RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// What it is made of.
    pub source: Source,
    /// All of it is allocated before the guest starts, and stays so.
    pub prefault: bool,
}

/// What guest RAM is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// Memory of this process.
    #[default]
    Anonymous,
    /// Large pages that the system keeps in reserve.
    Huge(HugePage),
    /// The reservoir of illumos' vmm driver.
    Reservoir,
    /// A file that stays.
    File(PathBuf),
}

/// Sizes of large pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePage {
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl HugePage {
    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            HugePage::Size2M => 2 << 20,
            HugePage::Size1G => 1 << 30,
        }
    }
}

impl fmt::Display for HugePage {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            HugePage::Size2M => "2 MiB",
            HugePage::Size1G => "1 GiB",
        })
    }
}

/// Guest RAM before it is mapped.
#[derive(Debug)]
pub struct Opened {
    /// The file that it lies in, if it lies in one.
    pub fd: Option<OwnedFd>,
    /// What its addresses are to be multiples of.
    pub align: usize,
    /// Its pages are not given back while the VM lives.
    pub keep: bool,
}

/// Whether this system can give `bytes` of such RAM now. Creates and changes nothing.
///
/// # Errors
/// It can't: the text gives the figures and what to do.
pub fn check(backing: &Backing, bytes: u64) -> Result<()> {
    match &backing.source {
        Source::Anonymous | Source::Reservoir => {}
        Source::Huge(size) => check_huge(*size, bytes)?,
        Source::File(path) => check_file(path, bytes)?,
    }
    // Large pages are taken from their reserve.
    match backing.prefault && !matches!(backing.source, Source::Huge(_)) {
        true => check_free(bytes),
        false => Ok(()),
    }
}

/// Makes what `bytes` of RAM lie in. A file is locked by its descriptor, and all zeros.
///
/// # Errors
/// As [`check`], or the file is another VM's.
pub fn open(backing: &Backing, bytes: u64) -> Result<Opened> {
    check(backing, bytes)?;
    let (fd, align) = match &backing.source {
        Source::Anonymous => (None, ALIGNMENT),
        Source::Reservoir => bail!("Only bhyve has a reservoir"),
        Source::Huge(size) => (Some(huge_file(*size, bytes)?), size.bytes() as usize),
        Source::File(path) => (Some(named_file(path, bytes)?), ALIGNMENT),
    };
    // What was promised, large pages or room in a filesystem, may be somebody else's once it is given back.
    let keep = backing.prefault || backing.source != Source::Anonymous;
    Ok(Opened { fd, align, keep })
}

/// `MemAvailable` is what can be had without swapping (Linux Documentation/filesystems/proc.rst).
#[cfg(target_os = "linux")]
fn check_free(bytes: u64) -> Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    if let Some(free) = kib.map(|kib| kib << 10) {
        ensure!(
            bytes <= free,
            "{} MiB are to be allocated up front, and {} MiB of memory are free: stop something, lower `memory` or leave out \
             `prefault`",
            bytes >> 20,
            free >> 20
        );
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn check_free(_: u64) -> Result<()> {
    bail!(
        "memory can't be allocated up front on {}",
        std::env::consts::OS
    )
}

#[cfg(target_os = "linux")]
fn check_huge(size: HugePage, bytes: u64) -> Result<()> {
    let wanted = bytes.div_ceil(size.bytes());
    let directory = format!(
        "/sys/kernel/mm/hugepages/hugepages-{}kB",
        size.bytes() >> 10
    );
    let count = |name: &str| -> Option<u64> {
        let text = std::fs::read_to_string(format!("{directory}/{name}")).ok()?;
        text.trim().parse().ok()
    };
    let (Some(all), Some(free)) = (count("nr_hugepages"), count("free_hugepages")) else {
        bail!("this system has no pages of {size}: its processor or its kernel lacks them");
    };
    // Free ones that others have been promised already don't count.
    let free = free.saturating_sub(count("resv_hugepages").unwrap_or(0));
    if free >= wanted {
        return Ok(());
    }
    let total = all + (wanted - free);
    let remedy = match size {
        HugePage::Size2M => format!("\"sysctl vm.nr_hugepages={total}\" adds what is missing"),
        HugePage::Size1G => format!(
            "\"echo {total} >{directory}/nr_hugepages\" adds what is missing, at the latest when the kernel boots with \
             hugepagesz=1G hugepages={total}"
        ),
    };
    bail!("{wanted} pages of {size} are needed, and of {all} in reserve {free} are free: {remedy}")
}

#[cfg(not(target_os = "linux"))]
fn check_huge(size: HugePage, _: u64) -> Result<()> {
    bail!(
        "{} keeps no pages of {size} in reserve",
        std::env::consts::OS
    )
}

/// A file of large pages that exists only as long as its descriptors and mappings. Whoever maps it takes the pages from
/// the reserve.
#[cfg(target_os = "linux")]
fn huge_file(size: HugePage, bytes: u64) -> Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let which = match size {
        HugePage::Size2M => MemfdFlags::HUGE_2MB,
        HugePage::Size1G => MemfdFlags::HUGE_1GB,
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | which;
    let fd = rustix::fs::memfd_create("guest-ram", flags)
        .with_context(|| format!("Cannot create a file of {size} pages"))?;
    rustix::fs::ftruncate(&fd, bytes)
        .with_context(|| format!("Cannot give guest memory its {bytes} bytes"))?;
    // A process that shares the file must not be able to shrink it: the next access here would be a SIGBUS.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .context("Cannot seal the size of guest memory")?;
    Ok(fd)
}

#[cfg(not(target_os = "linux"))]
fn huge_file(size: HugePage, bytes: u64) -> Result<OwnedFd> {
    check_huge(size, bytes)?;
    bail!("Cannot create a file of {size} pages")
}

#[cfg(target_os = "linux")]
fn check_file(path: &Path, bytes: u64) -> Result<()> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return check_directory(path),
        Err(error) => bail!("{}: {error}", path.display()),
    };
    ensure!(
        metadata.is_file(),
        "{} is not a regular file",
        path.display()
    );
    check_length(path, metadata.len(), bytes)
}

/// Of a file that is to be created.
#[cfg(target_os = "linux")]
fn check_directory(path: &Path) -> Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    ensure!(
        directory.is_dir(),
        "{} can't be created: there is no directory {}",
        path.display(),
        directory.display()
    );
    Ok(())
}

/// An empty file is one that was just created.
#[cfg(target_os = "linux")]
fn check_length(path: &Path, found: u64, bytes: u64) -> Result<()> {
    ensure!(
        found == 0 || found == bytes,
        "{} has {found} bytes, and this VM's memory has {bytes}: it is not this VM's; name another file, or remove it",
        path.display()
    );
    Ok(())
}

/// Opens or creates the file, locks it, and makes it `bytes` zeros: a guest starts with empty memory. Room on its
/// filesystem is taken now, for a write that finds none later would be a SIGBUS.
#[cfg(target_os = "linux")]
fn named_file(path: &Path, bytes: u64) -> Result<OwnedFd> {
    use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};
    let name = path.display();
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
        .with_context(|| format!("Cannot open guest memory {name}"))?;
    rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).with_context(|| {
        format!("Cannot lock guest memory {name}: is it that of another VM that runs?")
    })?;
    // Again: what was checked before the lock may have changed.
    let found = rustix::fs::fstat(&fd)
        .with_context(|| format!("Cannot examine {name}"))?
        .st_size;
    check_length(path, u64::try_from(found)?, bytes)?;
    let describe = || format!("Cannot give {name} the {} MiB of guest memory", bytes >> 20);
    rustix::fs::ftruncate(&fd, 0).with_context(describe)?;
    rustix::fs::ftruncate(&fd, bytes).with_context(describe)?;
    match rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes) {
        // This filesystem can't promise room.
        Err(rustix::io::Errno::OPNOTSUPP) => {}
        other => other.with_context(describe)?,
    }
    Ok(fd)
}

#[cfg(not(target_os = "linux"))]
fn check_file(path: &Path, _: u64) -> Result<()> {
    bail!(
        "{}: the hypervisor of {} owns guest memory, which lies in no file",
        path.display(),
        std::env::consts::OS
    )
}

#[cfg(not(target_os = "linux"))]
fn named_file(path: &Path, bytes: u64) -> Result<OwnedFd> {
    check_file(path, bytes)?;
    bail!("Cannot open {}", path.display())
}

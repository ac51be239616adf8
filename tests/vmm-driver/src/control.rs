//! The control node: versions, VMs by name, the reservoir.
#![allow(unsafe_code)] // implements requests whose arguments are pointers

use std::ffi::c_void;
use std::io;
use std::sync::Mutex;
use std::time::Duration;

use vmm_host::hypervisor::bhyve::abi::*;
use vmm_host::hypervisor::bhyve::driver::Driver;

use crate::argument::{copy_in, copy_out, name};
use crate::node::{self, Node};
use crate::{errno, lock, violation};

/// What the emulated system is like.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Whether it has the driver.
    pub present: bool,
    /// The interface's version.
    pub version: i32,
    /// Whether the CPU's virtualisation is there and free.
    pub hvm_available: bool,
    /// Whether the caller may create VMs and set the reservoir's size.
    pub privileged: bool,
    /// How many VMs the caller's zone may own.
    pub zone_limit: Option<usize>,
    /// Bytes of the reservoir that are unused at first.
    pub reservoir: usize,
    /// The most that reservoir and other memory of VMs may be together.
    pub reservoir_limit: usize,
    /// Whether the hardware notes which pages are dirty.
    pub dirty_tracking: bool,
    /// A VM that is there already.
    pub other: Option<&'static str>,
    /// Whether a process has that one open, and keeps it so.
    pub other_held: bool,
    /// Milliseconds after its creation until somebody destroys a VM.
    pub destroyed_after: Option<u64>,
}

impl Settings {
    /// A system on which everything works.
    pub const DEFAULT: Self = Self {
        present: true,
        version: 18,
        hvm_available: true,
        privileged: true,
        zone_limit: None,
        reservoir: 0,
        reservoir_limit: 1 << 40,
        dirty_tracking: true,
        other: None,
        other_held: false,
        destroyed_after: None,
    };

    /// Settings as text: `field=value`, separated by commas, of those that differ from the default. Sizes are in MiB.
    ///
    /// # Errors
    /// The part that is none of these, and why.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut settings = Self::DEFAULT;
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("{part:?} is not field=value"))?;
            settings
                .set(key, value)
                .ok_or_else(|| format!("{part:?} is no field, or no value of it"))?;
        }
        Ok(settings)
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        let size = |value: &str| value.parse::<usize>().ok()?.checked_mul(1 << 20);
        match key {
            "present" => self.present = value.parse().ok()?,
            "version" => self.version = value.parse().ok()?,
            "hvm_available" => self.hvm_available = value.parse().ok()?,
            "privileged" => self.privileged = value.parse().ok()?,
            "zone_limit" => self.zone_limit = Some(value.parse().ok()?),
            "reservoir" => self.reservoir = size(value)?,
            "reservoir_limit" => self.reservoir_limit = size(value)?,
            "dirty_tracking" => self.dirty_tracking = value.parse().ok()?,
            // One per process.
            "other" => self.other = Some(Box::leak(value.into())),
            "other_held" => self.other_held = value.parse().ok()?,
            "destroyed_after" => self.destroyed_after = Some(value.parse().ok()?),
            _ => return None,
        }
        Some(())
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self::DEFAULT
    }
}

struct State {
    settings: Settings,
    free: usize,
    allocated: usize,
    transient: usize,
}

static STATE: Mutex<State> = Mutex::new(State {
    settings: Settings::DEFAULT,
    free: 0,
    allocated: 0,
    transient: 0,
});

/// Makes the system of this process like `settings`, for what is opened and asked from now on.
///
/// A zone's limit of VMs counts [`Settings::other`] too.
pub fn configure(settings: Settings) {
    let mut state = lock(&STATE);
    state.free = settings.reservoir.saturating_sub(state.allocated);
    state.settings = settings;
}

pub fn settings() -> Settings {
    lock(&STATE).settings
}

/// Takes memory for a segment.
pub fn take(len: usize, reservoir: bool) -> io::Result<()> {
    let mut state = lock(&STATE);
    if !reservoir {
        state.transient += len;
        return Ok(());
    }
    state.free = state.free.checked_sub(len).ok_or(errno(libc::ENOMEM))?;
    state.allocated += len;
    Ok(())
}

/// Gives it back.
pub fn give(len: usize, reservoir: bool) {
    let mut state = lock(&STATE);
    if reservoir {
        state.allocated -= len;
        state.free += len;
    } else {
        state.transient -= len;
    }
}

/// The emulation's control node.
#[derive(Debug)]
pub struct Emulated(());

impl Driver for Emulated {
    type Instance = Node;

    fn open() -> io::Result<Self> {
        let settings = settings();
        match (settings.present, settings.privileged) {
            (false, _) => Err(errno(libc::ENOENT)),
            (true, false) => Err(errno(libc::EPERM)),
            (true, true) => Ok(Self(())),
        }
    }

    unsafe fn ioctl(&self, request: i32, argument: *mut c_void) -> io::Result<i32> {
        // SAFETY: by this function's contract, each argument is what the request takes.
        unsafe {
            match request {
                VMM_INTERFACE_VERSION => Ok(settings().version),
                VMM_CREATE_VM => create(&copy_in(argument)?),
                VMM_DESTROY_VM => {
                    let request: VmDestroyReq = copy_in(argument)?;
                    let name = name(&request.name).ok_or(errno(libc::ENAMETOOLONG))?;
                    if !settings().privileged {
                        return Err(errno(libc::EPERM));
                    }
                    destroy(&name).map(|()| 0)
                }
                VMM_VM_SUPPORTED => match settings().hvm_available {
                    true => Ok(0),
                    false => Err(errno(libc::ENXIO)),
                },
                VMM_CHECK_IOMMU => Err(errno(libc::ENXIO)),
                VMM_RESV_QUERY => copy_out(argument, query()).map(|()| 0),
                VMM_RESV_SET_TARGET => {
                    let mut target: VmmResvTarget = copy_in(argument)?;
                    set_target(&mut target)?;
                    copy_out(argument, target).map(|()| 0)
                }
                other => {
                    violation("vmmctl", &format!("unknown request {other:#x}"));
                    Err(errno(libc::ENOTTY))
                }
            }
        }
    }

    fn instance(&self, name: &str) -> io::Result<Node> {
        node::open(name)
    }
}

fn create(request: &VmCreateReq) -> io::Result<i32> {
    let settings = settings();
    let Some(name) = name(&request.name) else {
        violation("vmmctl", "a VM's name without an end");
        return Err(errno(libc::ENAMETOOLONG));
    };
    if name.is_empty() || name.contains('/') {
        violation("vmmctl", &format!("VM name {name:?}"));
        return Err(errno(libc::EINVAL));
    }
    if request.flags & !(VCF_RESERVOIR_MEM | VCF_TRACK_DIRTY) != 0 {
        let flags = request.flags;
        violation(&name, &format!("unknown flags {flags:#x} at creation"));
        return Err(errno(libc::EINVAL));
    }
    if !settings.privileged {
        return Err(errno(libc::EPERM));
    }
    if request.flags & VCF_TRACK_DIRTY != 0 && !settings.dirty_tracking {
        return Err(errno(libc::ENOTSUP));
    }
    if !settings.hvm_available {
        return Err(errno(libc::ENXIO));
    }
    if settings.other == Some(&name) {
        return Err(errno(libc::EEXIST));
    }
    node::create(&name, request.flags, settings.zone_limit)?;
    if let Some(after) = settings.destroyed_after {
        let destroy = move || {
            std::thread::sleep(Duration::from_millis(after));
            // It waits for the host to close the node.
            node::destroy(&name)
        };
        std::thread::Builder::new()
            .name("vmm-destroyer".into())
            .spawn(destroy)?;
    }
    Ok(0)
}

/// Waits until nobody has it open.
fn destroy(name: &str) -> io::Result<()> {
    if settings().other != Some(name) {
        return node::destroy(name);
    }
    while settings().other_held {
        std::thread::park();
    }
    lock(&STATE).settings.other = None;
    Ok(())
}

fn query() -> VmmResvQuery {
    let state = lock(&STATE);
    VmmResvQuery {
        free: state.free,
        alloc: state.allocated,
        alloc_transient: state.transient,
        limit: state.settings.reservoir_limit,
    }
}

fn set_target(target: &mut VmmResvTarget) -> io::Result<()> {
    let mut state = lock(&STATE);
    if !target.target_sz.is_multiple_of(4096) || !target.chunk_sz.is_multiple_of(4096) {
        violation("vmmctl", "a reservoir of parts of pages");
        return Err(errno(libc::EINVAL));
    }
    if !state.settings.privileged {
        return Err(errno(libc::EPERM));
    }
    if target.target_sz.saturating_add(state.transient) > state.settings.reservoir_limit {
        return Err(errno(libc::ENOSPC));
    }
    // What VMs use stays in it.
    state.free = target.target_sz.saturating_sub(state.allocated);
    target.result_sz = state.free + state.allocated;
    Ok(())
}

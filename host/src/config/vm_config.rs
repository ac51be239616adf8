//! A checked VM file: everything that is needed to build the VM, with no question left open.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use super::source::{Source, Span};
use crate::hypervisor::CpuModel;
use crate::hypervisor::backing::Backing;
use crate::machine::Board;
use crate::machine::smbios::Identity;
use crate::pci::Bdf;
use crate::plugins::registry::{BackendEntry, DriverEntry};
use crate::plugins::schema::{BackendKind, OptionValue};

/// The kernels that are part of the host's binary, for `kernel = "builtin:NAME"`.
pub const BUILTIN_KERNELS: [&str; 1] = ["selftest"];

/// What a VM file describes.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// `[main] name`.
    pub name: String,
    /// Number of vCPUs, from 1 to 254.
    pub cpus: u8,
    /// How those lie in sockets, cores and threads, and what CPUID tells the guest.
    pub cpu_model: CpuModel,
    /// The CPU of this machine that each vCPU runs on; empty for any.
    pub cpu_binding: Vec<u32>,
    /// Guest memory in bytes: whole MiB, at least one.
    pub memory_bytes: u64,
    /// What guest memory is made of.
    pub backing: Backing,
    /// What its board has.
    pub board: Board,
    /// What the guest starts with.
    pub boot: Boot,
    /// `[fw_cfg]`.
    pub fw_cfg: Vec<FwCfgFile>,
    /// Where the debug port's text goes.
    pub debug_port: DebugConfig,
    /// The host's exit code when the guest halts or powers off.
    pub exit_on_halt: u8,
    /// If given, a guest's reset ends the host with this code.
    pub exit_on_reboot: Option<u8>,
    /// Who the guest is told its machine is.
    pub smbios: Identity,
    /// In alphabetical order of their names, which is the order of creation.
    pub devices: Vec<DeviceConfig>,
    /// The backends in use, of all kinds, in the order of creation: each after those that it refers to.
    pub backends: Vec<BackendConfig>,
}

/// What the guest starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boot {
    /// A kernel, without firmware.
    Direct(DirectKernel),
    /// Firmware, which finds the rest itself.
    Firmware(Bootrom),
}

/// A kernel that is booted directly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectKernel {
    /// The kernel.
    pub kernel: BootKernel,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel command line; empty if not given.
    pub cmdline: String,
}

/// Firmware and what it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bootrom {
    /// The image.
    pub path: PathBuf,
    /// Where its variables are kept.
    pub vars: Option<PathBuf>,
    /// What its variables start from: if [`Bootrom::vars`] is not there yet, or at each start if they are not kept.
    pub vars_template: Option<PathBuf>,
    /// Names of devices, to be tried in this order.
    pub order: Vec<String>,
}

/// A blob that the guest finds by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FwCfgFile {
    /// Its name.
    pub name: String,
    /// What is in it.
    pub contents: FwCfgContents,
    /// Its table's header.
    pub place: Place,
}

/// Where a blob's bytes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FwCfgContents {
    /// A file's contents when the VM is built.
    File(PathBuf),
    /// This text.
    Text(String),
}

/// Where the kernel is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootKernel {
    /// In a file.
    File(PathBuf),
    /// In the host's binary: one of [`BUILTIN_KERNELS`].
    Builtin(String),
}

/// Where the text that firmware writes to the debug port goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DebugConfig {
    /// Nowhere.
    #[default]
    Off,
    /// Into the log.
    Log,
    /// Into this file.
    File(PathBuf),
}

/// What happens to the VM when a device's plugin fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFault {
    /// The VM stops.
    #[default]
    Stop,
    /// The device reads all ones and ignores writes; the VM goes on.
    Fail,
}

impl VmConfig {
    /// What a fault of the plugin behind a backend means: the VM stops, unless every device that uses the backend, itself or
    /// through other backends, may fail.
    pub fn backend_on_fault(&self, backend: &BackendConfig) -> OnFault {
        let uses = |options: &[(String, OptionValue)]| {
            options.iter().any(|(_, value)| {
                matches!(value, OptionValue::Ref(kind, name) if *kind == backend.kind && *name == backend.name)
            })
        };
        let devices = self.devices.iter().filter(|user| uses(&user.options));
        // References make no circles, which was checked.
        let backends = self.backends.iter().filter(|user| uses(&user.options));
        let mut users = devices
            .map(|user| user.on_fault)
            .chain(backends.map(|user| self.backend_on_fault(user)))
            .peekable();
        let used = users.peek().is_some();
        match used && users.all(|on_fault| on_fault == OnFault::Fail) {
            true => OnFault::Fail,
            false => OnFault::Stop,
        }
    }
}

/// A place in a VM file, for messages after the configuration has been read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file, or the profile.
    pub file: Arc<str>,
    /// Counted from 1.
    pub line: u32,
}

impl Place {
    /// The place where `at` starts.
    pub(super) fn of(at: Span, sources: &[Source]) -> Place {
        match sources.get(at.source) {
            Some(source) => Place {
                file: source.name.as_str().into(),
                line: source.line(at.start),
            },
            None => Place {
                file: "".into(),
                line: 0,
            },
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}:{}", self.file, self.line)
    }
}

/// One `[dev.NAME]` table.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// NAME; [`DeviceConfig::label`] is what users are shown.
    pub name: String,
    /// The driver and its plugin.
    pub driver: DriverEntry,
    /// The PCI address; present exactly for drivers on the PCI bus.
    pub pci: Option<Bdf>,
    /// What a fault of its plugin means for the VM.
    pub on_fault: OnFault,
    /// All options that were given or have a default, in the schema's order.
    pub options: Vec<(String, OptionValue)>,
    /// The table's header.
    pub place: Place,
}

impl DeviceConfig {
    /// The device as its table is spelt: `dev.NAME`.
    pub fn label(&self) -> String {
        format!("dev.{}", self.name)
    }
}

/// One `[block_dev.NAME]` or `[char_dev.NAME]` table.
#[derive(Clone, Debug)]
pub struct BackendConfig {
    /// What kind of table it is.
    pub kind: BackendKind,
    /// NAME.
    pub name: String,
    /// The backend type and its plugin.
    pub backend: BackendEntry,
    /// All options that were given or have a default, in the schema's order.
    pub options: Vec<(String, OptionValue)>,
    /// The table's header.
    pub place: Place,
}

impl BackendConfig {
    /// The backend as its table is spelt: `block_dev.NAME`.
    pub fn label(&self) -> String {
        format!("{}.{}", self.kind.table(), self.name)
    }
}

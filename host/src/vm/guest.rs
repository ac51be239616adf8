//! What the guest starts with, put in its place at power-on and again at each reset.

use std::io::Read;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::placing::{KernelFiles, Placing};
use crate::boot::{self, DirectBoot, Files, Firmware, Image};
use crate::config::{Boot, BootKernel, Bootrom, DirectKernel, FwCfgContents, FwCfgFile, VmConfig};
use crate::hypervisor::cpuid::CpuidProfile;
use crate::hypervisor::{Vcpu, Vm};
use crate::machine::fw_cfg::{FILE_MAX, FwCfg, Items};
use crate::machine::{Machine, acpi, boot_order, e820, smbios};
use crate::vcpu::VcpuSet;

/// Files that are opened before anything is created, so that a wrong name costs nothing.
pub(super) enum Images {
    Kernel {
        files: Arc<KernelFiles>,
        cmdline: String,
    },
    Bootrom(Bootrom),
}

/// As [`Images`], in a VM.
pub(super) enum Guest<V: Vm> {
    Kernel {
        files: Arc<KernelFiles>,
        /// For the first start, unless there was no thread to do it.
        placing: Option<Placing>,
        cmdline: String,
        smbios: smbios::Blobs,
        address_bits: u32,
    },
    Firmware(Firmware<V>),
}

impl Images {
    pub fn open(boot: &Boot) -> Result<Self> {
        let DirectKernel {
            kernel,
            initrd,
            cmdline,
        } = match boot {
            Boot::Direct(direct) => direct,
            Boot::Firmware(bootrom) => return Ok(Self::Bootrom(bootrom.clone())),
        };
        let kernel = match kernel {
            BootKernel::File(path) => Image::open("kernel", path)?,
            BootKernel::Builtin(name) if name == "selftest" => {
                Image::built_in(name, vmm_selftest::IMAGE)
            }
            BootKernel::Builtin(name) => bail!("there is no builtin kernel {name}"),
        };
        let initrd = initrd
            .as_deref()
            .map(|path| Image::open("initrd", path))
            .transpose()?;
        Ok(Self::Kernel {
            files: Arc::new(KernelFiles { kernel, initrd }),
            cmdline: cmdline.clone(),
        })
    }

    /// What direct boot puts into memory.
    pub fn kernel(&self) -> Option<Arc<KernelFiles>> {
        match self {
            Self::Kernel { files, .. } => Some(Arc::clone(files)),
            Self::Bootrom(_) => None,
        }
    }

    /// Gives the guest firmware and what it can ask for. After the devices are there.
    pub fn place<V: Vm>(
        self,
        placing: Option<Placing>,
        vm: &Arc<V>,
        machine: &Arc<Machine<V>>,
        config: &VmConfig,
    ) -> Result<Guest<V>> {
        let cpu = vm.cpuid(&config.cpu_model);
        let order = match &self {
            Self::Bootrom(bootrom) => boot_list(machine, config, &bootrom.order)?,
            Self::Kernel { .. } => String::new(),
        };
        let smbios = |uefi| smbios_blobs(vm, machine, config, &cpu, uefi);
        let items = items(vm, machine, config, &order, &smbios(true))?;
        machine.add_fw_cfg(FwCfg::new(items, Arc::clone(vm.memory())))?;
        Ok(match self {
            Self::Kernel { files, cmdline } => Guest::Kernel {
                files,
                placing,
                cmdline,
                smbios: smbios(false),
                address_bits: address_bits(&cpu),
            },
            Self::Bootrom(bootrom) => {
                let files = Files {
                    image: &bootrom.path,
                    vars: bootrom.vars.as_deref(),
                    vars_template: bootrom.vars_template.as_deref(),
                };
                Guest::Firmware(Firmware::install(vm, machine, &files)?)
            }
        })
    }
}

/// CPUID 0x8000_0008; a CPU that doesn't have it has 36 (Intel SDM volume 3, section 4.1.4).
fn address_bits(cpu: &CpuidProfile) -> u32 {
    cpu.get(0x8000_0008, 0).map_or(36, |[eax, ..]| eax & 0xff)
}

/// What the guest is told of who made its machine.
fn smbios_blobs<V: Vm>(
    vm: &Arc<V>,
    machine: &Machine<V>,
    config: &VmConfig,
    cpu: &CpuidProfile,
    uefi: bool,
) -> smbios::Blobs {
    let topology = config.cpu_model.topology;
    let processors =
        smbios::Processors::from_cpuid(topology, |leaf, subleaf| cpu.get(leaf, subleaf));
    machine.smbios_blobs(vm.memory(), &config.smbios, &processors, uefi)
}

/// What firmware, and a guest that looks, can ask for.
fn items<V: Vm>(
    vm: &Arc<V>,
    machine: &Arc<Machine<V>>,
    config: &VmConfig,
    order: &str,
    smbios: &smbios::Blobs,
) -> Result<Items> {
    let mut items = Items::new(u32::from(config.cpus), config.smbios.uuid);
    items.file("etc/e820", e820::firmware_map(vm.memory()))?;
    items.file(smbios::ANCHOR_FILE, smbios.anchor.as_slice())?;
    items.file(smbios::TABLES_FILE, smbios.tables.as_slice())?;
    type Part = fn(acpi::Blobs) -> Vec<u8>;
    // What a guest changes in the machine changes values in them, not their lengths.
    let parts: [(&str, Part); 3] = [
        (acpi::TABLES_FILE, |blobs| blobs.tables),
        (acpi::RSDP_FILE, |blobs| blobs.rsdp),
        (acpi::LOADER_FILE, |blobs| blobs.loader),
    ];
    for (name, part) in parts {
        // The machine holds the device that holds this.
        let machine = Arc::downgrade(machine);
        let blobs = move || machine.upgrade().map(|machine| machine.acpi_blobs());
        items.made(
            name,
            Box::new(move || blobs().map(part).unwrap_or_default()),
        )?;
    }
    if !order.is_empty() {
        items.file("bootorder", order.as_bytes())?;
    }
    for file in &config.fw_cfg {
        let added = blob(file).and_then(|bytes| items.file(&file.name, bytes));
        added.with_context(|| format!("{}: fw_cfg.\"{}\"", file.place, file.name))?;
    }
    Ok(items)
}

fn blob(file: &FwCfgFile) -> Result<Vec<u8>> {
    match &file.contents {
        FwCfgContents::Text(text) => Ok(text.clone().into_bytes()),
        FwCfgContents::File(path) => {
            let file = boot::open_regular(path)?;
            let mut bytes = Vec::new();
            file.take(FILE_MAX + 1)
                .read_to_end(&mut bytes)
                .with_context(|| format!("Cannot read {}", path.display()))?;
            ensure!(
                bytes.len() as u64 <= FILE_MAX,
                "{} has more than {FILE_MAX} bytes",
                path.display()
            );
            Ok(bytes)
        }
    }
}

fn boot_list<V: Vm>(machine: &Machine<V>, config: &VmConfig, order: &[String]) -> Result<String> {
    let path = |name: &String| {
        let device = config.devices.iter().find(|device| device.name == *name);
        let bdf = device
            .and_then(|device| device.pci)
            .with_context(|| format!("boot_order: there is no PCI device {name}"))?;
        Ok(boot_order::path(machine.root(), bdf))
    };
    let paths = order.iter().map(path).collect::<Result<Vec<_>>>()?;
    Ok(boot_order::list(&paths))
}

impl<V: Vm> Guest<V> {
    /// Makes parked CPUs in power-on state ready to start. `restart`: a guest has run in this memory already.
    pub fn load<C: Vcpu + 'static>(
        &mut self,
        machine: &Machine<V>,
        vm: &Arc<V>,
        vcpus: &VcpuSet<C>,
        restart: bool,
    ) -> Result<()> {
        let (files, placing, cmdline, smbios, address_bits) = match self {
            Self::Kernel {
                files,
                placing,
                cmdline,
                smbios,
                address_bits,
            } => (files, placing.take(), cmdline, smbios, *address_bits),
            Self::Firmware(firmware) => {
                firmware.reset();
                return Ok(());
            }
        };
        let memory = vm.memory();
        machine.assign_resources()?;
        let rsdp = machine.write_acpi(memory)?;
        machine.write_smbios(memory, smbios)?;
        let placed = match placing {
            Some(placing) => placing.placed()?,
            None => files.place(memory, restart)?,
        };
        let direct = DirectBoot {
            cmdline,
            e820: &e820::map(memory),
            rsdp,
            address_bits,
            used: restart,
        };
        let entry = boot::prepare(memory, &placed, &direct)?;
        vcpus.for_each(|cpu, vcpu| entry.apply(cpu, vcpu))
    }

    /// Gives back what loading has left behind. For a time when nobody waits.
    pub fn tidy(&self) {
        if let Self::Kernel { files, .. } = self {
            files.tidy();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::config::Place;

    fn read(path: PathBuf) -> Result<Vec<u8>> {
        blob(&FwCfgFile {
            name: "opt/test".to_owned(),
            contents: FwCfgContents::File(path),
            place: Place {
                file: "vm.toml".into(),
                line: 1,
            },
        })
    }

    #[test]
    fn a_blob_that_was_replaced_after_its_check_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blob");
        std::fs::write(&path, b"text").unwrap();
        assert_eq!(read(path.clone()).unwrap(), b"text");
        let refusal = |path: PathBuf| format!("{:#}", read(path).unwrap_err());
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(FILE_MAX + 1).unwrap();
        let text = refusal(path);
        assert!(text.contains("has more than 67108864 bytes"), "{text}");
        for other in ["/dev/zero".into(), folder.path().to_path_buf()] {
            let text = refusal(other);
            assert!(text.contains("is not a regular file"), "{text}");
        }
        // Opening it must not wait for a writer.
        let fifo = folder.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.unwrap().success());
        let text = refusal(fifo);
        assert!(text.contains("is not a regular file"), "{text}");
        let text = refusal(folder.path().join("none"));
        assert!(text.contains("Cannot read"), "{text}");
    }
}

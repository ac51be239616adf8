//! What the lab boots: kernel, initrd and root disk of the guest, and level 1's initial root.

use super::{cd, cpio, directory, esp};
use crate::workspace::{self, Profile};
use crate::{packages, process};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Where the programs of the guest's disk come from, with the libraries they need.
const GUEST_PACKAGES: &[&str] = &[
    "busybox-static",
    "pciutils",
    "libpci3",
    "pci.ids",
    "libkmod2",
    "libudev1",
    "zlib1g",
    "liblzma5",
    "libssl3",
    "libzstd1",
    "libc6",
    "e2fsprogs",
    "libext2fs2",
    "libcom-err2",
    "libblkid1",
    "libuuid1",
    "util-linux",
    "ovmf",
    "memtest86+",
    "dmidecode",
    "acpica-tools",
    "nvme-cli",
    "libnvme1",
    "libjson-c5",
    "libdbus-1-3",
    "libsystemd0",
    "libcap2",
    "libgcrypt20",
    "libgpg-error0",
    "liblz4-1",
];
/// Programs of the guest's disk beside busybox.
const GUEST_PROGRAMS: &[&str] = &[
    "usr/bin/lspci",
    "sbin/mke2fs",
    "sbin/e2fsck",
    "sbin/blkdiscard",
    "usr/sbin/dmidecode",
    "usr/bin/acpidump",
    "usr/bin/iasl",
    "usr/sbin/nvme",
];
/// Firmware for guests, code and variables apart and both in one, and a program that is no Linux.
const FILES: &[&str] = &[
    "usr/share/OVMF/OVMF_CODE_4M.fd",
    "usr/share/OVMF/OVMF_VARS_4M.fd",
    "usr/share/ovmf/OVMF.fd",
    "boot/memtest86+x64.bin",
];
/// Modules of the guest's initrd, in the order of loading.
const GUEST_MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
];
/// Modules of the guest's root disk.
const GUEST_ROOT_MODULES: &[&str] = &[
    "button",
    "evdev",
    "msr",
    "pvpanic",
    "pvpanic-mmio",
    "cdrom",
    "isofs",
];
/// Modules of level 1, in the order of loading.
const LEVEL1_MODULES: &[&str] = &["irqbypass", "kvm", "kvm-amd"];
const PATIENCE: Duration = Duration::from_secs(300);

/// Everything below `target/lab`.
pub struct Lab {
    /// `target/lab`.
    pub directory: PathBuf,
    /// The kernel, compressed, for both levels.
    pub vmlinuz: PathBuf,
    /// The guest's initrd.
    pub initrd: PathBuf,
    /// The guest's root disk, to be copied before use.
    pub root: PathBuf,
    /// The same kernel as an ELF file.
    pub vmlinux: PathBuf,
    /// A FAT file system for firmware's own shell.
    pub esp: PathBuf,
    /// An image of a CD.
    pub cd: PathBuf,
    /// A disk with the firmware test suite.
    pub fwts: PathBuf,
    /// A disk with fio.
    pub fio: PathBuf,
    /// Level 1's initial root.
    pub level1: PathBuf,
    /// The build that is tested.
    pub profile: Profile,
    /// The kernel's version.
    version: String,
    unpacked: PathBuf,
    modules: PathBuf,
}

pub fn fresh(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory)
            .with_context(|| format!("cannot clear {}", directory.display()))?;
    }
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))
}

pub fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

pub fn copy_executable(from: &Path, to: &Path) -> Result<()> {
    copy(from, to)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

pub fn succeed(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let outcome = process::bounded(command, PATIENCE, false)?;
    if outcome.code() != Some(0) {
        bail!("{name}: {}\n{}", outcome.ending(), outcome.tail(20));
    }
    Ok(())
}

impl Lab {
    /// Makes what the guest needs, without the host.
    pub fn prepare_guest() -> Result<Self> {
        let lab = Self::places(Profile::Debug)?;
        lab.guest_initrd()?;
        lab.guest_root()?;
        lab.uncompressed_kernel()?;
        esp::shell(&lab.esp)?;
        cd::image(&lab.directory, &lab.initrd, &lab.cd)?;
        Ok(lab)
    }

    /// Makes everything, with the host and plugins of a profile, which must be built.
    pub fn prepare(profile: Profile) -> Result<Self> {
        let mut lab = Self::prepare_guest()?;
        lab.profile = profile;
        Ok(lab)
    }

    fn places(profile: Profile) -> Result<Self> {
        let directory = workspace::target().join("lab");
        let unpacked = directory.join("packages");
        // By old lists, one package of a kernel is there and the next has given way to its successor.
        if !unpacked.exists()
            && let Err(error) = packages::update()
        {
            println!("the package lists stay as they are: {error:#}");
        }
        let kernel = packages::dependency("linux-image-cloud-amd64", "linux-image-")?;
        let mut wanted = vec![kernel.as_str()];
        wanted.extend(GUEST_PACKAGES);
        packages::unpack(&wanted, &unpacked)?;
        let version = kernel.trim_start_matches("linux-image-").to_owned();
        Ok(Lab {
            vmlinuz: unpacked.join(format!("boot/vmlinuz-{version}")),
            vmlinux: directory.join("vmlinux"),
            initrd: directory.join("initrd"),
            root: directory.join("root.img"),
            esp: directory.join("esp.img"),
            cd: directory.join("cd.iso"),
            fwts: super::fwts::disk(&directory)?,
            fio: super::fio::disk(&directory)?,
            level1: directory.join("level1"),
            modules: unpacked.join(format!("lib/modules/{version}/kernel")),
            version,
            unpacked,
            profile,
            directory,
        })
    }

    fn module(&self, name: &str) -> Result<PathBuf> {
        fn search(directory: &Path, file: &str) -> Option<PathBuf> {
            fs::read_dir(directory).ok()?.flatten().find_map(|entry| {
                let path = entry.path();
                if path.is_dir() {
                    search(&path, file)
                } else {
                    (entry.file_name().to_str() == Some(file)).then_some(path)
                }
            })
        }
        search(&self.modules, &format!("{name}.ko")).with_context(|| {
            format!(
                "the kernel package has no module {name}.ko below {}",
                self.modules.display()
            )
        })
    }

    fn busybox(&self, tree: &Path) -> Result<()> {
        for name in [
            "bin", "proc", "sys", "dev", "root", "tmp", "etc", "mnt", "run",
        ] {
            fs::create_dir_all(tree.join(name))?;
        }
        copy_executable(
            &self.unpacked.join("bin/busybox"),
            &tree.join("bin/busybox"),
        )?;
        symlink("busybox", tree.join("bin/sh"))?;
        Ok(())
    }

    fn guest_initrd(&self) -> Result<()> {
        let tree = self.directory.join("initrd-tree");
        fresh(&tree)?;
        self.busybox(&tree)?;
        for name in GUEST_MODULES {
            copy(
                &self.module(name)?,
                &tree.join(format!("modules/{name}.ko")),
            )?;
        }
        copy_executable(&directory().join("guest/initrd-init"), &tree.join("init"))?;
        cpio::write(&tree, &self.initrd)
    }

    fn guest_root(&self) -> Result<()> {
        let mke2fs = packages::program("mke2fs", "e2fsprogs")?;
        let tree = self.directory.join("root-tree");
        fresh(&tree)?;
        self.busybox(&tree)?;
        let applets = process::bounded(
            Command::new(tree.join("bin/busybox")).arg("--list"),
            PATIENCE,
            false,
        )?;
        for applet in applets
            .output
            .lines()
            .filter(|name| !matches!(*name, "busybox" | "sh" | "lspci"))
        {
            symlink("busybox", tree.join("bin").join(applet))?;
        }
        for name in ["usr/bin", "sbin", "var", "lib"] {
            fs::create_dir_all(tree.join(name))?;
        }
        symlink("lib", tree.join("lib64"))?;
        for program in GUEST_PROGRAMS {
            copy_executable(&self.unpacked.join(program), &tree.join(program))?;
        }
        copy(
            &self.unpacked.join("usr/share/misc/pci.ids"),
            &tree.join("usr/share/misc/pci.ids"),
        )?;
        self.libraries(&tree.join("lib"))?;
        for name in GUEST_ROOT_MODULES {
            copy(
                &self.module(name)?,
                &tree.join(format!("lib/modules/{name}.ko")),
            )?;
        }
        for entry in fs::read_dir(directory().join("guest"))? {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            match name.as_str() {
                "initrd-init" => {}
                "init" => copy_executable(&path, &tree.join("sbin/init"))?,
                _ => copy_executable(&path, &tree.join("lab").join(name))?,
            }
        }
        copy(
            &directory().join("dmesg-allowed"),
            &tree.join("lab/dmesg-allowed"),
        )?;
        if self.root.exists() {
            fs::remove_file(&self.root)?;
        }
        succeed(
            Command::new(mke2fs)
                .args([
                    "-q",
                    "-t",
                    "ext4",
                    "-L",
                    "root",
                    "-E",
                    "root_owner=0:0",
                    "-d",
                ])
                .arg(&tree)
                .arg(&self.root)
                .arg("64M"),
        )
    }

    /// The shared libraries of the unpacked packages, and the loader.
    fn libraries(&self, into: &Path) -> Result<()> {
        for directory in ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"] {
            let directory = self.unpacked.join(directory);
            let entries = fs::read_dir(&directory)
                .with_context(|| format!("cannot list {}", directory.display()))?;
            for entry in entries {
                let path = entry?.path();
                let name = path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned();
                // `fs::copy` follows the links that give a library its short name.
                if path.is_file() && name.contains(".so.") {
                    copy_executable(&path, &into.join(name))?;
                }
            }
        }
        Ok(())
    }

    /// Takes the ELF kernel out of the compressed one (Linux Documentation/arch/x86/boot.rst:
    /// setup_sects, payload_offset, payload_length).
    fn uncompressed_kernel(&self) -> Result<()> {
        let image = fs::read(&self.vmlinuz)
            .with_context(|| format!("cannot read {}", self.vmlinuz.display()))?;
        let word = |at: usize| {
            image
                .get(at..at + 4)
                .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)
        };
        let (offset, length) = word(0x248)
            .zip(word(0x24c))
            .context("the kernel image has no setup header")?;
        let start = (usize::from(image[0x1f1]) + 1) * 512 + offset;
        let payload = image
            .get(start..start + length)
            .context("the kernel's payload lies outside its file")?;
        let (tool, package) = match payload {
            [0xfd, b'7', b'z', ..] => ("xz", "xz-utils"),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", "zstd"),
            [0x1f, 0x8b, ..] => ("gzip", "gzip"),
            [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", "lz4"),
            _ => bail!("the kernel's payload is compressed in a way that is not known here"),
        };
        let compressed = self.directory.join("vmlinux.compressed");
        // The kernel's build appends the uncompressed size; no tool wants to see it.
        fs::write(&compressed, &payload[..payload.len() - 4])?;
        let status = Command::new(packages::program(tool, package)?)
            .arg("-dc")
            .stdin(fs::File::open(&compressed)?)
            .stdout(fs::File::create(&self.vmlinux)?)
            .stderr(Stdio::inherit())
            .status()
            .with_context(|| format!("cannot run {tool}"))?;
        if !status.success() || !fs::read(&self.vmlinux)?.starts_with(b"\x7fELF") {
            bail!("{tool} did not give an ELF kernel ({status})");
        }
        fs::remove_file(&compressed)?;
        Ok(())
    }

    /// Makes level 1's initial root with the host, its plugins and every job.
    pub fn level1_root(&self) -> Result<()> {
        let tree = self.directory.join("level1-tree");
        fresh(&tree)?;
        self.busybox(&tree)?;
        copy_executable(&directory().join("level1-init"), &tree.join("init"))?;
        for name in GUEST_MODULES.iter().chain(LEVEL1_MODULES) {
            copy(
                &self.module(name)?,
                &tree.join(format!("modules/{name}.ko")),
            )?;
        }
        copy(&self.cr8_module()?, &tree.join("modules/cr8_intercept.ko"))?;
        let mut programs = vec![
            workspace::host(self.profile),
            workspace::emulated_host(self.profile),
        ];
        programs.extend(workspace::plugins(self.profile)?);
        // What jobs judge images by.
        programs.push(packages::program("qemu-img", "qemu-utils")?);
        for program in &programs {
            let name = program.file_name().context("a program without a name")?;
            let staged = tree.join("lab/bin").join(name);
            copy_executable(program, &staged)?;
            // Debug information would fill level 1's memory; it is of no use there.
            succeed(
                Command::new(packages::program("strip", "binutils")?)
                    .arg("--strip-debug")
                    .arg(&staged),
            )?;
            for library in needed_libraries(program)? {
                let inside = tree.join(library.strip_prefix("/").unwrap_or(&library));
                if !inside.exists() {
                    copy_executable(&library, &inside)?;
                }
            }
        }
        for job in super::Job::all(&directory())? {
            let name = job.file.file_name().unwrap_or_default();
            copy(&job.file, &tree.join("lab").join(name))?;
        }
        self.stage_guest(&tree.join("lab"))?;
        for disk in ["root.img", "esp.img", "fwts.img", "fio.img"] {
            succeed(
                Command::new(packages::program("gzip", "gzip")?)
                    .args(["-1", "-f"])
                    .arg(tree.join("lab").join(disk)),
            )?;
        }
        cpio::write(&tree, &self.level1)
    }

    /// Compiles level 1's own kernel module for its kernel.
    fn cr8_module(&self) -> Result<PathBuf> {
        let build = PathBuf::from(format!("/lib/modules/{}/build", self.version));
        if !build.exists() {
            packages::install(&format!("linux-headers-{}", self.version))?;
        }
        let source = self.directory.join("kernel");
        fresh(&source)?;
        for name in ["Kbuild", "cr8_intercept.c"] {
            copy(&directory().join("kernel").join(name), &source.join(name))?;
        }
        succeed(
            Command::new(packages::program("make", "make")?)
                .arg("-C")
                .arg(&build)
                .arg(format!("M={}", source.display()))
                .arg("modules"),
        )?;
        Ok(source.join("cr8_intercept.ko"))
    }

    /// Puts what VM files name beside them.
    pub fn stage_guest(&self, into: &Path) -> Result<()> {
        for name in FILES {
            let file = Path::new(name)
                .file_name()
                .context("a file without a name")?;
            copy(&self.unpacked.join(name), &into.join(file))?;
        }
        copy(&self.esp, &into.join("esp.img"))?;
        copy(&self.cd, &into.join("cd.iso"))?;
        copy(&self.fwts, &into.join("fwts.img"))?;
        copy(&self.fio, &into.join("fio.img"))?;
        fs::write(into.join("keep.img"), vec![0x6b; 1 << 20])?;
        copy(&self.vmlinuz, &into.join("vmlinuz"))?;
        copy(&self.vmlinux, &into.join("vmlinux"))?;
        copy(&self.initrd, &into.join("initrd"))?;
        copy(&self.root, &into.join("root.img"))
    }
}

/// The shared libraries that the loader takes for a program on this machine.
pub fn needed_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let outcome = process::bounded(Command::new("ldd").arg(program), PATIENCE, false)?;
    if outcome.code() != Some(0) || outcome.output.contains("not found") {
        bail!(
            "ldd {}: {}\n{}",
            program.display(),
            outcome.ending(),
            outcome.tail(20)
        );
    }
    let words = outcome
        .output
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(words.map(PathBuf::from).collect())
}

//! A disk with a Debian system that firmware boots, made of Debian packages: GPT, an EFI system partition with GRUB, and an
//! ext4 root. And two small disks whose GRUB only says its name, to tell which of them firmware took.

use super::images::succeed;
use super::{directory, esp};
use crate::{packages, process};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What the system has beside the minimum.
const PACKAGES: &[&str] = &[
    "systemd-sysv",
    "udev",
    "dbus",
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "zstd",
    "dmidecode",
    "acpica-tools",
    "pciutils",
    "cpuid",
    "cloud-init",
];
const UNWANTED: &[&str] = &["doc", "man", "locale", "info"];
const PATIENCE: Duration = Duration::from_secs(1200);

const MIB: u64 = 1 << 20;
/// Where the partitions begin, and the second ends.
const ESP: u64 = MIB;
const ROOT: u64 = 33 * MIB;
const END: u64 = 1023 * MIB;
const BYTES: u64 = 1024 * MIB;

/// The names by which VM files know the disks: the first has the system.
const NAMES: [&str; 3] = ["debian.img", "one.img", "two.img"];

/// The disks.
pub struct Disks(Vec<PathBuf>);

impl Disks {
    /// Each with the name by which VM files know it.
    pub fn named(&self) -> impl Iterator<Item = (&Path, &'static str)> {
        self.0.iter().map(PathBuf::as_path).zip(NAMES)
    }
}

/// Whether they can be made here; if not, why.
pub fn possible() -> Result<(), String> {
    match rustix::process::geteuid().is_root() {
        true => Ok(()),
        false => Err("root alone can make a disk with a Debian system: run this with sudo".into()),
    }
}

/// Makes them in `lab`, unless they are there and made of the same.
pub fn prepare(lab: &Path) -> Result<Disks> {
    let disks = Disks(NAMES.iter().map(|name| lab.join(name)).collect());
    let stamp = lab.join("debian.stamp");
    let made_of = recipe()?;
    let there = disks.named().all(|(file, _)| file.is_file());
    if there && fs::read_to_string(&stamp).is_ok_and(|text| text == made_of) {
        return Ok(disks);
    }
    println!("making a Debian disk for firmware (a minute or two, once)");
    let grub = lab.join("bootx64.efi");
    for (image, name) in disks.named() {
        if name == NAMES[0] {
            let tree = system(lab)?;
            loader(&source("grub.cfg"), &grub)?;
            fill(image, &grub, &tree)?;
            fs::remove_dir_all(&tree)
                .with_context(|| format!("cannot remove {}", tree.display()))?;
        } else {
            let name = name.trim_end_matches(".img");
            loader(&source(&format!("grub-{name}.cfg")), &grub)?;
            esp::format(image, 32 * MIB)?;
            install(&image.to_string_lossy(), &grub)?;
        }
    }
    fs::write(&stamp, made_of)?;
    Ok(disks)
}

fn source(name: &str) -> PathBuf {
    directory().join("uefi").join(name)
}

/// Everything that decides what the disks are.
fn recipe() -> Result<String> {
    let mut text = format!("{PACKAGES:?} {UNWANTED:?} {BYTES} {ROOT}\n");
    let mut files: Vec<PathBuf> = fs::read_dir(directory().join("uefi"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.push(directory().join("dmesg-allowed"));
    files.sort();
    for file in files {
        text += &fs::read_to_string(&file)
            .with_context(|| format!("cannot read {}", file.display()))?;
    }
    Ok(text)
}

/// The system as a directory, owned by root.
fn system(lab: &Path) -> Result<PathBuf> {
    let tree = lab.join("debian-tree");
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("cannot clear {}", tree.display()))?;
    }
    let mmdebstrap = packages::program("mmdebstrap", "mmdebstrap")?;
    // The initrd has what this board needs; with every driver it is ten times as large, which firmware takes its time over.
    let hooks = "mkdir -p \"$1/etc/initramfs-tools/conf.d\" \"$1/etc/initramfs-tools/hooks\" && \
         echo MODULES=list >\"$1/etc/initramfs-tools/conf.d/lab\" && \
         printf '#!/bin/sh\\n[ \"$1\" = prereqs ] && exit\\n. /usr/share/initramfs-tools/hook-functions\\n\
         manual_add_modules virtio_pci virtio_blk nvme ext4\\n' >\"$1/etc/initramfs-tools/hooks/lab\" && \
         chmod +x \"$1/etc/initramfs-tools/hooks/lab\"";
    let mut command = Command::new(mmdebstrap);
    command
        .arg("--variant=minbase")
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg(format!("--essential-hook={hooks}"));
    for folder in UNWANTED {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{folder}/*"));
    }
    let release = release()?;
    let outcome = process::bounded(command.arg(release).arg(&tree), PATIENCE, false)?;
    if outcome.code() != Some(0) {
        bail!("mmdebstrap: {}\n{}", outcome.ending(), outcome.tail(20));
    }
    fs::write(tree.join("etc/hostname"), "lab\n")?;
    fs::write(tree.join("etc/fstab"), "LABEL=root / ext4 defaults 0 1\n")?;
    // root without a password: this system is reached by its own console alone.
    let shadow = tree.join("etc/shadow");
    let text = fs::read_to_string(&shadow)?;
    fs::write(&shadow, text.replacen("root:*:", "root::", 1))?;
    fs::create_dir_all(tree.join("lab"))?;
    for (from, to) in [
        (source("check"), "lab/check"),
        (source("check-seed"), "lab/check-seed"),
        (source("cloud.cfg"), "etc/cloud/cloud.cfg.d/99_lab.cfg"),
        (directory().join("dmesg-allowed"), "lab/dmesg-allowed"),
    ] {
        let to = tree.join(to);
        fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
    }
    Ok(tree)
}

/// This machine's Debian release.
fn release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("this needs a Debian system")?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.context("/etc/os-release names no release")?.to_owned())
}

/// GRUB with its modules and a configuration, as one EFI program.
fn loader(config: &Path, to: &Path) -> Result<()> {
    // The program that makes it comes with the modules' dependencies.
    let modules = Path::new("/usr/lib/grub/x86_64-efi/modinfo.sh");
    if !modules.is_file() {
        packages::install("grub-efi-amd64-bin")?;
    }
    let make = packages::program("grub-mkstandalone", "grub-common")?;
    succeed(
        Command::new(make)
            .args(["-O", "x86_64-efi", "--locales=", "--fonts=", "--themes="])
            .arg("--install-modules=part_gpt ext2 linux normal serial terminal echo sleep halt")
            .arg("-o")
            .arg(to)
            .arg(format!("boot/grub/grub.cfg={}", config.display())),
    )
}

/// Copies a loader to where firmware looks for one on a disk that it doesn't know.
fn install(image: &str, loader: &Path) -> Result<()> {
    for folder in ["::/EFI", "::/EFI/BOOT"] {
        let mmd = packages::program("mmd", "mtools")?;
        succeed(Command::new(mmd).args(["-i", image, folder]))?;
    }
    esp::add(Path::new(image), loader, "::/EFI/BOOT/BOOTX64.EFI")
}

/// Lays out the disk.
fn fill(image: &Path, grub: &Path, tree: &Path) -> Result<()> {
    let part = image.with_extension("esp");
    esp::format(&part, ROOT - ESP)?;
    install(&part.to_string_lossy(), grub)?;
    let file =
        fs::File::create(image).with_context(|| format!("cannot create {}", image.display()))?;
    file.set_len(BYTES)?;
    let sgdisk = packages::program("sgdisk", "gdisk")?;
    let sector = |at: u64| at / 512;
    succeed(
        Command::new(sgdisk)
            .arg(format!("-n1:{}:{}", sector(ESP), sector(ROOT) - 1))
            .arg("-t1:ef00")
            .arg(format!("-n2:{}:{}", sector(ROOT), sector(END) - 1))
            .arg("-t2:8300")
            .arg(image),
    )?;
    file.write_all_at(&fs::read(&part)?, ESP)?;
    fs::remove_file(&part)?;
    let mke2fs = packages::program("mke2fs", "e2fsprogs")?;
    succeed(
        Command::new(mke2fs)
            .args(["-q", "-t", "ext4", "-L", "root", "-F"])
            .args(["-O", "^metadata_csum", "-E"])
            .arg(format!("offset={ROOT},root_owner=0:0"))
            .arg("-d")
            .arg(tree)
            .arg(image)
            .arg(format!("{}k", (END - ROOT) / 1024)),
    )
}

//! Firmware: its image ends at 4 GiB, where a CPU starts, and flash with its variables lies below it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::path::{directory_of, open_regular};
use crate::bus::Registers;
use crate::hypervisor::Vm;
use crate::hypervisor::rom::Rom;
use crate::machine::Machine;
use crate::machine::flash::{BootromWindow, Flash};
use crate::memory::PAGE;

/// A CPU's first instruction is 16 bytes below.
const END: u64 = 1 << 32;
/// The most that image and variables have together: below are local APICs, and what KVM takes for itself.
pub const BOOTROM_MAX: u64 = 16 << 20;

/// Where firmware comes from.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// The image.
    pub image: &'a Path,
    /// Where variables are kept.
    pub vars: Option<&'a Path>,
    /// What variables start from, if they aren't kept, or not there yet.
    pub vars_template: Option<&'a Path>,
}

/// Firmware in its place.
pub struct Firmware<V: Vm> {
    flash: Option<Arc<Flash<V>>>,
}

impl<V: Vm> Firmware<V> {
    /// Puts it below 4 GiB. Before the guest runs.
    ///
    /// # Errors
    /// A file is missing, has a wrong size, is used by another VM, or is no firmware: the text names it.
    pub fn install(vm: &Arc<V>, machine: &Machine<V>, files: &Files<'_>) -> Result<Self> {
        let image = read(files.image)?;
        check_image(files.image, &image)?;
        let store = match (files.vars, files.vars_template) {
            (Some(vars), template) => Some(Store::kept(vars, template)?),
            (None, Some(template)) => Some(Store {
                path: template.to_owned(),
                bytes: read(template)?,
                file: None,
            }),
            (None, None) => None,
        };
        let base = END - image.len() as u64;
        let rom = fill(vm, base, &image)?;
        claim(
            machine,
            "the bootrom",
            &rom,
            Arc::new(BootromWindow::new(Arc::clone(&rom))),
        )?;
        let flash = store
            .map(|store| -> Result<Arc<Flash<V>>> {
                let len = store.bytes.len() as u64;
                check_size(&store.path, len)?;
                let total = len + image.len() as u64;
                ensure!(
                    total <= BOOTROM_MAX,
                    "{} and {} have {total} bytes together, and {BOOTROM_MAX} fit below 4 GiB",
                    files.image.display(),
                    store.path.display()
                );
                let rom = fill(vm, base - len, &store.bytes)?;
                let flash = Arc::new(Flash::new(Arc::clone(vm), Arc::clone(&rom), store.file));
                claim(machine, "firmware variables", &rom, flash.clone())?;
                Ok(flash)
            })
            .transpose()?;
        Ok(Self { flash })
    }

    /// Power-on state. While no vCPU runs.
    pub fn reset(&self) {
        if let Some(flash) = &self.flash {
            flash.reset();
        }
    }
}

impl<V: Vm> Drop for Firmware<V> {
    fn drop(&mut self) {
        if let Some(flash) = &self.flash {
            flash.sync();
        }
    }
}

fn claim<V: Vm>(
    machine: &Machine<V>,
    owner: &str,
    rom: &Rom,
    target: Arc<dyn Registers>,
) -> Result<()> {
    machine.add_window(owner, rom.gpa(), rom.len(), &target)
}

fn fill<V: Vm>(vm: &Arc<V>, gpa: u64, bytes: &[u8]) -> Result<Arc<Rom>> {
    let rom = vm.create_rom(gpa, bytes.len() as u64)?;
    rom.write(0, bytes);
    Ok(rom)
}

/// All of a file, which has no more than [`BOOTROM_MAX`] bytes.
fn read(path: &Path) -> Result<Vec<u8>> {
    read_all(&open_regular(path)?, path)
}

fn read_all(file: &File, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(BOOTROM_MAX + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("Cannot read {}", path.display()))?;
    check_size(path, bytes.len() as u64)?;
    Ok(bytes)
}

fn check_size(path: &Path, len: u64) -> Result<()> {
    ensure!(len > 0, "{} is empty", path.display());
    ensure!(
        len <= BOOTROM_MAX,
        "{} has more than the {BOOTROM_MAX} bytes that fit below 4 GiB",
        path.display()
    );
    ensure!(
        len.is_multiple_of(PAGE),
        "{} has {len} bytes, which is no multiple of {PAGE}",
        path.display()
    );
    Ok(())
}

/// The last 16 bytes are what a CPU executes first. Nothing there is the sign of a file of variables.
fn check_image(path: &Path, image: &[u8]) -> Result<()> {
    let reset = &image[image.len() - 16..];
    if reset.iter().all(|byte| *byte == reset[0]) {
        bail!(
            "{} is no bootrom: where a CPU starts, 16 bytes before its end, it has only {:#04x}; a file of variables belongs \
             into `bootrom_vars`",
            path.display(),
            reset[0]
        );
    }
    Ok(())
}

/// Variables of firmware.
struct Store {
    path: PathBuf,
    bytes: Vec<u8>,
    /// Where they are kept.
    file: Option<File>,
}

impl Store {
    /// Opens a file for this VM alone, after making it from `template` if it isn't there.
    fn kept(path: &Path, template: Option<&Path>) -> Result<Self> {
        if let Some(template) = template {
            create(path, &read(template)?)?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .with_context(|| {
                format!(
                    "Cannot open {} for firmware's variables to be kept",
                    path.display()
                )
            })?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "{} is in use by another VM: give each VM a file of its own",
                path.display()
            ),
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("Cannot lock {}", path.display()));
            }
        }
        let bytes = read_all(&file, path)?;
        Ok(Self {
            path: path.to_owned(),
            bytes,
            file: Some(file),
        })
    }
}

/// Makes a file with these contents, all of them or none. One that is there already stays as it is.
fn create(path: &Path, bytes: &[u8]) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let name = || format!("Cannot create {}", path.display());
    let mut temporary = tempfile::Builder::new()
        .prefix(".vars-")
        .tempfile_in(directory_of(path))
        .with_context(name)?;
    temporary.write_all(bytes).with_context(name)?;
    temporary.as_file().sync_all().with_context(name)?;
    match temporary.persist_noclobber(path) {
        Ok(_) => {
            log::info!("{} is new", path.display());
            Ok(())
        }
        // Another VM was faster; whose it is decides the lock.
        Err(_) if path.exists() => Ok(()),
        Err(error) => Err(error.error).with_context(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Board;
    use crate::pci::fake_vm::FakeVm;
    use std::fs;

    struct Bench {
        folder: tempfile::TempDir,
        vm: Arc<FakeVm>,
        machine: Machine<FakeVm>,
    }

    impl Bench {
        fn new() -> Self {
            let vm = Arc::new(FakeVm::default());
            let machine = Machine::new(
                vm.clone(),
                vm.memory(),
                vec![0],
                Board::default(),
                Arc::default(),
                Arc::new(|_| {}),
            )
            .unwrap();
            let folder = tempfile::tempdir().unwrap();
            let mut image = vec![0; 0x2000];
            image[0x1ff0] = 0xea;
            fs::write(folder.path().join("code"), image).unwrap();
            fs::write(folder.path().join("template"), vec![0x5a; 0x1000]).unwrap();
            Self {
                folder,
                vm,
                machine,
            }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn install(
            &self,
            image: &str,
            vars: Option<&str>,
            template: Option<&str>,
        ) -> Result<Firmware<FakeVm>> {
            let [vars, template] = [vars, template].map(|name| name.map(|name| self.path(name)));
            let files = Files {
                image: &self.path(image),
                vars: vars.as_deref(),
                vars_template: template.as_deref(),
            };
            Firmware::install(&self.vm, &self.machine, &files)
        }

        fn refusal(&self, image: &str, vars: Option<&str>, template: Option<&str>) -> String {
            match self.install(image, vars, template) {
                Ok(_) => panic!("{image} was accepted"),
                Err(error) => format!("{error:#}"),
            }
        }
    }

    #[test]
    fn image_ends_at_4_gib_and_variables_lie_below() {
        let bench = Bench::new();
        let firmware = bench.install("code", None, Some("template")).unwrap();
        let mut io = bench.machine.exit_handler();
        use crate::hypervisor::ExitHandler;
        assert_eq!(io.mmio_read(0xffff_fff0, 1), 0xea);
        assert_eq!(io.mmio_read(0xffff_dffc, 4), 0x5a5a_5a5a);
        assert_eq!(io.mmio_read(0xffff_cffc, 4), 0xffff_ffff);
        io.mmio_write(0xffff_fff0, 1, 0x12);
        assert_eq!(io.mmio_read(0xffff_fff0, 1), 0xea);
        for value in [0x40, 0x12, 0xff] {
            io.mmio_write(0xffff_d000, 1, value);
        }
        assert_eq!(io.mmio_read(0xffff_d000, 1), 0x12);
        drop(firmware);
        assert_eq!(fs::read(bench.path("template")).unwrap(), [0x5a; 0x1000]);
    }

    #[test]
    fn kept_variables_start_from_the_template_once() {
        let bench = Bench::new();
        let first = bench
            .install("code", Some("vars"), Some("template"))
            .unwrap();
        let text = bench.refusal("code", Some("vars"), None);
        assert!(text.contains("in use by another VM"), "{text}");
        let mut io = bench.machine.exit_handler();
        use crate::hypervisor::ExitHandler;
        for value in [0x40, 0x12, 0xff] {
            io.mmio_write(0xffff_d001, 1, value);
        }
        drop(first);
        let kept = fs::read(bench.path("vars")).unwrap();
        assert_eq!(kept[..3], [0x5a, 0x12, 0x5a]);
        // What is there is not made anew.
        fs::write(bench.path("older"), kept).unwrap();
        let other = Bench {
            folder: bench.folder,
            ..Bench::new()
        };
        let _second = other
            .install("code", Some("older"), Some("template"))
            .unwrap();
        let value = other.machine.exit_handler().mmio_read(0xffff_d000, 2);
        assert_eq!(value, 0x125a);
    }

    #[test]
    fn what_is_no_firmware_is_refused_by_name() {
        let bench = Bench::new();
        for (name, bytes, expected) in [
            ("odd", vec![1; 0x1001], "no multiple of 4096"),
            ("empty", vec![], "is empty"),
            (
                "large",
                vec![1; (BOOTROM_MAX + PAGE) as usize],
                "more than the 16777216 bytes",
            ),
            ("ones", vec![0xff; 0x1000], "is no bootrom"),
        ] {
            fs::write(bench.path(name), bytes).unwrap();
            let text = bench.refusal(name, None, None);
            assert!(text.contains(expected) && text.contains(name), "{text}");
        }
        assert!(bench.refusal("none", None, None).contains("Cannot read"));
        assert!(
            bench
                .refusal("code", Some("none"), None)
                .contains("Cannot open")
        );
        let text = bench.refusal("code", Some("odd"), None);
        assert!(text.contains("no multiple of 4096"), "{text}");
        let text = bench.refusal("code", Some("nowhere/vars"), Some("template"));
        assert!(text.contains("Cannot create"), "{text}");
        let most = vec![1; (BOOTROM_MAX - PAGE) as usize];
        fs::write(bench.path("most"), most).unwrap();
        let text = bench.refusal("code", Some("most"), None);
        assert!(text.contains("together"), "{text}");
    }
}

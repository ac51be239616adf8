//! Shared objects to load, and a host around devices without a VM: memory, an I/O thread, a record of faults.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use vmm_abi::KIND_DEVICE;
use vmm_host::bus::Registers;
use vmm_host::config::OnFault;
use vmm_host::memory::GuestMemory;
use vmm_host::plugins::device::Device;
use vmm_host::plugins::instance::{Instance, Shared, Startup};
use vmm_host::plugins::iothread::IoThread;
use vmm_host::plugins::loader::Loader;
use vmm_host::plugins::manifest::Manifest;
use vmm_host::plugins::memory_table::MemoryRecord;
use vmm_host::plugins::object::{Backends, Object};
use vmm_host::plugins::schema::OptionValue;
use vmm_host::plugins::search::Plugin;

/// The shared object of the crate `name` that cargo has built for this test.
pub fn built(name: &str) -> PathBuf {
    let file = format!("lib{}.so", name.replace('-', "_"));
    let path = std::env::current_exe().unwrap().with_file_name(file);
    assert!(path.is_file(), "{} is not built", path.display());
    path
}

/// A path below the workspace.
pub fn workspace(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// Compiles a C source with the committed header.
pub fn compile(source: &Path, defines: &[&str], out: &Path) {
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let done = Command::new(compiler)
        .args([
            "-std=c11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared",
        ])
        .args(["-fvisibility=hidden", "-I"])
        .arg(workspace("plugin-api/abi/include"))
        .args(defines)
        .arg("-o")
        .args([out, source])
        .output()
        .expect("this test needs a C compiler");
    let text = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{text}");
}

/// What a search finds at `path`.
pub fn inspected(path: &Path) -> Plugin {
    let manifest = Manifest::read(path).unwrap();
    Plugin {
        path: path.to_owned(),
        directory: 0,
        manifest,
    }
}

/// The host's half of some devices.
pub struct Stage {
    loader: Loader,
    shared: &'static Shared,
    faults: Mutex<Receiver<String>>,
    _io: IoThread,
}

impl Stage {
    pub fn new() -> Stage {
        let io = IoThread::start().unwrap();
        let (sender, faults) = channel();
        let shared = Shared {
            memory: MemoryRecord::new(&Arc::new(GuestMemory::new(2 << 20).unwrap())),
            io: io.shared(),
            events: Arc::new(move |event| drop(sender.send(format!("{event:?}")))),
            startup: Startup::new(|| ()),
        };
        Stage {
            loader: Loader::default(),
            shared: Box::leak(Box::new(shared)),
            faults: Mutex::new(faults),
            _io: io,
        }
    }

    /// The first driver of the plugin at `path`, with the defaults of its manifest except for `options`.
    pub fn device(&mut self, path: &Path, options: &[(&str, &str)]) -> Result<Placed> {
        let plugin = inspected(path);
        let loaded = self.loader.load(&plugin)?;
        let driver = &plugin.manifest.drivers[0];
        let value = |name: &str| options.iter().find(|(key, _)| *key == name);
        let values: Vec<(String, OptionValue)> = driver
            .options
            .iter()
            .filter_map(|option| {
                let given =
                    value(&option.name).map(|(_, text)| OptionValue::Text(text.to_string()));
                Some((option.name.clone(), given.or(option.default.clone())?))
            })
            .collect();
        let title = format!("plugin {} {}", loaded.name, loaded.version);
        let instance = Instance::new("dev.it".to_owned(), title, OnFault::Stop, self.shared);
        let backends = Backends::new();
        let object = Object::create(
            &loaded,
            KIND_DEVICE,
            &driver.name,
            &values,
            &backends,
            instance,
        )
        .context("create")?;
        let object = Arc::new(object);
        let device = Device::new(object.clone()).inspect_err(|_| object.release())?;
        device.start()?;
        let registers = device.registers();
        Ok(Placed { device, registers })
    }

    /// What an object of a plugin is given.
    pub fn host(&self) -> &'static vmm_abi::Host {
        let title = "plugin it 1".to_owned();
        Instance::new("dev.it".to_owned(), title, OnFault::Stop, self.shared).host()
    }

    /// The next fault that is reported, which ought to be soon.
    pub fn fault(&self) -> String {
        let faults = self.faults.lock().unwrap();
        faults.recv_timeout(Duration::from_secs(20)).unwrap()
    }
}

/// A started device.
pub struct Placed {
    device: Device,
    registers: Arc<dyn Registers>,
}

impl Placed {
    pub fn read(&self) -> u64 {
        self.registers.read(0, 0, 1)
    }

    pub fn write(&self, value: u64) {
        self.registers.write(0, 0, 1, value);
    }

    /// What the guest reads from a port that gives a text letter by letter.
    pub fn text(&self) -> String {
        std::iter::repeat_with(|| self.read() as u8)
            .take_while(|byte| *byte != 0)
            .map(char::from)
            .collect()
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        self.device.end();
    }
}

//! Builds a VM: plugins, memory, backends, devices, CPUs, in this order.

use std::collections::VecDeque;
use std::fs::{File, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use vmm_abi::{KIND_BLOCK, KIND_CHAR, KIND_DEVICE};

use super::guest::Images;
use super::making::Making;
use super::signals::Signals;
use super::watched::Watched;
use super::{Mailbox, Message, Objects, Vm};
use crate::config::{BackendConfig, DebugConfig, DeviceConfig, OnFault, VmConfig};
use crate::diagnose::{Mark, Timeline};
use crate::hypervisor::Vm as Hypervisor;
use crate::machine::{DebugOutput, DebugPort, Machine};
use crate::plugins::device::{Description, Device};
use crate::plugins::instance::{Instance, Shared, Startup};
use crate::plugins::iothread::IoThread;
use crate::plugins::loader::{Loaded, Loader};
use crate::plugins::memory_table::MemoryRecord;
use crate::plugins::object::{Backends, Object};
use crate::plugins::schema::BackendKind;
use crate::plugins::wiring::Isa;
use crate::vcpu::VcpuSet;

pub(super) fn build<H: Hypervisor>(
    making: Making<H>,
    config: VmConfig,
    started: Instant,
) -> Result<Vm<H>> {
    let timeline = Arc::new(Timeline::new(started));
    timeline.mark(Mark::ConfigRead);
    let (sender, messages) = channel();
    let mailbox = Mailbox {
        sender,
        freezer: Arc::default(),
    };
    let signals = Signals::register(&mailbox)?;
    let images = Images::open(&config.boot)?;
    let debug_port = Arc::new(DebugPort::new(debug_output(&config)?));
    making.order(&config, images.kernel());
    let mut plugins = Plugins::load(&config)?;
    timeline.mark(Mark::PluginsLoaded);

    let (hypervisor, placing, vcpus) = making.vm()?;
    timeline.mark(Mark::VmCreated);

    let io = IoThread::start()?;
    let released = mailbox.sender.clone();
    let shared: &'static Shared = Box::leak(Box::new(Shared {
        memory: MemoryRecord::new(hypervisor.memory()),
        io: io.shared(),
        events: mailbox.events(),
        // Without a receiver the VM is gone already.
        startup: Startup::new(move || drop(released.send(Message::Released))),
    }));
    let machine = Arc::new(Machine::new(
        hypervisor.clone(),
        hypervisor.memory(),
        (0..u32::from(config.cpus))
            .map(|cpu| config.cpu_model.topology.apic_id(cpu))
            .collect(),
        config.board,
        debug_port.clone(),
        mailbox.events(),
    )?);
    let mut objects = Objects::default();
    for backend in &config.backends {
        objects.backends.push(
            plugins
                .backend(backend, config.backend_on_fault(backend), shared)
                .with_context(|| place(&backend.label(), &backend.place))?,
        );
    }
    let mut isa = Vec::new();
    for device in &config.devices {
        let place = || place(&device.label(), &device.place);
        objects
            .devices
            .push(plugins.device(device, shared).with_context(place)?);
        if let Some(made) = objects.devices.last() {
            // Its errors say whose they are.
            let place = || device.place.to_string();
            isa.extend(connect(&machine, device, made).with_context(place)?);
        }
    }
    let guest = images.place(placing, &hypervisor, &machine, &config)?;
    timeline.mark(Mark::DevicesCreated);

    let vcpus = vcpus.made()?;
    let spoke = Arc::new(AtomicBool::new(false));
    let handler = |_| Watched::new(machine.exit_handler(), timeline.clone(), spoke.clone());
    let vcpus = VcpuSet::spawn(
        vcpus,
        hypervisor.memory().clone(),
        &config.cpu_binding,
        handler,
        mailbox.events(),
    )?;
    // The one place that sets it.
    let _ = mailbox.freezer.set(vcpus.freezer());
    Ok(Vm {
        config,
        vcpus,
        machine,
        isa,
        objects,
        shared,
        _io: io,
        hypervisor,
        guest,
        messages,
        signals: Some(signals),
        waiting: VecDeque::new(),
        timeline,
        debug_port,
        spoke,
        asked_to_stop: false,
        started,
    })
}

/// Where `[main] debug_port` sends what firmware says.
fn debug_output(config: &VmConfig) -> Result<DebugOutput> {
    Ok(match &config.debug_port {
        DebugConfig::Off => DebugOutput::Off,
        DebugConfig::Log => DebugOutput::Log,
        DebugConfig::File(path) => DebugOutput::File(
            debug_file(path).with_context(|| format!("[main] debug_port: {}", path.display()))?,
        ),
    })
}

/// An empty file, for this VM alone: a second start of a VM must not empty the file of the first. It does not block: a FIFO
/// without a reader is refused here, and one that is full later loses the rest of the text instead of holding a vCPU.
fn debug_file(path: &Path) -> Result<File> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .context("it can't be written")?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => bail!("another VM writes to it"),
        Err(TryLockError::Error(error)) => return Err(error).context("it can't be locked"),
    }
    if file.metadata()?.is_file() {
        file.set_len(0).context("it can't be emptied")?;
    }
    Ok(file)
}

/// Says whose error it is: `vm.toml:12: dev.block0`.
fn place(label: &str, place: &crate::config::Place) -> String {
    format!("{place}: {label}")
}

/// The loaded plugins and what they have made so far.
struct Plugins {
    loader: Loader,
    backends: Backends,
}

impl Plugins {
    /// Loads every plugin that the VM names, before anything is created.
    fn load(config: &VmConfig) -> Result<Self> {
        let mut loader = Loader::default();
        for backend in &config.backends {
            loader
                .load(&backend.backend.plugin)
                .with_context(|| place(&backend.label(), &backend.place))?;
        }
        for device in &config.devices {
            loader
                .load(&device.driver.plugin)
                .with_context(|| place(&device.label(), &device.place))?;
        }
        Ok(Self {
            loader,
            backends: Backends::new(),
        })
    }

    fn backend(
        &mut self,
        config: &BackendConfig,
        on_fault: OnFault,
        shared: &'static Shared,
    ) -> Result<Arc<Object>> {
        let plugin = self.loader.load(&config.backend.plugin)?;
        let kind = match config.kind {
            BackendKind::Block => KIND_BLOCK,
            BackendKind::Char => KIND_CHAR,
        };
        let instance = Instance::new(config.label(), title(&plugin), on_fault, shared);
        let name = &config.backend.backend().name;
        let object = Object::create(
            &plugin,
            kind,
            name,
            &config.options,
            &self.backends,
            instance,
        )?;
        object
            .check_backend(config.kind)
            .inspect_err(|_| object.release())?;
        let object = Arc::new(object);
        self.backends
            .insert((config.kind, config.name.clone()), object.clone());
        Ok(object)
    }

    fn device(&mut self, config: &DeviceConfig, shared: &'static Shared) -> Result<Device> {
        let plugin = self.loader.load(&config.driver.plugin)?;
        let instance = Instance::new(config.label(), title(&plugin), config.on_fault, shared);
        let name = &config.driver.driver().name;
        let object = Object::create(
            &plugin,
            KIND_DEVICE,
            name,
            &config.options,
            &self.backends,
            instance,
        )?;
        let object = Arc::new(object);
        Device::new(object.clone()).inspect_err(|_| object.release())
    }
}

fn title(plugin: &Loaded) -> String {
    format!("plugin {} {}", plugin.name, plugin.version)
}

/// Gives a device its place in the machine.
fn connect<H: Hypervisor>(
    machine: &Machine<H>,
    config: &DeviceConfig,
    device: &Device,
) -> Result<Option<Arc<Isa<H>>>> {
    let label = config.label();
    match (&device.description, config.pci) {
        (Description::Isa(desc), None) => {
            let isa = Arc::new(Isa(machine.add_isa(&label, desc, &device.registers())?));
            device.instance().connect(isa.clone());
            Ok(Some(isa))
        }
        (Description::Pci(desc), Some(bdf)) => {
            let function = machine.add_pci(
                &label,
                bdf,
                desc,
                device.registers(),
                device.live_capability().with_context(|| label.clone())?,
            )?;
            device.instance().connect(function);
            Ok(None)
        }
        (Description::Isa(_), Some(_)) => {
            bail!(
                "{label}: the manifest says that it is a PCI function, the plugin's object is none"
            )
        }
        (Description::Pci(_), None) => {
            bail!("{label}: the plugin's object is a PCI function, which its manifest does not say")
        }
    }
}

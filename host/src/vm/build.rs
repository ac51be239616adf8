//! Builds a VM: plugins, memory, backends, devices, CPUs, in this order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use vmm_abi::{KIND_BLOCK, KIND_CHAR, KIND_DEVICE};

use super::{Begun, Mailbox, Message, Objects, Vm, signals};
use crate::boot::Image;
use crate::bus::BusAccess;
use crate::config::{BackendConfig, BootKernel, DeviceConfig, OnFault, VmConfig};
use crate::diagnose::{Mark, Timeline};
use crate::hypervisor::{Backend, ExitHandler, Vm as _};
use crate::machine::Machine;
use crate::plugins::device::{Description, Device};
use crate::plugins::instance::{Instance, Shared, Startup};
use crate::plugins::iothread::IoThread;
use crate::plugins::loader::{Loaded, Loader};
use crate::plugins::memory_table::MemoryRecord;
use crate::plugins::object::{Backends, Object};
use crate::plugins::schema::BackendKind;
use crate::plugins::wiring::Isa;
use crate::vcpu::VcpuSet;

pub(super) fn build(begun: Begun, config: VmConfig, started: Instant) -> Result<Vm> {
    let timeline = Arc::new(Timeline::new(started));
    timeline.mark(Mark::ConfigRead);
    let (sender, messages) = channel();
    let mailbox = Mailbox {
        sender,
        freezer: Arc::default(),
    };
    signals::deliver(&mailbox)?;
    let (kernel, initrd) = images(&config)?;
    let mut plugins = Plugins::load(&config)?;
    timeline.mark(Mark::PluginsLoaded);

    let hypervisor = Arc::new(Backend::create(
        begun,
        &config.name,
        config.memory_bytes,
        &config.backing,
    )?);
    let cpus = u32::from(config.cpus);
    let max = hypervisor.max_vcpus();
    ensure!(
        cpus <= max,
        "[main] cpus = {cpus} is more than this host's hypervisor allows: at most {max}"
    );
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
        cpus,
        config.board,
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
    timeline.mark(Mark::DevicesCreated);

    let vcpus = (0..cpus)
        .map(|id| hypervisor.create_vcpu(id, cpus))
        .collect::<Result<Vec<_>>>()?;
    let handler = |_| Watched {
        bus: machine.exit_handler(),
        timeline: timeline.clone(),
        wrote: false,
    };
    let vcpus = VcpuSet::spawn(
        vcpus,
        hypervisor.memory().clone(),
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
        kernel,
        initrd,
        messages,
        waiting: VecDeque::new(),
        timeline,
        asked_to_stop: false,
    })
}

/// Says whose error it is: `vm.toml:12: dev.block0`.
fn place(label: &str, place: &crate::config::Place) -> String {
    format!("{place}: {label}")
}

fn images(config: &VmConfig) -> Result<(Image, Option<Image>)> {
    let kernel = match &config.boot.kernel {
        BootKernel::File(path) => Image::open("kernel", path)?,
        BootKernel::Builtin(name) if name == "selftest" => {
            Image::built_in(name, vmm_selftest::IMAGE)
        }
        BootKernel::Builtin(name) => bail!("there is no builtin kernel {name}"),
    };
    let initrd = config
        .boot
        .initrd
        .as_deref()
        .map(|path| Image::open("initrd", path))
        .transpose()?;
    Ok((kernel, initrd))
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
fn connect(
    machine: &Machine<Backend>,
    config: &DeviceConfig,
    device: &Device,
) -> Result<Option<Arc<Isa<Backend>>>> {
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

/// A vCPU's way to the buses, which notes the guest's first sign of life.
struct Watched {
    bus: BusAccess,
    timeline: Arc<Timeline>,
    wrote: bool,
}

impl ExitHandler for Watched {
    fn pio_read(&mut self, port: u16, width: u8) -> u32 {
        self.bus.pio_read(port, width)
    }

    fn pio_write(&mut self, port: u16, width: u8, value: u32) {
        if !self.wrote {
            self.wrote = true;
            self.timeline.mark(Mark::FirstPortWrite);
        }
        self.bus.pio_write(port, width, value);
    }

    fn mmio_read(&mut self, address: u64, width: u8) -> u64 {
        self.bus.mmio_read(address, width)
    }

    fn mmio_write(&mut self, address: u64, width: u8, value: u64) {
        self.bus.mmio_write(address, width, value);
    }
}

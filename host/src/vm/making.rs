//! The hypervisor's part of a start, on a thread of its own: it mostly waits, while the main thread reads the VM file, loads plugins and
//! makes devices.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};

use super::placing::{KernelFiles, Placing};
use crate::config::VmConfig;
use crate::hypervisor::backing::Backing;
use crate::hypervisor::{CpuModel, Vm};
use crate::thread;

/// A VM on its way, and then its CPUs. Without an order for one its thread ends.
pub struct Making<H: Vm> {
    orders: Sender<Order>,
    made: Receiver<(Arc<H>, Option<Placing>)>,
    thread: io::Result<JoinHandle<Result<Vec<H::Vcpu>>>>,
}

/// CPUs on their way.
pub(super) struct Vcpus<H: Vm>(JoinHandle<Result<Vec<H::Vcpu>>>);

/// What the VM file says of it.
struct Order {
    name: String,
    bytes: u64,
    backing: Backing,
    cpus: u32,
    model: CpuModel,
    kernel: Option<Arc<KernelFiles>>,
}

impl<H: Vm> Making<H> {
    /// Begins with what needs nothing of the VM file. With `force` it takes the place of a VM of the same name.
    pub fn begin(force: bool) -> Self {
        let (orders, receiver) = channel();
        let (sender, made) = channel();
        let make = move || make::<H>(H::begin(force), &receiver, &sender);
        Self {
            orders,
            made,
            thread: thread::spawn("hypervisor", make),
        }
    }

    /// Goes on with what it says. As soon as there is memory, `kernel` is placed in it.
    pub(super) fn order(&self, config: &VmConfig, kernel: Option<Arc<KernelFiles>>) {
        // If the thread has ended, [`Making::vm`] says why.
        let _ = self.orders.send(Order {
            name: config.name.clone(),
            bytes: config.memory_bytes,
            backing: config.backing.clone(),
            cpus: config.cpus.into(),
            model: config.cpu_model.clone(),
            kernel,
        });
    }

    /// Waits for the VM, to which CPUs are then still being added.
    ///
    /// # Errors
    /// The hypervisor's, or there are more CPUs than it allows.
    pub(super) fn vm(self) -> Result<(Arc<H>, Option<Placing>, Vcpus<H>)> {
        let vcpus = Vcpus(self.thread.context("The system has no thread left")?);
        match self.made.recv() {
            Ok((vm, placing)) => Ok((vm, placing, vcpus)),
            Err(_) => Err(match vcpus.made() {
                Err(error) => error,
                Ok(_) => anyhow!("The thread that makes the VM has made none"),
            }),
        }
    }
}

impl<H: Vm> Vcpus<H> {
    /// Waits for them.
    ///
    /// # Errors
    /// The hypervisor's.
    pub(super) fn made(self) -> Result<Vec<H::Vcpu>> {
        self.0
            .join()
            .map_err(|_| anyhow!("The thread that makes the VM has panicked"))?
    }
}

fn make<H: Vm>(
    begun: H::Begun,
    orders: &Receiver<Order>,
    made: &Sender<(Arc<H>, Option<Placing>)>,
) -> Result<Vec<H::Vcpu>> {
    let Ok(order) = orders.recv() else {
        // The VM file is refused.
        return Ok(Vec::new());
    };
    let Order { cpus, kernel, .. } = order;
    let mut placing = None;
    let vm = H::create(begun, &order.name, order.bytes, &order.backing, |memory| {
        placing = kernel.and_then(|files| Placing::begin(files, memory.clone()).ok());
    })?;
    let vm = Arc::new(vm);
    let max = vm.max_vcpus();
    ensure!(
        cpus <= max,
        "[main] cpus = {cpus} is more than this host's hypervisor allows: at most {max}"
    );
    if made.send((Arc::clone(&vm), placing)).is_err() {
        // Something else has failed meanwhile.
        return Ok(Vec::new());
    }
    (0..cpus)
        .map(|cpu| vm.create_vcpu(cpu, &order.model))
        .collect()
}

//! One VM from its configuration to its exit code: built in visible order, run, and taken down.

mod build;
mod growth;
mod guest;
mod making;
mod placing;
mod reset_log;
mod signals;
mod watched;

use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::config::{Loaded, VmConfig};
use crate::diagnose::{Mark, Timeline};
use crate::hypervisor::{Vcpu, Vm as Hypervisor, resident};
use crate::machine::power::{EventSender, VmEvent};
use crate::machine::{DebugPort, Machine};
use crate::plugins::device::Device;
use crate::plugins::instance::{Instance, Shared};
use crate::plugins::iothread::IoThread;
use crate::plugins::object::Object;
use crate::plugins::statistics;
use crate::plugins::wiring::Isa;
use crate::probes;
use crate::vcpu::{Freezer, VcpuSet};
use guest::Guest;
pub use making::Making;
use reset_log::ResetLog;
use signals::Signals;

/// The exit code of a VM that another process has destroyed.
pub const EXIT_DESTROYED: u8 = 4;

/// How long a vCPU may take to leave a device. A device that takes longer is broken: register accesses must not block.
const LEAVE_DEVICE: Duration = Duration::from_secs(5);
/// For so long after its start the guest has the processors to itself, unless something happens.
const BEGINNING: Duration = Duration::from_millis(20);
/// How often to look whether the guest has halted for good.
const HALT_CHECK: Duration = Duration::from_secs(1);
/// After this many of them without a message, most guests have booted, and what the start has left behind goes.
const SETTLED: u32 = 5;

/// What the thread that owns the VM is told.
enum Message {
    /// From a vCPU, the chipset, a device.
    Event(VmEvent),
    /// The last hold on the guest's start has ended.
    Released,
    /// A signal to the process.
    Signal(i32),
}

/// Where messages to the VM's owner come from.
#[derive(Clone)]
struct Mailbox {
    sender: Sender<Message>,
    freezer: Arc<OnceLock<Freezer>>,
}

impl Mailbox {
    /// Reports events. CPUs stop at once, so that the one that asked for a reset runs no instruction past it.
    fn events(&self) -> EventSender {
        let mailbox = self.clone();
        Arc::new(move |event| {
            if let Some(freezer) = mailbox.freezer.get() {
                freezer.freeze();
            }
            // Without a receiver the VM is gone already.
            let _ = mailbox.sender.send(Message::Event(event));
        })
    }
}

/// What to do after a message.
enum Next {
    GoOn,
    End(Ending),
}

/// How a VM has ended without a failure.
struct Ending {
    /// The process's exit code.
    code: u8,
    /// Said when the guest's own last words are out.
    why: String,
}

/// What plugins have made for the VM. Ends it all when dropped, however far the VM got: sockets and terminals are left as
/// they were found.
#[derive(Default)]
struct Objects {
    devices: Vec<Device>,
    /// In the order of creation: each after those that it uses.
    backends: Vec<Arc<Object>>,
}

impl Objects {
    /// What each of them counts: devices first.
    fn instances(&self) -> Vec<&'static Instance> {
        let devices = self.devices.iter().map(Device::instance);
        let backends = self.backends.iter().map(|backend| backend.instance());
        devices.chain(backends).collect()
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        self.devices.iter().for_each(Device::end);
        self.backends
            .iter()
            .rev()
            .for_each(|backend| backend.release());
    }
}

/// A built VM. Fields are dropped in this order: no CPU runs when objects end, and the I/O thread outlives them.
struct Vm<H: Hypervisor> {
    config: VmConfig,
    vcpus: VcpuSet<H::Vcpu>,
    machine: Arc<Machine<H>>,
    isa: Vec<Arc<Isa<H>>>,
    objects: Objects,
    shared: &'static Shared,
    _io: IoThread,
    hypervisor: Arc<H>,
    guest: Guest<H>,
    messages: Receiver<Message>,
    /// Until they are delivered.
    signals: Option<Signals>,
    /// Messages that came during a restart.
    waiting: VecDeque<Message>,
    timeline: Arc<Timeline>,
    debug_port: Arc<DebugPort>,
    /// Whether the guest has printed on a serial port.
    spoke: Arc<AtomicBool>,
    asked_to_stop: bool,
    /// When the process began.
    started: Instant,
}

/// How a VM is run, as far as its file does not say it.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// When the process began.
    pub started: Instant,
    /// Whether to print what devices and backends have counted when the VM has ended.
    pub statistics: bool,
}

/// Runs the VM of a checked file, whose `making` has begun, to its end and returns the exit code that the
/// file names for how it ended.
///
/// # Errors
/// The VM could not be built, or failed: the text names what and why.
pub fn run<H: Hypervisor>(making: Making<H>, loaded: Loaded, launch: Launch) -> Result<u8> {
    let mut vm = build::build(making, loaded.config, launch.started)?;
    let result = vm.start().and_then(|ended| match ended {
        Some(ending) => Ok(ending),
        None => vm.serve(),
    });
    let timeline = vm.timeline.clone();
    let (debug_port, spoke) = (vm.debug_port.clone(), vm.spoke.clone());
    let instances = vm.objects.instances();
    vm.end();
    if launch.statistics {
        print_statistics(&instances, launch.started);
    }
    let last_words = last_words(
        &debug_port,
        result.is_err() || !spoke.load(Ordering::Acquire),
    );
    if log::log_enabled!(log::Level::Debug) {
        log::debug!("{}", timeline.report());
    }
    if let Some(text) = last_words {
        log::info!(
            "the guest's last words on its debug port (debug_port in [main] keeps all):\n{text}"
        );
    }
    result.map(|ending| {
        log::info!("{}", ending.why);
        ending.code
    })
}

/// Prints what devices and backends have counted on stderr, whatever the log's level.
fn print_statistics(instances: &[&'static Instance], started: Instant) {
    let lines = statistics::report(instances.iter().copied());
    let seconds = started.elapsed().as_secs_f64();
    let text = format!("statistics after {seconds:.3} s:\n{lines}end of statistics\n");
    // In one piece, so that lines of the log stay outside. If stderr is gone, nobody reads them.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// What firmware said last on the debug port, if that is `wanted`: where nothing else tells how far the guest got. When no CPU
/// runs any more, so that nothing comes after it.
fn last_words(debug_port: &DebugPort, wanted: bool) -> Option<String> {
    debug_port.flush();
    wanted.then(|| debug_port.tail()).flatten()
}

impl<H: Hypervisor> Vm<H> {
    /// Loads the guest, starts devices, waits for what holds the start, and lets the CPUs run. `Some`: it ended before.
    fn start(&mut self) -> Result<Option<Ending>> {
        self.guest
            .load(&self.machine, &self.hypervisor, &self.vcpus, false)?;
        self.timeline.mark(Mark::KernelLoaded);
        for device in &self.objects.devices {
            device.start()?;
        }
        if !self.shared.startup.reasons().is_empty() {
            self.deliver_signals()?;
        }
        for reason in self.shared.startup.reasons() {
            log::info!("the guest starts after {reason}");
        }
        while !self.shared.startup.reasons().is_empty() {
            let Some(message) = self.receive()? else {
                continue;
            };
            match message {
                // There is no guest yet that a reset could restart.
                Message::Released
                | Message::Event(VmEvent::Reset)
                | Message::Signal(signals::NMI_BUTTON) => {}
                Message::Signal(signals::STATISTICS) => self.print_statistics(),
                Message::Signal(signals::DISK_SIZES) => self.objects.look_at_disk_sizes(),
                Message::Signal(signal) => {
                    let name = signals::name(signal);
                    return Ok(Some(
                        self.halted(format!("{name}: ends before the guest has started")),
                    ));
                }
                Message::Event(event) => {
                    if let Next::End(ending) = self.handle(event, &mut ResetLog::default())? {
                        return Ok(Some(ending));
                    }
                }
            }
        }
        self.timeline.mark(Mark::Running);
        self.vcpus.resume();
        Ok(None)
    }

    fn deliver_signals(&mut self) -> Result<()> {
        self.signals.take().map_or(Ok(()), Signals::deliver)
    }

    /// Acts on messages until the VM ends.
    fn serve(&mut self) -> Result<Ending> {
        // Where processors are few, threads that begin now would run before the guest.
        if let Ok(message) = self.messages.recv_timeout(BEGINNING) {
            self.waiting.push_back(message);
        }
        self.hypervisor.started();
        self.deliver_signals()?;
        let resets = &mut ResetLog::default();
        let mut quiet = 0;
        loop {
            let message = self.receive()?;
            if message.is_none() && quiet < SETTLED {
                quiet += 1;
                if quiet == SETTLED {
                    // What was needed up to here is most of the code.
                    self.guest.tidy();
                    resident::release_code();
                }
            }
            let next = match message {
                Some(Message::Event(event)) => self.handle(event, resets)?,
                Some(Message::Signal(signals::NMI_BUTTON)) => {
                    log::info!("SIGUSR2: each CPU gets a non-maskable interrupt");
                    self.machine.press_nmi_button();
                    Next::GoOn
                }
                Some(Message::Signal(signals::STATISTICS)) => {
                    self.print_statistics();
                    Next::GoOn
                }
                Some(Message::Signal(signals::DISK_SIZES)) => {
                    self.objects.look_at_disk_sizes();
                    Next::GoOn
                }
                Some(Message::Signal(signal)) => self.signalled(signal),
                Some(Message::Released) => Next::GoOn,
                None if self.vcpus.find_halt() => self.handle(VmEvent::Halt, resets)?,
                None => Next::GoOn,
            };
            if let Next::End(ending) = next {
                return Ok(ending);
            }
        }
    }

    fn print_statistics(&self) {
        print_statistics(&self.objects.instances(), self.started);
    }

    fn halted(&self, why: impl Into<String>) -> Ending {
        Ending {
            code: self.config.exit_on_halt,
            why: why.into(),
        }
    }

    fn handle(&mut self, event: VmEvent, resets: &mut ResetLog) -> Result<Next> {
        let halted = |why: &str| Ok(Next::End(self.halted(why)));
        match event {
            VmEvent::PowerOff => halted("the guest has turned its power off"),
            VmEvent::Halt => {
                halted("the guest has halted: every CPU waits with interrupts disabled")
            }
            VmEvent::Reset => self.restart("the guest resets", resets),
            VmEvent::TripleFault => self.restart("triple fault: the guest resets", resets),
            VmEvent::Destroyed => Ok(Next::End(Ending {
                code: EXIT_DESTROYED,
                why: format!("VM {} was destroyed by another process", self.config.name),
            })),
            VmEvent::Crash { cpu, text } => Err(anyhow!("vCPU {cpu} can't go on: {text}")),
            VmEvent::Fault { text } => Err(anyhow!(
                "{text}: the VM stops (on_fault = \"fail\" in the device's table would let it go on)"
            )),
            VmEvent::Failure { text } => Err(anyhow!("{text}: the VM stops")),
            VmEvent::Stop => halted("the VM was asked to stop at once"),
        }
    }

    fn signalled(&mut self, signal: i32) -> Next {
        let name = signals::name(signal);
        if self.asked_to_stop {
            return Next::End(self.halted(format!("{name} again: the VM stops at once")));
        }
        if !self.machine.press_power_button() {
            return Next::End(self.halted(format!(
                "{name}: the guest does not listen to its power button, the VM stops"
            )));
        }
        self.asked_to_stop = true;
        log::info!("{name}: the guest was asked to power off; once more stops the VM at once");
        Next::GoOn
    }

    /// Resets the machine in place, unless the file wants the process to end on it.
    fn restart(&mut self, why: &str, resets: &mut ResetLog) -> Result<Next> {
        if let Some(code) = self.config.exit_on_reboot {
            let why = why.to_owned();
            return Ok(Next::End(Ending { code, why }));
        }
        probes::reset(&self.config.name, why);
        if let Some(line) = resets.line(why, Instant::now()) {
            log::info!("{line}");
        }
        self.vcpus.pause(LEAVE_DEVICE)?;
        self.objects.devices.iter().try_for_each(Device::pause)?;
        self.machine.reset();
        self.objects.devices.iter().try_for_each(Device::reset)?;
        self.isa.iter().for_each(|isa| isa.0.reset());
        self.hypervisor.reset()?;
        self.machine.restart_clocks()?;
        self.vcpus.for_each(|_, vcpu| vcpu.reset())?;
        self.guest
            .load(&self.machine, &self.hypervisor, &self.vcpus, true)?;
        self.objects.devices.iter().try_for_each(Device::resume)?;
        self.asked_to_stop = false;
        self.forget_resets();
        probes::reset_done(&self.config.name);
        self.vcpus.resume();
        Ok(Next::GoOn)
    }

    /// What CPUs reported while they were being held belongs to the life that has ended; anything else waits its turn.
    fn forget_resets(&mut self) {
        let reset =
            |m: &Message| matches!(m, Message::Event(VmEvent::Reset | VmEvent::TripleFault));
        self.waiting
            .extend(self.messages.try_iter().filter(|m| !reset(m)));
    }

    /// The next message; `None` if there is none for [`HALT_CHECK`].
    fn receive(&mut self) -> Result<Option<Message>> {
        if let Some(message) = self.waiting.pop_front() {
            return Ok(Some(message));
        }
        match self.messages.recv_timeout(HALT_CHECK) {
            Ok(message) => Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(anyhow!("nobody is left to end the VM")),
        }
    }

    /// Takes everything down.
    fn end(self) {
        if let Err(error) = self.vcpus.stop(LEAVE_DEVICE) {
            log::error!("{error:#}");
            // A CPU is still inside a device, which therefore can't be released; the process ends without it.
            std::mem::forget(self.objects);
        }
    }
}

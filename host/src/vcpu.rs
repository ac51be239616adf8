//! The threads that run a VM's CPUs, one each, and how the thread that owns the VM holds and ends them.
//!
//! A CPU thread is either running its guest or parked. Parked threads have left the guest and every device, so
//! that the owner may reset, save or change whatever it likes. A thread whose CPU can't go on (triple fault, crash) reports
//! a [`VmEvent`] and parks until the next [`VcpuSet::resume`].

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::diagnose;
use crate::hypervisor::{Exit, ExitHandler, Kick, Vcpu, affinity};
use crate::machine::power::{EventSender, VmEvent};
use crate::memory::GuestMemory;
use crate::{probes, thread};

const PARKED: u8 = 0;
const RUNNING: u8 = 1;
const STOPPING: u8 = 2;

/// Rounds of [`VcpuSet::find_halt`] in a row that have to find every CPU halted: with one alone, a CPU that was just
/// woken by another's last act could be missed.
const HALT_ROUNDS: u32 = 2;

/// Holds all CPUs of a VM at once, from any thread. A CPU that a device calls from stops before its next instruction.
#[derive(Clone)]
pub struct Freezer(Arc<Shared>);

impl Freezer {
    /// Makes every CPU leave the guest and park, without waiting for it. [`VcpuSet::resume`] undoes it.
    pub fn freeze(&self) {
        self.0.want(PARKED);
    }
}

/// All CPU threads of one VM. Dropping it stops and joins them.
pub struct VcpuSet<V> {
    shared: Arc<Shared>,
    vcpus: Vec<Arc<Mutex<V>>>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// What the threads should do; read by them without the lock after each kick.
    wanted: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
    cpus: Vec<Cpu>,
    events: EventSender,
    memory: Arc<GuestMemory>,
}

struct Cpu {
    kick: Arc<dyn Kick>,
    /// Whether `find_halt` asks this CPU's thread to look.
    probe: AtomicBool,
    halted_rounds: AtomicU32,
    last_exits: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Counts resumes, so that a thread whose CPU ended doesn't run it again before the next one.
    epoch: u64,
    parked: Vec<bool>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, wanted: u8) {
        {
            let mut state = self.lock();
            if self.wanted.load(Ordering::Acquire) != STOPPING {
                self.wanted.store(wanted, Ordering::Release);
            }
            if wanted == RUNNING {
                state.epoch += 1;
            }
            self.changed.notify_all();
        }
        if wanted != RUNNING {
            self.cpus.iter().for_each(|cpu| cpu.kick.kick());
        }
    }

    /// Waits until this CPU should run. `false`: the thread should end.
    fn park(&self, cpu: u32, epoch: &mut u64) -> bool {
        let mut state = self.lock();
        state.parked[cpu as usize] = true;
        self.changed.notify_all();
        loop {
            match self.wanted.load(Ordering::Acquire) {
                STOPPING => return false,
                RUNNING if state.epoch != *epoch => break,
                _ => {
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner)
                }
            }
        }
        *epoch = state.epoch;
        // Not before: a thread that is to run and is held again before it has woken up never left.
        state.parked[cpu as usize] = false;
        true
    }
}

impl<V: Vcpu + 'static> VcpuSet<V> {
    /// Makes one parked thread per vCPU, in the order of their ids, each bound to the CPU of this machine that `binding`
    /// names at its place, if any. `handler` makes what answers each one's register accesses; `events` hears how CPUs end.
    ///
    /// # Errors
    /// The system refuses threads, or to bind one.
    pub fn spawn<H: ExitHandler + Send + 'static>(
        vcpus: Vec<V>,
        memory: Arc<GuestMemory>,
        binding: &[u32],
        mut handler: impl FnMut(u32) -> H,
        events: EventSender,
    ) -> Result<Self> {
        let cpus = vcpus.iter().map(|vcpu| Cpu {
            kick: vcpu.kick_handle(),
            probe: AtomicBool::new(false),
            halted_rounds: AtomicU32::new(0),
            last_exits: AtomicU64::new(0),
        });
        let shared = Arc::new(Shared {
            wanted: AtomicU8::new(PARKED),
            state: Mutex::new(State {
                epoch: 0,
                parked: vec![false; vcpus.len()],
            }),
            changed: Condvar::new(),
            cpus: cpus.collect(),
            events,
            memory,
        });
        let vcpus: Vec<_> = vcpus
            .into_iter()
            .map(|vcpu| Arc::new(Mutex::new(vcpu)))
            .collect();
        let mut set = Self {
            shared,
            vcpus,
            threads: Vec::new(),
        };
        for (cpu, vcpu) in (0u32..).zip(&set.vcpus) {
            let (vcpu, shared, mut handler) =
                (Arc::clone(vcpu), Arc::clone(&set.shared), handler(cpu));
            let host_cpu = binding.get(cpu as usize).copied();
            let (sender, bound) = mpsc::channel();
            let main = move || {
                if let Some(host_cpu) = host_cpu {
                    // Its receiver waits below.
                    let _ = sender.send(affinity::bind(host_cpu));
                }
                thread_main(cpu, &vcpu, &shared, &mut handler);
            };
            let thread = thread::spawn(format!("vcpu-{cpu}"), main)
                .with_context(|| format!("Cannot start the thread of vCPU {cpu}"))?;
            set.threads.push(thread);
            if let Some(host_cpu) = host_cpu {
                let bound = bound.recv().context("its thread ended").flatten();
                bound.with_context(|| format!("Cannot bind vCPU {cpu} to CPU {host_cpu}"))?;
            }
        }
        Ok(set)
    }

    /// What holds these CPUs from any thread.
    pub fn freezer(&self) -> Freezer {
        Freezer(Arc::clone(&self.shared))
    }

    /// Lets all CPUs run, those that had ended included.
    pub fn resume(&self) {
        for cpu in &self.shared.cpus {
            cpu.halted_rounds.store(0, Ordering::Relaxed);
        }
        self.shared.want(RUNNING);
    }

    /// Makes all CPUs leave the guest, and returns once they are parked.
    ///
    /// # Errors
    /// After `deadline` some are still inside a device: the text names them. They park as soon as they leave it.
    pub fn pause(&self, deadline: Duration) -> Result<()> {
        self.shared.want(PARKED);
        self.await_parked(deadline)
    }

    fn await_parked(&self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        let mut state = self.shared.lock();
        loop {
            let Some(busy) = state.parked.iter().position(|&parked| !parked) else {
                return Ok(());
            };
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("vCPU {busy} did not come out of a device within {deadline:?}");
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Calls `act` on each vCPU. Call it while they are parked: it waits for each to be.
    ///
    /// # Errors
    /// The first error of `act`.
    pub fn for_each(&self, mut act: impl FnMut(u32, &mut V) -> Result<()>) -> Result<()> {
        for (cpu, vcpu) in (0u32..).zip(&self.vcpus) {
            act(
                cpu,
                &mut vcpu.lock().unwrap_or_else(PoisonError::into_inner),
            )?;
        }
        Ok(())
    }

    /// Looks for the end of a guest that only halts: call it about once a second. It disturbs only CPUs that had no exit
    /// since the last call, and after two calls that find every CPU in HLT with interrupts disabled returns `true`.
    /// Hypervisors that see this themselves report [`VmEvent::Halt`] earlier.
    pub fn find_halt(&self) -> bool {
        if self.shared.wanted.load(Ordering::Acquire) != RUNNING {
            return false;
        }
        let cpus = &self.shared.cpus;
        if cpus
            .iter()
            .all(|cpu| cpu.halted_rounds.load(Ordering::Acquire) >= HALT_ROUNDS)
        {
            return true;
        }
        for cpu in cpus {
            let exits = cpu.kick.exits();
            if cpu.last_exits.swap(exits, Ordering::Relaxed) == exits {
                cpu.probe.store(true, Ordering::Release);
                cpu.kick.kick();
            } else {
                cpu.halted_rounds.store(0, Ordering::Release);
            }
        }
        false
    }

    /// Ends all threads. The vCPUs and handlers are dropped with them.
    ///
    /// # Errors
    /// After `deadline` some are still inside a device, named by the text; their threads are then left behind.
    pub fn stop(mut self, deadline: Duration) -> Result<()> {
        self.shared.want(STOPPING);
        let end = Instant::now() + deadline;
        let threads = std::mem::take(&mut self.threads);
        for (cpu, thread) in threads.into_iter().enumerate() {
            // A join can't be given a deadline.
            while !thread.is_finished() {
                if Instant::now() >= end {
                    bail!("vCPU {cpu} did not come out of a device within {deadline:?}");
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            if thread.join().is_err() {
                bail!("The thread of vCPU {cpu} panicked");
            }
        }
        Ok(())
    }
}

impl<V> Drop for VcpuSet<V> {
    fn drop(&mut self) {
        self.shared.want(STOPPING);
        for thread in self.threads.drain(..) {
            // A panic was reported by the panic hook already.
            let _ = thread.join();
        }
    }
}

fn thread_main<V: Vcpu>(cpu: u32, vcpu: &Mutex<V>, shared: &Shared, handler: &mut dyn ExitHandler) {
    let mut epoch = 0;
    while shared.park(cpu, &mut epoch) {
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(event) = run(cpu, &mut *vcpu, shared, handler) {
            drop(vcpu);
            // The others must not go on with a guest that is being ended.
            shared.want(PARKED);
            (shared.events)(event);
        }
    }
}

/// Runs the guest until this thread has to park (`None`) or the CPU has ended.
fn run<V: Vcpu>(
    cpu: u32,
    vcpu: &mut V,
    shared: &Shared,
    handler: &mut dyn ExitHandler,
) -> Option<VmEvent> {
    let own = &shared.cpus[cpu as usize];
    while shared.wanted.load(Ordering::Acquire) == RUNNING {
        let exit = vcpu.run(handler);
        probes::vcpu_exit(cpu, exit.as_ref().map_or("refused", Exit::name));
        match exit {
            Ok(Exit::Kicked) => {
                if own.probe.swap(false, Ordering::AcqRel) {
                    let rounds = own.halted_rounds.load(Ordering::Relaxed);
                    let rounds = if vcpu.halted_for_good() {
                        rounds.saturating_add(1)
                    } else {
                        0
                    };
                    own.halted_rounds.store(rounds, Ordering::Release);
                }
            }
            Ok(Exit::TripleFault) => {
                log::debug!(
                    "vCPU {cpu}: triple fault\n{}",
                    diagnose::describe(vcpu, &shared.memory)
                );
                return Some(VmEvent::TripleFault);
            }
            Ok(Exit::Halted) => return Some(VmEvent::Halt),
            Ok(Exit::Destroyed) => return Some(VmEvent::Destroyed),
            Ok(Exit::Crash(text)) => return Some(crash(cpu, vcpu, shared, &text)),
            Err(error) => return Some(crash(cpu, vcpu, shared, &format!("{error:#}"))),
        }
    }
    None
}

fn crash<V: Vcpu>(cpu: u32, vcpu: &V, shared: &Shared, text: &str) -> VmEvent {
    VmEvent::Crash {
        cpu,
        text: format!("{text}\n{}", diagnose::describe(vcpu, &shared.memory)),
    }
}

#[cfg(test)]
mod tests;

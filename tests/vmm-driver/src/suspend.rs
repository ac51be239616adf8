//! The end of a run: on request, by a triple fault, or because no vCPU can ever go on.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED, kvm_mp_state};
use kvm_ioctls::VcpuFd;
use vmm_host::hypervisor::bhyve::abi::*;

use crate::machine::Machine;
use crate::vcpu::{Cpu, Vcpu};
use crate::{errno, lock};

const RFLAGS_IF: u64 = 1 << 9;

/// How long a vCPU stays in KVM without an exit until it is asked whether it is halted.
const LOOK: Duration = Duration::from_millis(50);

pub type Suspension = VmExitSuspended;

impl Machine {
    pub fn suspend_request(&self, request: &VmSuspend) -> io::Result<()> {
        if !(VM_SUSPEND_RESET..=VM_SUSPEND_TRIPLEFAULT).contains(&request.how) {
            return Err(self.misuse(libc::EINVAL, &format!("suspension {}", request.how)));
        }
        match self.suspend(request.how, request.source) {
            true => Ok(()),
            false => Err(errno(libc::EALREADY)),
        }
    }

    /// Whether it was not suspended before.
    pub fn suspend(&self, how: i32, source: i32) -> bool {
        let mut suspension = lock(&self.suspension);
        if suspension.is_some() {
            return false;
        }
        *suspension = Some(Suspension {
            how,
            source,
            when: self.since_boot(),
        });
        drop(suspension);
        self.kick_all();
        true
    }

    /// `VM_SUSPEND_CPU` and `VM_RESUME_CPU`: -1 is all vCPUs.
    pub fn hold_vcpu(&self, id: i32, held: bool) -> io::Result<()> {
        if id >= 0 {
            self.vcpu(id)?;
        }
        let named = |vcpu: &&Vcpu| id < 0 || vcpu.id == id;
        for vcpu in self.vcpus().filter(named) {
            vcpu.held.store(held, Ordering::SeqCst);
            vcpu.kick.kick();
        }
        Ok(())
    }

    /// After `cpu` has left the guest without an exit: the VM halts when all vCPUs are in HLT with interrupts off.
    pub fn look_at_halt(&self, vcpu: &Vcpu, cpu: &Cpu) {
        let halted = cpu
            .fd
            .get_mp_state()
            .is_ok_and(|state| state.mp_state == KVM_MP_STATE_HALTED)
            && cpu
                .fd
                .get_regs()
                .is_ok_and(|regs| regs.rflags & RFLAGS_IF == 0);
        vcpu.halted.store(halted, Ordering::SeqCst);
        let mut active = self
            .vcpus()
            .filter(|vcpu| vcpu.active.load(Ordering::SeqCst));
        if halted && active.all(|vcpu| vcpu.halted.load(Ordering::SeqCst)) {
            self.suspend(VM_SUSPEND_HALT, -1);
        }
    }
}

/// As a vCPU is before it is told to run: KVM's first would run at once.
pub fn park(fd: &VcpuFd) -> io::Result<()> {
    let mp_state = KVM_MP_STATE_UNINITIALIZED;
    Ok(fd.set_mp_state(kvm_mp_state { mp_state })?)
}

/// KVM doesn't tell of HLT when it has the interrupt controllers: vCPUs that stand still are asked to leave the guest.
pub fn watch(machine: &Arc<Machine>) -> io::Result<()> {
    let machine = Arc::downgrade(machine);
    let thread = std::thread::Builder::new().name("vmm-halts".into());
    thread.spawn(move || look(&machine)).map(drop)
}

fn look(machine: &Weak<Machine>) {
    let mut before = Vec::new();
    loop {
        std::thread::sleep(LOOK);
        let Some(machine) = machine.upgrade() else {
            return;
        };
        let now: Vec<_> = machine
            .vcpus()
            .map(|vcpu| vcpu.kick.entries.load(Ordering::Relaxed))
            .collect();
        for (index, vcpu) in machine.vcpus().enumerate() {
            if vcpu.kick.running() && before.get(index) == now.get(index) {
                vcpu.kick.kick();
            }
        }
        before = now;
    }
}

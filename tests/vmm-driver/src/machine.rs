//! One VM: what all its requests share.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Instant;

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MAX_CPUID_ENTRIES, KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use vmm_host::hypervisor::bhyve::abi::VCF_TRACK_DIRTY;

use crate::clocks::Clocks;
use crate::lines::Lines;
use crate::segments::Memory;
use crate::suspend::{self, Suspension};
use crate::vcpu::{Cpu, Vcpu};
use crate::{errno, lock, violation};

/// `VM_MAXCPU` of illumos-gate.
pub const VCPUS: usize = 32;

/// Pages for real-mode emulation on old Intel CPUs: below the largest bootrom, above the I/O APIC.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;

pub struct Machine {
    pub name: String,
    pub flags: u64,
    pub fd: VmFd,
    pub memory: Memory,
    pub suspension: Mutex<Option<Suspension>>,
    pub paused: AtomicBool,
    pub destroyed: AtomicBool,
    /// By its own host.
    pub given_up: AtomicBool,
    pub autodestruct: AtomicBool,
    pub boot: Mutex<Instant>,
    pub supported: Vec<kvm_cpuid_entry2>,
    /// Whether it is noted which pages the guest writes, and those that were found.
    pub tracking: AtomicBool,
    pub dirty: Mutex<BTreeSet<u64>>,
    pub lines: Lines,
    pub clocks: Clocks,
    vcpus: [OnceLock<Vcpu>; VCPUS],
    creation: Mutex<()>,
}

impl Machine {
    pub fn new(name: &str, flags: u64) -> io::Result<Self> {
        let kvm = Kvm::new()?;
        let fd = kvm.create_vm()?;
        if kvm.check_extension(Cap::X86UserSpaceMsr) {
            let mut capability = kvm_enable_cap {
                cap: KVM_CAP_X86_USER_SPACE_MSR,
                ..Default::default()
            };
            capability.args[0] = u64::from(KVM_MSR_EXIT_REASON_UNKNOWN);
            fd.enable_cap(&capability)?;
        }
        fd.set_identity_map_address(IDENTITY_MAP)?;
        fd.set_tss_address(TSS)?;
        fd.create_irq_chip()?;
        fd.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })?;
        let lines = Lines::new(&fd)?;
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        Ok(Self {
            name: name.into(),
            flags,
            fd,
            memory: Memory::default(),
            suspension: Mutex::default(),
            paused: AtomicBool::new(false),
            destroyed: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            autodestruct: AtomicBool::new(false),
            boot: Mutex::new(Instant::now()),
            supported: supported.as_slice().to_vec(),
            tracking: AtomicBool::new(flags & VCF_TRACK_DIRTY != 0),
            dirty: Mutex::default(),
            lines,
            clocks: Clocks::default(),
            vcpus: [const { OnceLock::new() }; VCPUS],
            creation: Mutex::default(),
        })
    }

    /// Writes down `what`, and refuses it with error `number`.
    pub fn misuse(&self, number: i32, what: &str) -> io::Error {
        violation(&self.name, what);
        errno(number)
    }

    /// vCPU `id`, which KVM makes when it is first named.
    pub fn vcpu(&self, id: i32) -> io::Result<&Vcpu> {
        let slot = usize::try_from(id)
            .ok()
            .and_then(|index| self.vcpus.get(index));
        let slot =
            slot.ok_or_else(|| self.misuse(libc::EINVAL, &format!("there is no vCPU {id}")))?;
        let _creation = lock(&self.creation);
        if let Some(vcpu) = slot.get() {
            return Ok(vcpu);
        }
        let fd = self.fd.create_vcpu(id as u64)?;
        suspend::park(&fd)?;
        let vcpu = Vcpu::new(id, fd)?;
        Ok(slot.get_or_init(|| vcpu))
    }

    /// The vCPU's state, outside of the guest.
    pub fn with<T>(&self, id: i32, act: impl FnOnce(&mut Cpu) -> io::Result<T>) -> io::Result<T> {
        let (mut cpu, _turn) = self.vcpu(id)?.freeze();
        act(&mut cpu)
    }

    pub fn vcpus(&self) -> impl Iterator<Item = &Vcpu> {
        self.vcpus.iter().filter_map(OnceLock::get)
    }

    /// All vCPUs, outside of the guest until the guards go.
    pub fn freeze(&self) -> Vec<(MutexGuard<'_, Cpu>, MutexGuard<'_, ()>)> {
        self.vcpus().map(Vcpu::freeze).collect()
    }

    pub fn kick_all(&self) {
        for vcpu in self.vcpus() {
            vcpu.kick.kick();
        }
    }

    pub fn active(&self) -> u64 {
        let bit = |(index, slot): (usize, &OnceLock<Vcpu>)| {
            let active = slot
                .get()
                .is_some_and(|vcpu| vcpu.active.load(Ordering::SeqCst));
            u64::from(active) << index
        };
        self.vcpus.iter().enumerate().map(bit).sum()
    }

    pub fn since_boot(&self) -> u64 {
        lock(&self.boot).elapsed().as_nanos() as u64
    }

    pub fn pause(&self) -> io::Result<()> {
        let _frozen = self.freeze();
        match self.paused.swap(true, Ordering::SeqCst) {
            true => Err(errno(libc::EALREADY)),
            false => Ok(()),
        }
    }

    pub fn resume(&self) -> io::Result<()> {
        match self.paused.swap(false, Ordering::SeqCst) {
            true => Ok(()),
            false => Err(errno(libc::EALREADY)),
        }
    }

    /// Keeps RAM, the CMOS clock, CPUID tables and the pause.
    pub fn reinit(&self) -> io::Result<()> {
        self.deactivate_all()?;
        self.unmap_devmem()?;
        self.reinit_chips()?;
        self.clocks.reinit();
        *lock(&self.boot) = Instant::now();
        *lock(&self.suspension) = None;
        Ok(())
    }

    /// Pushes a vCPU out of the guest. One that is not in there is not changed.
    pub fn barrier(&self, id: usize) -> io::Result<()> {
        let id = i32::try_from(id).unwrap_or(-1);
        let vcpu = self.vcpu(id)?;
        if vcpu.kick.running() {
            vcpu.kick.kick();
        }
        Ok(())
    }
}

//! The hypervisor of systems that have no implementation yet: it says so by name instead of creating a VM.

use std::convert::Infallible;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use anyhow::{Result, bail};

use super::backing::Backing;
use super::cpuid::CpuidProfile;
use super::rom::Rom;
use super::{
    CpuModel, Doorbell, Exit, ExitHandler, Kick, Kind, Msi, MsiRoute, Registers, Vcpu, Vm,
};
use crate::memory::GuestMemory;

/// A VM that can't exist.
#[derive(Debug)]
pub struct UnsupportedVm(Infallible);

/// A vCPU that can't exist.
#[derive(Debug)]
pub struct UnsupportedVcpu(Infallible);

impl Vm for UnsupportedVm {
    const KIND: Kind = Kind::Bhyve;
    type Vcpu = UnsupportedVcpu;
    type Begun = ();

    fn begin(_: bool) {}

    fn create(
        (): (),
        name: &str,
        _: u64,
        _: &Backing,
        _: impl FnOnce(&Arc<GuestMemory>),
    ) -> Result<Self> {
        bail!(
            "Cannot create VM {name}: the hypervisor of {} is not supported yet; use Linux with KVM",
            std::env::consts::OS
        )
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        match self.0 {}
    }

    fn create_rom(&self, _: u64, _: u64) -> Result<Arc<Rom>> {
        match self.0 {}
    }

    fn show_rom(&self, _: &Rom, _: bool) -> Result<()> {
        match self.0 {}
    }

    fn host_cpuid() -> Result<CpuidProfile> {
        bail!(
            "the hypervisor of {} is not supported yet; use Linux with KVM",
            std::env::consts::OS
        )
    }

    fn max_vcpus(&self) -> u32 {
        match self.0 {}
    }

    fn cpuid(&self, _: &CpuModel) -> CpuidProfile {
        match self.0 {}
    }

    fn create_vcpu(&self, _: u32, _: &CpuModel) -> Result<UnsupportedVcpu> {
        match self.0 {}
    }

    fn set_irq_line(&self, _: u32, _: bool) -> Result<()> {
        match self.0 {}
    }

    fn send_msi(&self, _: Msi) -> Result<()> {
        match self.0 {}
    }

    fn connect_msi(&self, _: BorrowedFd<'_>, _: Msi) -> Result<MsiRoute> {
        match self.0 {}
    }

    fn update_msi(&self, _: &MsiRoute, _: Msi) -> Result<()> {
        match self.0 {}
    }

    fn disconnect_msi(&self, _: BorrowedFd<'_>, _: MsiRoute) -> Result<()> {
        match self.0 {}
    }

    fn bind_doorbell(&self, _: Doorbell, _: BorrowedFd<'_>) -> Result<bool> {
        match self.0 {}
    }

    fn unbind_doorbell(&self, _: Doorbell, _: BorrowedFd<'_>) -> Result<()> {
        match self.0 {}
    }

    fn set_level_triggered(&self, _: u16) -> Result<()> {
        match self.0 {}
    }

    fn inject_nmi(&self, _: u32) -> Result<()> {
        match self.0 {}
    }

    fn reset(&self) -> Result<()> {
        match self.0 {}
    }

    fn start_clocks(&self, _: u16, _: &[(u8, u8)]) -> Result<bool> {
        match self.0 {}
    }
}

impl Vcpu for UnsupportedVcpu {
    fn run(&mut self, _: &mut dyn ExitHandler) -> Result<Exit> {
        match self.0 {}
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        match self.0 {}
    }

    fn reset(&mut self) -> Result<()> {
        match self.0 {}
    }

    fn registers(&self) -> Result<Registers> {
        match self.0 {}
    }

    fn set_registers(&mut self, _: &Registers) -> Result<()> {
        match self.0 {}
    }

    fn set_msrs(&mut self, _: &[(u32, u64)]) -> Result<()> {
        match self.0 {}
    }

    fn halted_for_good(&self) -> bool {
        match self.0 {}
    }
}

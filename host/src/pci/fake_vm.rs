//! A hypervisor that only remembers what it was told, for tests of what lies above it.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};

use crate::hypervisor::backing::Backing;
use crate::hypervisor::cpuid::{CpuidProfile, Vendor};
use crate::hypervisor::rom::Rom;
use crate::hypervisor::{
    CpuModel, Doorbell, Exit, ExitHandler, Kick, Kind, Msi, MsiRoute, Registers, Space, Vcpu, Vm,
};
use crate::memory::GuestMemory;

#[derive(Default)]
pub struct Seen {
    pub lines: BTreeMap<u32, bool>,
    pub line_changes: usize,
    pub level_triggered: u16,
    /// Local APIC ids.
    pub nmis: Vec<u32>,
    pub sent: Vec<Msi>,
    /// Route number to descriptor and message.
    pub routes: BTreeMap<u32, (i32, Msi)>,
    pub next_route: u32,
    /// Space, address, width, value.
    pub doorbells: Vec<(Space, u64, u8, Option<u64>)>,
    /// Address to whether the guest sees it.
    pub roms: BTreeMap<u64, bool>,
    pub refuse_msi: bool,
    pub refuse_doorbells: bool,
    pub without_doorbells: bool,
    pub has_clocks: bool,
    /// Port of the PM timer, and what the CMOS memory was given.
    pub clock_starts: Vec<(u16, Vec<(u8, u8)>)>,
}

pub struct FakeVm {
    pub seen: Mutex<Seen>,
    memory: Arc<GuestMemory>,
}

impl Default for FakeVm {
    fn default() -> Self {
        Self::create((), "fake", 64 << 20, &Backing::default(), |_| {}).unwrap()
    }
}

impl FakeVm {
    pub fn line(&self, gsi: u32) -> bool {
        self.seen
            .lock()
            .unwrap()
            .lines
            .get(&gsi)
            .copied()
            .unwrap_or(false)
    }

    pub fn doorbells(&self) -> Vec<(Space, u64, u8, Option<u64>)> {
        let mut all = self.seen.lock().unwrap().doorbells.clone();
        all.sort_by_key(|bell| (bell.1, bell.2));
        all
    }

    pub fn routes(&self) -> Vec<Msi> {
        self.seen
            .lock()
            .unwrap()
            .routes
            .values()
            .map(|(_, msi)| *msi)
            .collect()
    }
}

impl Vm for FakeVm {
    const KIND: Kind = Kind::Kvm;
    type Vcpu = NoVcpu;
    type Begun = ();

    fn begin(_: bool) {}

    fn create(
        (): (),
        _: &str,
        memory: u64,
        _: &Backing,
        _: impl FnOnce(&Arc<GuestMemory>),
    ) -> Result<Self> {
        Ok(Self {
            seen: Mutex::default(),
            memory: Arc::new(GuestMemory::new(memory)?),
        })
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn create_rom(&self, gpa: u64, len: u64) -> Result<Arc<Rom>> {
        self.seen.lock().unwrap().roms.insert(gpa, true);
        Ok(Arc::new(Rom::detached(gpa, len)?))
    }

    fn show_rom(&self, rom: &Rom, shown: bool) -> Result<()> {
        self.seen.lock().unwrap().roms.insert(rom.gpa(), shown);
        Ok(())
    }

    fn host_cpuid() -> Result<CpuidProfile> {
        anyhow::bail!("no CPUs here")
    }

    fn max_vcpus(&self) -> u32 {
        0
    }

    fn cpuid(&self, _: &CpuModel) -> CpuidProfile {
        CpuidProfile::new(Vendor::Amd, Vec::new())
    }

    fn create_vcpu(&self, _: u32, _: &CpuModel) -> Result<NoVcpu> {
        anyhow::bail!("no CPUs here")
    }

    fn set_irq_line(&self, gsi: u32, high: bool) -> Result<()> {
        let mut seen = self.seen.lock().unwrap();
        seen.line_changes += 1;
        seen.lines.insert(gsi, high);
        Ok(())
    }

    fn send_msi(&self, msi: Msi) -> Result<()> {
        self.seen.lock().unwrap().sent.push(msi);
        Ok(())
    }

    fn connect_msi(&self, fd: BorrowedFd<'_>, msi: Msi) -> Result<MsiRoute> {
        let mut seen = self.seen.lock().unwrap();
        ensure!(!seen.refuse_msi, "refused");
        ensure!(
            seen.routes
                .values()
                .all(|(other, _)| *other != fd.as_raw_fd()),
            "connected twice"
        );
        let route = seen.next_route;
        seen.next_route += 1;
        seen.routes.insert(route, (fd.as_raw_fd(), msi));
        Ok(MsiRoute(route))
    }

    fn update_msi(&self, route: &MsiRoute, msi: Msi) -> Result<()> {
        let mut seen = self.seen.lock().unwrap();
        let held = seen
            .routes
            .get_mut(&route.0)
            .ok_or_else(|| anyhow::anyhow!("no such route"))?;
        held.1 = msi;
        Ok(())
    }

    fn disconnect_msi(&self, fd: BorrowedFd<'_>, route: MsiRoute) -> Result<()> {
        let held = self.seen.lock().unwrap().routes.remove(&route.0);
        ensure!(
            held.is_some_and(|(other, _)| other == fd.as_raw_fd()),
            "not its route"
        );
        Ok(())
    }

    fn bind_doorbell(&self, bell: Doorbell, _: BorrowedFd<'_>) -> Result<bool> {
        let mut seen = self.seen.lock().unwrap();
        if seen.without_doorbells {
            return Ok(false);
        }
        let bell = (bell.space, bell.address, bell.width, bell.value);
        ensure!(
            !seen.refuse_doorbells && !seen.doorbells.contains(&bell),
            "refused"
        );
        seen.doorbells.push(bell);
        Ok(true)
    }

    fn unbind_doorbell(&self, bell: Doorbell, _: BorrowedFd<'_>) -> Result<()> {
        let mut seen = self.seen.lock().unwrap();
        let before = seen.doorbells.len();
        seen.doorbells
            .retain(|other| *other != (bell.space, bell.address, bell.width, bell.value));
        ensure!(seen.doorbells.len() + 1 == before, "not bound");
        Ok(())
    }

    fn set_level_triggered(&self, irqs: u16) -> Result<()> {
        self.seen.lock().unwrap().level_triggered = irqs;
        Ok(())
    }

    fn inject_nmi(&self, apic_id: u32) -> Result<()> {
        self.seen.lock().unwrap().nmis.push(apic_id);
        Ok(())
    }

    fn reset(&self) -> Result<()> {
        Ok(())
    }

    fn start_clocks(&self, pm_timer: u16, cmos: &[(u8, u8)]) -> Result<bool> {
        let mut seen = self.seen.lock().unwrap();
        seen.clock_starts.push((pm_timer, cmos.to_vec()));
        Ok(seen.has_clocks)
    }
}

pub enum NoVcpu {}

impl Vcpu for NoVcpu {
    fn run(&mut self, _: &mut dyn ExitHandler) -> Result<Exit> {
        match *self {}
    }
    fn kick_handle(&self) -> Arc<dyn Kick> {
        match *self {}
    }
    fn reset(&mut self) -> Result<()> {
        match *self {}
    }
    fn registers(&self) -> Result<Registers> {
        match *self {}
    }
    fn set_registers(&mut self, _: &Registers) -> Result<()> {
        match *self {}
    }
    fn set_msrs(&mut self, _: &[(u32, u64)]) -> Result<()> {
        match *self {}
    }
    fn halted_for_good(&self) -> bool {
        match *self {}
    }
}

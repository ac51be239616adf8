//! A few of the driver's figures of each vCPU.

use std::io;
use std::sync::atomic::Ordering;

use vmm_host::hypervisor::bhyve::abi::*;

use crate::errno;
use crate::machine::Machine;

const NAMES: [&str; 2] = ["total number of vm exits", "vcpu is active"];

impl Machine {
    pub fn statistics(&self, request: &mut VmStats) -> io::Result<()> {
        let vcpu = self.vcpu(request.cpuid)?;
        let first = usize::try_from(request.index).map_err(|_| errno(libc::EINVAL))?;
        let figures = [
            vcpu.kick.entries.load(Ordering::Relaxed),
            vcpu.active.load(Ordering::SeqCst).into(),
        ];
        let figures = figures.get(first..).unwrap_or_default();
        request.statbuf[..figures.len()].copy_from_slice(figures);
        request.num_entries = figures.len() as i32;
        Ok(())
    }

    pub fn statistic_name(&self, request: &mut VmStatDesc) -> io::Result<()> {
        let name = usize::try_from(request.index)
            .ok()
            .and_then(|index| NAMES.get(index));
        let name = name.ok_or_else(|| self.misuse(libc::EINVAL, "there is no such figure"))?;
        request.desc = [0; 128];
        request.desc[..name.len()].copy_from_slice(name.as_bytes());
        Ok(())
    }
}

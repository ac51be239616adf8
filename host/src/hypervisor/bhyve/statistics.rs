//! What the driver counts of each vCPU: exits by reason, interrupts, time.

use anyhow::{Context, Result};

use super::BhyveVm;
use super::abi::*;
use super::node::{self, Node};

/// Figures of one request.
const BATCH: i32 = 64;
/// More than the driver has.
const MOST: i32 = 1024;

impl<D> BhyveVm<D> {
    /// The figures of the vCPU with this local APIC id, each with the driver's name for it.
    ///
    /// # Errors
    /// There is no such vCPU, or the driver refused.
    pub fn statistics(&self, apic_id: u32) -> Result<Vec<(String, u64)>> {
        let node = &self.shared.node;
        let vcpu = i32::try_from(apic_id)?;
        let refused = || format!("bhyve does not tell the figures of vCPU {apic_id}");
        let mut figures = Vec::new();
        for first in (0..MOST).step_by(BATCH as usize) {
            let mut request = VmStats {
                cpuid: vcpu,
                index: first,
                ..Default::default()
            };
            node.request(&node::STATS, &mut request)
                .with_context(refused)?;
            let count = request.num_entries.clamp(0, BATCH);
            for (index, value) in (first..first + count).zip(request.statbuf) {
                figures.push((name(node, index).with_context(refused)?, value));
            }
            if count < BATCH {
                break;
            }
        }
        Ok(figures)
    }
}

fn name(node: &Node, index: i32) -> std::io::Result<String> {
    let mut request = VmStatDesc {
        index,
        ..Default::default()
    };
    node.request(&node::STAT_DESC, &mut request)?;
    let end = request.desc.iter().position(|&byte| byte == 0);
    let text = &request.desc[..end.unwrap_or(request.desc.len())];
    Ok(String::from_utf8_lossy(text).into_owned())
}

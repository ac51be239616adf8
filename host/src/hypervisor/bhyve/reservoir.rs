//! The driver's memory reservoir, from which guests can have memory that nothing else gets.

use std::fmt;

use anyhow::{Context, Result, ensure};

use super::abi::*;
use super::create;
use super::driver::Driver;
use super::node;
use crate::memory::PAGE;

/// What the reservoir holds, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservoir {
    /// What no VM has.
    pub free: u64,
    /// What VMs have.
    pub used: u64,
    /// Memory of VMs that is not from the reservoir.
    pub transient: u64,
    /// What all of it together can be at most.
    pub limit: u64,
}

impl fmt::Display for Reservoir {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [free, used, transient, limit] =
            [self.free, self.used, self.transient, self.limit].map(|bytes| bytes >> 20);
        write!(
            out,
            "{free} MiB of the reservoir are free and {used} in use, other VMs have {transient} MiB outside of it, and the limit for \
             all is {limit} MiB"
        )
    }
}

/// What the reservoir holds now.
///
/// # Errors
/// No driver, no permission, or it refused.
pub fn query<D: Driver>() -> Result<Reservoir> {
    query_by(&create::open::<D>()?)
}

pub(super) fn query_by<D: Driver>(driver: &D) -> Result<Reservoir> {
    let mut request = VmmResvQuery::default();
    node::control(driver, &node::RESV_QUERY, &mut request)
        .context("bhyve does not tell what its reservoir holds")?;
    Ok(Reservoir {
        free: request.free as u64,
        used: request.alloc as u64,
        transient: request.alloc_transient as u64,
        limit: request.limit as u64,
    })
}

/// Makes the reservoir `bytes` large, in steps of `chunk` bytes or in one if that is 0, both whole pages, and returns its size
/// then. It takes as long as the system takes to find the memory.
///
/// # Errors
/// No driver, no permission, another change is going on, too large, or no such memory: the text gives the figures.
pub fn set_target<D: Driver>(bytes: u64, chunk: u64) -> Result<u64> {
    ensure!(
        bytes.is_multiple_of(PAGE) && chunk.is_multiple_of(PAGE),
        "A reservoir of {bytes} bytes in steps of {chunk} is not in whole pages"
    );
    let driver = create::open::<D>()?;
    let mut request = VmmResvTarget {
        target_sz: usize::try_from(bytes)?,
        chunk_sz: usize::try_from(chunk)?,
        result_sz: 0,
    };
    let result = node::control(&driver, &node::RESV_SET_TARGET, &mut request);
    if let Err(error) = result {
        let reached = request.result_sz >> 20;
        let remedy = match error.raw_os_error() {
            Some(libc::EALREADY) => "another change is going on: try again later".into(),
            Some(libc::EPERM | libc::EACCES) => "run as root in the global zone".into(),
            Some(libc::ENOSPC | libc::ENOMEM) => match query_by(&driver) {
                Ok(reservoir) => format!("{reservoir}: ask for less, or stop something"),
                Err(_) => "ask for less, or stop something".into(),
            },
            Some(libc::EINTR) => format!("interrupted when it was {reached} MiB large"),
            _ => "the driver refuses it".into(),
        };
        return Err(error).with_context(|| {
            format!(
                "Cannot make bhyve's reservoir {} MiB large: {remedy}",
                bytes >> 20
            )
        });
    }
    Ok(request.result_sz as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_in_the_text() {
        let reservoir = Reservoir {
            free: 1 << 30,
            used: 2 << 30,
            transient: 3 << 20,
            limit: 8 << 30,
        };
        let text = reservoir.to_string();
        for figure in ["1024 MiB", "2048", "3 MiB", "8192 MiB"] {
            assert!(text.contains(figure), "{text}");
        }
    }
}

//! Which pages of guest memory were written, by the guest or by devices (`VM_NPT_OPERATION`, from version 17 on).
//!
//! Devices write through the guest's addresses, so the driver sees them too. Who reads memory to copy it must not: a read through a
//! guest address makes the page dirty.

#![allow(unsafe_code)] // a request with a bitmap

use std::io;

use anyhow::{Result, anyhow, ensure};

use super::BhyveVm;
use super::abi::*;
use super::node::Node;
use crate::memory::PAGE;

/// What one request takes at most.
const CHUNK: u64 = 1 << 30;

impl<D> BhyveVm<D> {
    /// Begins or ends to note which pages are written. All are clean at the beginning.
    ///
    /// # Errors
    /// The driver is too old, or this processor can't.
    pub fn track_dirty(&self, on: bool) -> Result<()> {
        let operation = match on {
            true => VNO_OP_EN_TRACK_DIRTY,
            false => VNO_OP_DIS_TRACK_DIRTY,
        };
        // The range has to be empty.
        npt(&self.shared.node, 0, 0, &mut [], operation).map_err(|error| refused(&error))?;
        Ok(())
    }

    /// Which of the `len` bytes at `gpa`, both whole pages, were written since this was last asked: bit `n % 8` of byte `n / 8` is page
    /// `n`. What is not memory is clean.
    ///
    /// # Errors
    /// Nothing is noted, or the driver refused.
    pub fn take_dirty(&self, gpa: u64, len: u64) -> Result<Vec<u8>> {
        let node = &self.shared.node;
        let mut bitmap = Vec::new();
        for (gpa, len) in chunks(gpa, len)? {
            let mut part = vec![0; (len / PAGE).div_ceil(8) as usize];
            let operation = VNO_OP_RESET_DIRTY | VNO_FLAG_BITMAP_OUT;
            npt(node, gpa, len, &mut part, operation).map_err(|error| refused(&error))?;
            bitmap.extend(part);
        }
        Ok(bitmap)
    }

    /// Notes these pages as written, of a bitmap as [`BhyveVm::take_dirty`] gives it: for a copy of them that has failed.
    ///
    /// # Errors
    /// The bitmap is of another length, or the driver refused.
    pub fn mark_dirty(&self, gpa: u64, len: u64, bitmap: &[u8]) -> Result<()> {
        let node = &self.shared.node;
        ensure!(
            bitmap.len() as u64 == (len / PAGE).div_ceil(8),
            "A bitmap of {} bytes is not that of {len} bytes of memory",
            bitmap.len()
        );
        let mut parts = bitmap.chunks((CHUNK / PAGE / 8) as usize);
        for (gpa, len) in chunks(gpa, len)? {
            let mut part = parts.next().unwrap_or_default().to_vec();
            let operation = VNO_OP_SET_DIRTY | VNO_FLAG_BITMAP_IN;
            npt(node, gpa, len, &mut part, operation).map_err(|error| refused(&error))?;
        }
        Ok(())
    }
}

/// What each request is for: all but the last are whole bytes of a bitmap.
fn chunks(gpa: u64, len: u64) -> Result<impl Iterator<Item = (u64, u64)>> {
    ensure!(
        gpa.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && gpa.checked_add(len).is_some(),
        "{len:#x} bytes at {gpa:#x} are not whole pages"
    );
    Ok((0..len)
        .step_by(CHUNK as usize)
        .map(move |from| (gpa + from, CHUNK.min(len - from))))
}

fn refused(error: &io::Error) -> anyhow::Error {
    let remedy = match error.raw_os_error() {
        Some(libc::ENOTTY) => "the vmm driver is too old: version 17 of its interface has it",
        Some(libc::ENOTSUP) => "this processor does not note it",
        Some(libc::EPERM) => "nothing is noted yet",
        _ => "the driver refuses it",
    };
    anyhow!("bhyve does not tell which pages were written: {error}: {remedy}")
}

fn npt(node: &Node, gpa: u64, len: u64, bitmap: &mut [u8], operation: u32) -> io::Result<i32> {
    let mut request = VmNptOperation {
        gpa,
        len,
        bitmap: match bitmap.is_empty() {
            true => std::ptr::null_mut(),
            false => bitmap.as_mut_ptr(),
        },
        operation,
    };
    // SAFETY: the bitmap has a bit for each page of `len`, and lives during the call.
    unsafe { node.raw(VM_NPT_OPERATION, &mut request) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_of_a_gibibyte_at_most() {
        let all: Vec<_> = chunks(4 << 30, (2 << 30) + PAGE).unwrap().collect();
        assert_eq!(all, [(4 << 30, CHUNK), (5 << 30, CHUNK), (6 << 30, PAGE)]);
        assert_eq!(chunks(0, 0).unwrap().count(), 0);
        for (gpa, len) in [(1, PAGE), (0, 1), (0_u64.wrapping_sub(PAGE), 2 * PAGE)] {
            assert!(chunks(gpa, len).is_err());
        }
    }

    #[test]
    fn an_old_driver_is_named() {
        let error = refused(&io::Error::from_raw_os_error(libc::ENOTTY)).to_string();
        assert!(error.contains("version 17"), "{error}");
    }
}

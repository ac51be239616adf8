//! Copies into guest memory that is all zeros, which leave pages untouched that stay so.
#![allow(unsafe_code)] // copies by hand: guest memory changes at any time, and a kernel is many megabytes

use anyhow::{Context, Result};
use vm_memory::{GuestAddress, GuestMemoryBackend as _};

use super::{GuestMemory, not_ram};

/// What is looked at for zeros before it is copied. A copy of many pieces in a row is one.
const PIECE: usize = 4096;

impl GuestMemory {
    /// Copies `from` into guest memory that is all zeros, but for pieces that are all zeros themselves: their pages stay untouched.
    ///
    /// # Errors
    /// Part of the range is not RAM of one region.
    pub fn write_to_zeros(&self, gpa: u64, from: &[u8]) -> Result<()> {
        self.mark_dirty(gpa, from.len() as u64);
        let into = self
            .view()
            .get_slice(GuestAddress(gpa), from.len())
            .with_context(|| not_ram(gpa, from.len()))?;
        let start = into.ptr_guard_mut();
        let mut copied = 0;
        let copy = |begin: usize, end: usize| {
            let run = &from[begin..end];
            // SAFETY: the slice is as long as `from`, of which this is a part.
            let to = unsafe { start.as_ptr().add(begin) };
            // SAFETY: from there on it is at least as long as the run. Guest memory is written as memory that others change at any time.
            unsafe { write(to, run) };
        };
        let mut run = 0;
        for piece in from.chunks(PIECE) {
            let end = copied + piece.len();
            let (first, rest) = piece.split_at(piece.len().min(64));
            // Most pieces show with their first bytes that they are not.
            if zero(first) && zero(rest) {
                copy(run, copied);
                run = end;
            }
            copied = end;
        }
        copy(run, copied);
        Ok(())
    }
}

/// Without an early end, so that it is done many bytes at a time.
fn zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks();
    let any = |all, word: &[u8; 16]| all | u128::from_ne_bytes(*word);
    words.iter().fold(0, any) == 0 && rest.iter().all(|byte| *byte == 0)
}

/// Copies by the processor's own loop, which needs the fewest instructions of all ways and is as fast as any for whole pages.
///
/// # Safety
/// `to` points to as many bytes as `from` has, writable and apart from them.
unsafe fn write(to: *mut u8, from: &[u8]) {
    let (words, rest) = from.as_chunks::<8>();
    // SAFETY: both pointers have `words` words and then `rest` before them, by what the caller promises; the direction flag is clear
    // (System V ABI, 3.2.1).
    unsafe {
        std::arch::asm!(
            "rep movsq",
            "mov rcx, {rest}",
            "rep movsb",
            rest = in(reg) rest.len(),
            inout("rcx") words.len() => _,
            inout("rsi") from.as_ptr() => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_not_written_to_zeros() {
        let memory = GuestMemory::new(4 << 20).unwrap();
        let mut bytes = vec![0; 6 * PIECE + 5];
        bytes[PIECE - 1] = 1;
        bytes[3 * PIECE] = 3;
        bytes[5 * PIECE - 1] = 4;
        *bytes.last_mut().unwrap() = 2;
        // What is skipped shows in memory that is not all zeros.
        memory.write(0x1003, &vec![7; bytes.len()]).unwrap();
        memory.write_to_zeros(0x1003, &bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        memory.read(0x1003, &mut back).unwrap();
        bytes[PIECE..3 * PIECE].fill(7);
        bytes[5 * PIECE..6 * PIECE].fill(7);
        assert!(back == bytes);
        let error = memory.write_to_zeros((4 << 20) - 8, &bytes).unwrap_err();
        assert!(error.to_string().contains("is not all RAM"), "{error}");
        memory.write_to_zeros(0, &[]).unwrap();
    }
}

//! Which pages the guest has written (`VM_NPT_OPERATION`), by KVM's log. What the host writes is not in it, while the driver notes that
//! too.
#![allow(unsafe_code)] // bitmaps of requests

use std::io;
use std::sync::atomic::Ordering;

use vmm_host::hypervisor::bhyve::abi::*;

use crate::argument::{array_in, array_out};
use crate::machine::Machine;
use crate::{control, errno, lock};

const PAGE: u64 = 4096;
const LIMIT: u64 = 1 << 30;

impl Machine {
    /// # Safety
    /// `request.bitmap` points to a bit for each page of `len`, if the operation has one.
    pub unsafe fn npt(&self, request: &VmNptOperation) -> io::Result<i32> {
        let _frozen = self.freeze();
        let flags = VNO_FLAG_BITMAP_IN | VNO_FLAG_BITMAP_OUT;
        let (operation, flags) = (request.operation & !flags, request.operation & flags);
        let refuse = |what: &str| Err(self.misuse(libc::EINVAL, &format!("NPT_OPERATION: {what}")));
        match operation {
            VNO_OP_GET_TRACK_DIRTY | VNO_OP_EN_TRACK_DIRTY | VNO_OP_DIS_TRACK_DIRTY => {
                if request.gpa != 0 || request.len != 0 || !request.bitmap.is_null() || flags != 0 {
                    return refuse("a range of what has none");
                }
                return self.track(operation);
            }
            VNO_OP_RESET_DIRTY | VNO_OP_SET_DIRTY | VNO_OP_GET_DIRTY => {}
            _ => return refuse("unknown"),
        }
        if !(request.gpa | request.len).is_multiple_of(PAGE) {
            return refuse("parts of pages");
        }
        if request.len > LIMIT {
            return Err(self.misuse(libc::E2BIG, "NPT_OPERATION: above 1 GiB"));
        }
        if !self.tracking.load(Ordering::SeqCst) {
            return Err(errno(libc::EPERM));
        }
        let bytes = (request.len / PAGE).div_ceil(8) as usize;
        let mut dirty = lock(&self.dirty);
        self.harvest(&mut dirty)?;
        let mut bitmap = vec![0u8; bytes];
        if flags & VNO_FLAG_BITMAP_IN != 0 {
            // SAFETY: by this function's contract.
            bitmap = unsafe { array_in(request.bitmap.cast_const(), bytes) }?;
        } else {
            bitmap.fill(0xff);
        }
        for page in 0..request.len / PAGE {
            let (at, bit) = (page as usize / 8, 1 << (page % 8));
            let wanted = bitmap[at] & bit != 0;
            let gpa = request.gpa + page * PAGE;
            let was = dirty.contains(&gpa);
            match operation {
                VNO_OP_RESET_DIRTY if wanted => drop(dirty.remove(&gpa)),
                VNO_OP_SET_DIRTY if wanted => drop(dirty.insert(gpa)),
                _ => {}
            }
            if !(wanted && was) {
                bitmap[at] &= !bit;
            }
        }
        if flags & VNO_FLAG_BITMAP_OUT != 0 {
            // SAFETY: as above.
            unsafe { array_out(request.bitmap, &bitmap) }?;
        }
        Ok(0)
    }

    fn track(&self, operation: u32) -> io::Result<i32> {
        if operation == VNO_OP_GET_TRACK_DIRTY {
            return Ok(i32::from(self.tracking.load(Ordering::SeqCst)));
        }
        let on = operation == VNO_OP_EN_TRACK_DIRTY;
        if on && !control::settings().dirty_tracking {
            return Err(errno(libc::ENOTSUP));
        }
        self.tracking.store(on, Ordering::SeqCst);
        lock(&self.dirty).clear();
        self.show_again()?;
        Ok(0)
    }
}

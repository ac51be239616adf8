//! Guest memory that rings register: the kernel then looks up and holds its pages once, and not for each request.

use vmm_plugin_api::{GuestMemory, GuestSlice};

/// Most bytes in one buffer that a ring takes (io_uring_register(2)).
const MOST: usize = 1 << 30;

/// All guest memory, cut into pieces that a ring takes as buffers; the place in the list is the buffer's number.
#[derive(Clone, Debug)]
pub struct Pinned {
    /// By address.
    pieces: Vec<GuestSlice>,
}

impl Pinned {
    /// That of this guest.
    pub fn new(memory: GuestMemory) -> Self {
        let mut pieces = Vec::new();
        for (gpa, len) in memory.ranges() {
            let Ok(range) = memory.readable(gpa, len) else {
                continue;
            };
            pieces.extend(
                (0..range.len())
                    .step_by(MOST)
                    .map(|at| range.part(at, MOST)),
            );
        }
        pieces.sort_by_key(|piece| piece.as_ptr() as usize);
        Self { pieces }
    }

    /// The buffers to register.
    pub fn pieces(&self) -> &[GuestSlice] {
        &self.pieces
    }

    /// The buffer that all of `segment` lies in, if there is one.
    pub fn find(&self, segment: &GuestSlice) -> Option<u16> {
        let address = segment.as_ptr() as usize;
        let behind = |piece: &GuestSlice| piece.as_ptr() as usize <= address;
        let index = self.pieces.partition_point(behind).checked_sub(1)?;
        let piece = self.pieces.get(index)?;
        let offset = address - piece.as_ptr() as usize;
        let fits = offset.checked_add(segment.len())? <= piece.len();
        fits.then(|| u16::try_from(index).ok()).flatten()
    }
}

//! One sector of the log: it says which it is, when it was written, and whether it is whole.

/// Bytes.
pub const SECTOR: usize = 512;

/// The sector `index` as it is written at time `sequence`, which is not 0.
#[must_use]
pub fn make(index: u64, sequence: u64) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    let mut state = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sequence.rotate_left(32);
    for word in sector.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    sector[..8].copy_from_slice(&index.to_le_bytes());
    sector[8..16].copy_from_slice(&sequence.to_le_bytes());
    let sum = sum(&sector);
    sector[16..24].copy_from_slice(&sum.to_le_bytes());
    sector
}

/// FNV-1a over all but the place of the sum.
fn sum(sector: &[u8]) -> u64 {
    let covered = sector[..16].iter().chain(&sector[24..]);
    covered.fold(0xcbf2_9ce4_8422_2325, |state, byte| {
        (state ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// When the sector `index` was written: 0 for one that never was.
///
/// # Errors
/// It is neither empty nor a whole sector of this place.
pub fn read(index: u64, sector: &[u8]) -> Result<u64, String> {
    if sector.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let word = |at: usize| {
        sector[at..at + 8]
            .iter()
            .rev()
            .fold(0, |n, b| n << 8 | u64::from(*b))
    };
    if word(16) != sum(sector) {
        return Err(format!(
            "sector {index} is neither old nor new: its checksum is wrong"
        ));
    }
    if word(0) != index {
        return Err(format!("sector {index} holds what belongs to {}", word(0)));
    }
    Ok(word(8))
}

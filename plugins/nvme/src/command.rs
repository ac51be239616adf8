//! A submission queue entry (section 4.2) and a completion queue entry (section 4.6).

use crate::status::Status;

/// Bytes of a submission queue entry.
pub(crate) const COMMAND_BYTES: usize = 64;
/// Bytes of a completion queue entry.
pub(crate) const COMPLETION_BYTES: usize = 16;

/// Where a command's data is (section 4.2, PSDT).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataPointer {
    /// Two PRP entries.
    Prp(u64, u64),
    /// The first SGL descriptor.
    Sgl([u8; 16]),
}

/// A command as the guest wrote it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Command {
    words: [u32; 16],
}

impl Command {
    pub(crate) fn new(bytes: &[u8; COMMAND_BYTES]) -> Self {
        let mut words = [0; 16];
        for (word, four) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*four);
        }
        Self { words }
    }

    pub(crate) fn opcode(&self) -> u8 {
        self.words[0] as u8
    }

    /// Command identifier.
    pub(crate) fn id(&self) -> u16 {
        (self.words[0] >> 16) as u16
    }

    /// Whether it is half of a fused operation.
    pub(crate) fn fused(&self) -> bool {
        self.words[0] >> 8 & 3 != 0
    }

    pub(crate) fn namespace(&self) -> u32 {
        self.words[1]
    }

    /// Command dword `n`, 10 to 15.
    pub(crate) fn dword(&self, n: usize) -> u32 {
        self.words[n]
    }

    /// Two dwords as one number, the lower first.
    pub(crate) fn qword(&self, n: usize) -> u64 {
        u64::from(self.words[n]) | u64::from(self.words[n + 1]) << 32
    }

    pub(crate) fn prp1(&self) -> u64 {
        self.qword(6)
    }

    pub(crate) fn prp2(&self) -> u64 {
        self.qword(8)
    }

    /// The data pointer of an I/O command.
    pub(crate) fn data(&self) -> Result<DataPointer, Status> {
        match self.words[0] >> 14 & 3 {
            0 => Ok(DataPointer::Prp(self.prp1(), self.prp2())),
            1 | 2 => {
                let mut descriptor = [0; 16];
                descriptor[..8].copy_from_slice(&self.prp1().to_le_bytes());
                descriptor[8..].copy_from_slice(&self.prp2().to_le_bytes());
                Ok(DataPointer::Sgl(descriptor))
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }
}

/// What a completion queue entry says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    /// Command specific.
    pub(crate) result: u32,
    /// Submission queue.
    pub(crate) queue: u16,
    /// Its head.
    pub(crate) head: u16,
    /// Command identifier.
    pub(crate) command: u16,
    pub(crate) status: Status,
}

/// A completion in the form that the guest reads; aligned, so that its last half with the phase is written at once.
#[repr(align(16))]
pub(crate) struct Entry(pub(crate) [u8; COMPLETION_BYTES]);

impl Completion {
    pub(crate) fn entry(&self, phase: bool) -> Entry {
        let mut bytes = [0; COMPLETION_BYTES];
        bytes[..4].copy_from_slice(&self.result.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.head.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.queue.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.command.to_le_bytes());
        bytes[14..].copy_from_slice(&self.status.with_phase(phase).to_le_bytes());
        Entry(bytes)
    }
}

//! Status of a completed command (section 4.6.1).

/// The status field of a completion: code, its type and the flags, without the phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status(u16);

/// There is an entry in the error log with more about it.
const MORE: u16 = 1 << 13;
/// The same command will fail again.
const DO_NOT_RETRY: u16 = 1 << 14;

/// A mistake of the host's: code `code` of type `kind`.
const fn mistake(kind: u16, code: u16) -> Status {
    Status(kind << 8 | code | DO_NOT_RETRY)
}

/// Status code types (figure 126).
const GENERIC: u16 = 0;
const SPECIFIC: u16 = 1;
const MEDIA: u16 = 2;

impl Status {
    pub(crate) const SUCCESS: Self = Self(0);

    // Generic command status (figures 127 and 128).
    pub(crate) const INVALID_OPCODE: Self = mistake(GENERIC, 0x01);
    pub(crate) const INVALID_FIELD: Self = mistake(GENERIC, 0x02);
    pub(crate) const DATA_TRANSFER_ERROR: Self = mistake(GENERIC, 0x04);
    pub(crate) const INTERNAL_ERROR: Self = Self(0x06);
    pub(crate) const ABORT_REQUESTED: Self = Self(0x07);
    pub(crate) const INVALID_NAMESPACE: Self = mistake(GENERIC, 0x0b);
    pub(crate) const COMMAND_SEQUENCE_ERROR: Self = mistake(GENERIC, 0x0c);
    pub(crate) const INVALID_SGL_SEGMENT: Self = mistake(GENERIC, 0x0d);
    pub(crate) const TOO_MANY_SGL_DESCRIPTORS: Self = mistake(GENERIC, 0x0e);
    pub(crate) const SGL_LENGTH_INVALID: Self = mistake(GENERIC, 0x0f);
    pub(crate) const SGL_TYPE_INVALID: Self = mistake(GENERIC, 0x11);
    pub(crate) const PRP_OFFSET_INVALID: Self = mistake(GENERIC, 0x13);
    pub(crate) const WRITE_PROTECTED: Self = mistake(GENERIC, 0x20);
    pub(crate) const LBA_OUT_OF_RANGE: Self = mistake(GENERIC, 0x80);
    pub(crate) const CAPACITY_EXCEEDED: Self = mistake(GENERIC, 0x81);

    // Command specific status (figure 129).
    pub(crate) const COMPLETION_QUEUE_INVALID: Self = mistake(SPECIFIC, 0x00);
    pub(crate) const INVALID_QUEUE_IDENTIFIER: Self = mistake(SPECIFIC, 0x01);
    pub(crate) const INVALID_QUEUE_SIZE: Self = mistake(SPECIFIC, 0x02);
    pub(crate) const EVENT_LIMIT_EXCEEDED: Self = mistake(SPECIFIC, 0x05);
    pub(crate) const INVALID_INTERRUPT_VECTOR: Self = mistake(SPECIFIC, 0x08);
    pub(crate) const INVALID_LOG_PAGE: Self = mistake(SPECIFIC, 0x09);
    pub(crate) const INVALID_QUEUE_DELETION: Self = mistake(SPECIFIC, 0x0c);
    pub(crate) const NOT_SAVEABLE: Self = mistake(SPECIFIC, 0x0d);
    pub(crate) const NOT_CHANGEABLE: Self = mistake(SPECIFIC, 0x0e);
    pub(crate) const NOT_NAMESPACE_SPECIFIC: Self = mistake(SPECIFIC, 0x0f);

    // Media and data integrity errors (figure 132).
    pub(crate) const WRITE_FAULT: Self = Self(MEDIA << 8 | 0x80);
    pub(crate) const UNRECOVERED_READ_ERROR: Self = Self(MEDIA << 8 | 0x81);
    pub(crate) const COMPARE_FAILURE: Self = mistake(MEDIA, 0x85);

    /// Whether the command did what it should.
    pub(crate) fn is_success(self) -> bool {
        self.0 == 0
    }

    /// The same, for a command that has an entry in the error log.
    pub(crate) fn logged(self) -> Self {
        Self(self.0 | MORE)
    }

    /// Whether the medium failed, which SMART counts.
    pub(crate) fn is_media_error(self) -> bool {
        self.0 >> 8 & 7 == MEDIA && self.0 & 0xff != 0x85
    }

    /// Status field and phase as the upper half of a completion's last word.
    pub(crate) fn with_phase(self, phase: bool) -> u16 {
        self.0 << 1 | u16::from(phase)
    }
}

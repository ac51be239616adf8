//! One command of an I/O queue, checked (the NVM command set, section 6).

use vmm_plugin_api::abi::block::{BLOCK_DISCARD, BLOCK_READ_ONLY, BLOCK_WRITE_ZEROES};
use vmm_plugin_api::{BlockInfo, BlockOp};

use crate::command::{Command, DataPointer};
use crate::data::MAX_TRANSFER;
use crate::status::Status;

pub(crate) const FLUSH: u8 = 0x00;
pub(crate) const WRITE: u8 = 0x01;
pub(crate) const READ: u8 = 0x02;
pub(crate) const COMPARE: u8 = 0x05;
pub(crate) const WRITE_ZEROES: u8 = 0x08;
pub(crate) const DATASET_MANAGEMENT: u8 = 0x09;

/// The one namespace.
pub(crate) const NAMESPACE: u32 = 1;
/// Every namespace.
pub(crate) const ALL_NAMESPACES: u32 = u32::MAX;

/// Force unit access, bit of dword 12.
const FUA: u32 = 1 << 30;
/// Deallocate when zeroing, bit of dword 12.
const DEALLOCATE: u32 = 1 << 25;
/// Deallocate, bit of dword 11 of dataset management.
const AD: u32 = 1 << 2;

/// What the controller does with a command.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    /// Moves data; flushes afterwards if `then_flush`.
    Transfer {
        op: BlockOp,
        data: DataPointer,
        offset: u64,
        len: u64,
        then_flush: bool,
    },
    /// Compares the guest's data with the namespace's.
    Compare {
        data: DataPointer,
        offset: u64,
        len: u64,
        then_flush: bool,
    },
    /// Makes durable what is complete.
    Flush,
    /// Zeroes a range; flushes afterwards if `then_flush`.
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
        then_flush: bool,
    },
    /// Discards `ranges` ranges that the data lists.
    Discard { data: DataPointer, ranges: usize },
    /// Nothing.
    Nothing,
}

/// What commands are checked against.
#[derive(Clone, Copy)]
pub(crate) struct Namespace {
    pub(crate) info: BlockInfo,
}

impl Namespace {
    pub(crate) fn has(&self, feature: u32) -> bool {
        self.info.features & feature != 0
    }

    pub(crate) fn read_only(&self) -> bool {
        self.has(BLOCK_READ_ONLY)
    }

    pub(crate) fn discards(&self) -> bool {
        !self.read_only() && self.has(BLOCK_DISCARD) && self.max_trim() > 0
    }

    pub(crate) fn zeroes(&self) -> bool {
        !self.read_only() && self.has(BLOCK_WRITE_ZEROES) && self.max_trim() > 0
    }

    /// Bytes of a logical block.
    pub(crate) fn block(&self) -> u64 {
        u64::from(self.info.logical.max(1))
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.info.bytes / self.block()
    }

    /// Most bytes that the backend discards or zeroes at once.
    pub(crate) fn max_trim(&self) -> u64 {
        u64::from(self.info.max_discard) / self.block() * self.block()
    }

    /// Byte offset and length of a range of blocks.
    ///
    /// # Errors
    /// It is not in the namespace.
    pub(crate) fn range(&self, first: u64, blocks: u64) -> Result<(u64, u64), Status> {
        let end = first.checked_add(blocks);
        if end.is_none_or(|end| end > self.blocks()) {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        Ok((first * self.block(), blocks * self.block()))
    }

    /// The range that dwords 10 to 12 of a command give.
    fn command_range(&self, command: &Command) -> Result<(u64, u64), Status> {
        self.range(command.qword(10), u64::from(command.dword(12) & 0xffff) + 1)
    }

    fn data_range(&self, command: &Command) -> Result<(u64, u64), Status> {
        let blocks = u64::from(command.dword(12) & 0xffff) + 1;
        if blocks * self.block() > MAX_TRANSFER {
            return Err(Status::INVALID_FIELD);
        }
        self.command_range(command)
    }

    /// Reads a command. `cached`: writes that complete may be lost until a flush, because the backend has a volatile cache;
    /// `write_through`: the guest has switched that off.
    ///
    /// # Errors
    /// What the command completes with.
    pub(crate) fn parse(
        &self,
        command: &Command,
        cached: bool,
        write_through: bool,
    ) -> Result<Action, Status> {
        let opcode = command.opcode();
        let known = match opcode {
            FLUSH | WRITE | READ | COMPARE => true,
            WRITE_ZEROES => self.zeroes() || self.read_only(),
            DATASET_MANAGEMENT => self.discards() || self.read_only(),
            _ => false,
        };
        if !known {
            return Err(Status::INVALID_OPCODE);
        }
        if command.fused() {
            return Err(Status::INVALID_FIELD);
        }
        let namespace = command.namespace();
        if namespace != NAMESPACE && !(opcode == FLUSH && namespace == ALL_NAMESPACES) {
            return Err(Status::INVALID_NAMESPACE);
        }
        let durable = cached && (write_through || command.dword(12) & FUA != 0);
        match opcode {
            FLUSH => Ok(Action::Flush),
            READ => {
                let (offset, len) = self.data_range(command)?;
                Ok(Action::Transfer {
                    op: BlockOp::Read,
                    data: command.data()?,
                    offset,
                    len,
                    // Section 6.9: what is returned is on the medium.
                    then_flush: cached && command.dword(12) & FUA != 0,
                })
            }
            COMPARE => {
                let (offset, len) = self.data_range(command)?;
                Ok(Action::Compare {
                    data: command.data()?,
                    offset,
                    len,
                    then_flush: cached && command.dword(12) & FUA != 0,
                })
            }
            _ if self.read_only() => Err(Status::WRITE_PROTECTED),
            WRITE => {
                let (offset, len) = self.data_range(command)?;
                Ok(Action::Transfer {
                    op: BlockOp::Write { fua: durable },
                    data: command.data()?,
                    offset,
                    len,
                    then_flush: false,
                })
            }
            WRITE_ZEROES => {
                let (offset, len) = self.command_range(command)?;
                Ok(Action::Zero {
                    offset,
                    len,
                    unmap: command.dword(12) & DEALLOCATE != 0,
                    then_flush: durable,
                })
            }
            // Section 6.7: without the attribute the rest is hints.
            _ if command.dword(11) & AD == 0 => Ok(Action::Nothing),
            _ => Ok(Action::Discard {
                data: command.data()?,
                ranges: (command.dword(10) & 0xff) as usize + 1,
            }),
        }
    }

    /// A range of a dataset management command (figure 368).
    ///
    /// # Errors
    /// It is not in the namespace.
    pub(crate) fn discard_range(&self, bytes: &[u8; 16]) -> Result<(u64, u64), Status> {
        let [_, _, _, _, n0, n1, n2, n3, first @ ..] = *bytes;
        let blocks = u32::from_le_bytes([n0, n1, n2, n3]);
        self.range(u64::from_le_bytes(first), blocks.into())
    }
}

/// What a command of the backend's that ended with `-errno` completes with.
pub(crate) fn failure(op: BlockOp, result: i32) -> Status {
    match (-result, op) {
        (libc::EROFS, _) => Status::WRITE_PROTECTED,
        (libc::ENOSPC | libc::EDQUOT, _) => Status::CAPACITY_EXCEEDED,
        (_, BlockOp::Read) => Status::UNRECOVERED_READ_ERROR,
        (_, BlockOp::Write { .. }) => Status::WRITE_FAULT,
        _ => Status::INTERNAL_ERROR,
    }
}

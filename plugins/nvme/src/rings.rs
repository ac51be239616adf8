//! Submission and completion queues in guest memory (section 4.1).

use std::sync::atomic::{Ordering, fence};

use vmm_plugin_api::{GuestMemory, GuestSlice, MemoryError};

use crate::command::{COMMAND_BYTES, COMPLETION_BYTES, Command, Completion};
use crate::doorbells::{Doorbells, Misuse, Shadow};

/// A submission queue, in the hands of the thread that serves it.
pub(crate) struct Submission {
    pub(crate) id: u16,
    ring: GuestSlice,
    entries: u32,
    head: u32,
    tail: u32,
    /// Commands fetched and not completed.
    pub(crate) in_flight: u32,
    shadow: Option<Shadow>,
    /// A value that was no tail and has been reported.
    refused: Option<u32>,
}

impl Submission {
    /// A queue of `entries` at guest address `address`.
    pub(crate) fn new(
        memory: GuestMemory,
        id: u16,
        address: u64,
        entries: u32,
        shadow: Option<Shadow>,
    ) -> Result<Self, MemoryError> {
        Ok(Self {
            id,
            ring: memory.readable(address, u64::from(entries) * COMMAND_BYTES as u64)?,
            entries,
            head: 0,
            tail: 0,
            in_flight: 0,
            shadow,
            refused: None,
        })
    }

    pub(crate) fn set_shadow(&mut self, shadow: Shadow) {
        self.shadow = Some(shadow);
    }

    /// Takes the tail that the guest has written; whether there are commands to fetch.
    ///
    /// # Errors
    /// It wrote something that is no index of the queue: reported once.
    pub(crate) fn refresh(&mut self, doorbells: &Doorbells) -> Result<bool, Misuse> {
        let tail = match &self.shadow {
            // What the guest wrote before this, it wrote before it changed the tail: the load acquires.
            Some(shadow) => shadow.tail(self.id),
            None => doorbells.submission[usize::from(self.id)].value(),
        };
        if tail < self.entries {
            self.tail = tail;
        } else if self.refused.replace(tail) != Some(tail) {
            return Err(Misuse::Value);
        }
        Ok(self.head != self.tail)
    }

    /// Asks for a wake-up by the next command. [`Submission::refresh`] has to be called afterwards.
    pub(crate) fn want_doorbell(&self) {
        if let Some(shadow) = &self.shadow {
            shadow.want_tail(self.id, self.tail);
        }
    }

    /// The next command, of those that [`Submission::refresh`] has seen.
    pub(crate) fn fetch(&mut self) -> Option<Command> {
        if self.head == self.tail {
            return None;
        }
        let mut bytes = Aligned([0; COMMAND_BYTES]);
        self.ring
            .read(self.head as usize * COMMAND_BYTES, &mut bytes.0);
        self.head = if self.head + 1 == self.entries {
            0
        } else {
            self.head + 1
        };
        Some(Command::new(&bytes.0))
    }

    /// How far commands have been fetched.
    pub(crate) fn head(&self) -> u16 {
        self.head as u16
    }
}

/// So that a command is copied in words.
#[repr(align(8))]
struct Aligned([u8; COMMAND_BYTES]);

/// A completion queue, in the hands of the thread that serves it.
pub(crate) struct CompletionQueue {
    pub(crate) id: u16,
    memory: GuestMemory,
    ring: GuestSlice,
    address: u64,
    entries: u32,
    head: u32,
    tail: u32,
    phase: bool,
    /// Vector of its interrupts, if it has them enabled.
    pub(crate) vector: Option<u16>,
    shadow: Option<Shadow>,
    refused: Option<u32>,
    /// Entries have been posted since the last interrupt.
    posted: bool,
}

impl CompletionQueue {
    /// A queue of `entries` at guest address `address`.
    pub(crate) fn new(
        memory: GuestMemory,
        id: u16,
        address: u64,
        entries: u32,
        vector: Option<u16>,
        shadow: Option<Shadow>,
    ) -> Result<Self, MemoryError> {
        Ok(Self {
            id,
            memory,
            ring: memory.writable(address, u64::from(entries) * COMPLETION_BYTES as u64)?,
            address,
            entries,
            head: 0,
            tail: 0,
            phase: true,
            vector,
            shadow,
            refused: None,
            posted: false,
        })
    }

    pub(crate) fn set_shadow(&mut self, shadow: Shadow) {
        self.shadow = Some(shadow);
    }

    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from {
            to - from
        } else {
            to + self.entries - from
        }
    }

    /// Takes the head that the guest has written.
    ///
    /// # Errors
    /// It wrote something that is no entry which was posted: reported once.
    pub(crate) fn refresh(&mut self, doorbells: &Doorbells) -> Result<(), Misuse> {
        let bell = &doorbells.completion[usize::from(self.id)];
        let head = match &self.shadow {
            Some(shadow) => shadow.head(self.id),
            None => bell.value(),
        };
        if head == self.head {
            return Ok(());
        }
        let valid = head < self.entries
            && self.distance(self.head, head) <= self.distance(self.head, self.tail);
        if valid {
            self.head = head;
            if self.shadow.is_some() {
                bell.note(head);
            }
        } else if self.refused.replace(head) != Some(head) {
            return Err(Misuse::Value);
        }
        Ok(())
    }

    /// How many entries can be posted.
    pub(crate) fn room(&self) -> u32 {
        self.entries - 1 - self.distance(self.head, self.tail)
    }

    /// Asks for a wake-up when the guest takes entries. [`CompletionQueue::refresh`] has to be called afterwards.
    pub(crate) fn want_doorbell(&self, doorbells: &Doorbells) {
        doorbells.completion[usize::from(self.id)].set_awaited();
        if let Some(shadow) = &self.shadow {
            shadow.want_head(self.id, self.head);
        }
    }

    /// Posts an entry; there has to be room.
    pub(crate) fn post(&mut self, completion: &Completion) {
        let offset = self.tail as usize * COMPLETION_BYTES;
        let entry = completion.entry(self.phase);
        // What the entry announces is written before it is.
        fence(Ordering::Release);
        self.ring.write(offset, &entry.0);
        if self.memory.tracking() {
            self.memory
                .mark_written(self.address + offset as u64, COMPLETION_BYTES as u64);
        }
        self.posted = true;
        self.tail += 1;
        if self.tail == self.entries {
            self.tail = 0;
            self.phase = !self.phase;
        }
    }

    /// Whether entries have been posted since the last call; others see the tail from then on.
    pub(crate) fn publish(&mut self, doorbells: &Doorbells) -> bool {
        if !std::mem::take(&mut self.posted) {
            return false;
        }
        doorbells.completion[usize::from(self.id)].set_tail(self.tail);
        true
    }

    /// With the INTx pin, which falls when the guest has taken everything: makes the guest tell when it takes something, which with
    /// the shadow it does not by itself. Called before the thread sleeps.
    ///
    /// # Errors
    /// As [`CompletionQueue::refresh`].
    pub(crate) fn follow_head(&mut self, doorbells: &Doorbells) -> Result<(), Misuse> {
        if self.shadow.is_none() {
            return Ok(());
        }
        // Again when the guest has moved it meanwhile: it then has compared with the old index. Not for ever, though.
        for _ in 0..8 {
            let head = self.head;
            if head == self.tail {
                break;
            }
            self.want_doorbell(doorbells);
            self.refresh(doorbells)?;
            if self.head == head {
                break;
            }
        }
        Ok(())
    }
}

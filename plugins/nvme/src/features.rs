//! Get Features and Set Features (sections 5.15 and 5.21).

use std::sync::atomic::Ordering;

use crate::admin::Answer;
use crate::command::Command;
use crate::doorbells::QUEUES;
use crate::interrupts::VECTORS;
use crate::io::{ALL_NAMESPACES, NAMESPACE};
use crate::log_pages::TEMPERATURE;
use crate::shared::Shared;
use crate::status::Status;

const ARBITRATION: u8 = 0x01;
const POWER_MANAGEMENT: u8 = 0x02;
const TEMPERATURE_THRESHOLD: u8 = 0x04;
const ERROR_RECOVERY: u8 = 0x05;
const VOLATILE_WRITE_CACHE: u8 = 0x06;
const NUMBER_OF_QUEUES: u8 = 0x07;
const INTERRUPT_COALESCING: u8 = 0x08;
const INTERRUPT_VECTOR: u8 = 0x09;
const WRITE_ATOMICITY: u8 = 0x0a;
const ASYNC_EVENTS: u8 = 0x0b;

/// Set Features: keep the value over resets.
const SAVE: u32 = 1 << 31;
/// Get Features with "supported capabilities": can be changed, is neither kept nor a namespace's own.
const CHANGEABLE: u32 = 1 << 2;
/// Kelvin at which the guest is warned, unless it says otherwise (`WCTEMP`).
pub(crate) const WARNING_TEMPERATURE: u16 = 343;
/// I/O queue pairs that can be had.
const MOST_QUEUES: usize = QUEUES - 1;

/// The values that the guest has set.
#[derive(Clone, Debug)]
pub(crate) struct Features {
    arbitration: u32,
    power: u32,
    over: u16,
    under: u16,
    error_recovery: u32,
    queues: usize,
    coalescing: u32,
    /// Vectors without coalescing, one bit each.
    uncoalesced: u64,
    write_atomicity: u32,
    async_events: u32,
}

impl Features {
    /// Those of a controller that has just been reset.
    pub(crate) fn new(shared: &Shared) -> Self {
        shared.write_through.store(false, Ordering::Relaxed);
        Self::defaults()
    }

    fn defaults() -> Self {
        Self {
            arbitration: 0,
            power: 0,
            over: WARNING_TEMPERATURE,
            under: 0,
            error_recovery: 0,
            queues: MOST_QUEUES,
            coalescing: 0,
            uncoalesced: 0,
            write_atomicity: 0,
            async_events: 0,
        }
    }

    /// Highest identifier of an I/O queue.
    pub(crate) fn queues(&self) -> usize {
        self.queues
    }

    /// Whether the temperature is past a threshold.
    pub(crate) fn temperature_warning(&self) -> bool {
        TEMPERATURE >= self.over || TEMPERATURE <= self.under
    }

    /// Whether the guest wants an event for that.
    pub(crate) fn reports_temperature(&self) -> bool {
        self.async_events & 1 << 1 != 0
    }

    /// Whether the guest wants an event when a namespace has changed.
    pub(crate) fn reports_namespaces(&self) -> bool {
        self.async_events & 1 << 8 != 0
    }

    /// Set Features. `in_use`: there are I/O queues.
    pub(crate) fn set(&mut self, shared: &Shared, command: &Command, in_use: bool) -> Answer {
        let (feature, value) = (command.dword(10) as u8, command.dword(11));
        if !known(feature, shared) {
            return Err(Status::INVALID_FIELD);
        }
        if command.dword(10) & SAVE != 0 {
            return Err(Status::NOT_SAVEABLE);
        }
        match command.namespace() {
            0 | ALL_NAMESPACES => {}
            NAMESPACE if feature == ERROR_RECOVERY => {}
            NAMESPACE => return Err(Status::NOT_NAMESPACE_SPECIFIC),
            _ => return Err(Status::INVALID_NAMESPACE),
        }
        match feature {
            ARBITRATION => self.arbitration = value,
            // There is one power state.
            POWER_MANAGEMENT if value & 0x1f != 0 => return Err(Status::INVALID_FIELD),
            POWER_MANAGEMENT => self.power = value & 0xe0,
            TEMPERATURE_THRESHOLD => *self.threshold(value)? = value as u16,
            // Errors of deallocated blocks are not offered.
            ERROR_RECOVERY if value & 1 << 16 != 0 => return Err(Status::INVALID_FIELD),
            ERROR_RECOVERY => self.error_recovery = value & 0xffff,
            VOLATILE_WRITE_CACHE => {
                shared
                    .write_through
                    .store(value & 1 == 0, Ordering::Relaxed);
            }
            NUMBER_OF_QUEUES => return self.set_queues(value, in_use),
            INTERRUPT_COALESCING => self.coalescing = value & 0xffff,
            INTERRUPT_VECTOR => {
                let vector = vector(value)?;
                self.uncoalesced &= !(1 << vector);
                self.uncoalesced |= u64::from(value >> 16 & 1) << vector;
            }
            WRITE_ATOMICITY => self.write_atomicity = value & 1,
            ASYNC_EVENTS => self.async_events = value & 0x1ff,
            _ => return Err(Status::NOT_CHANGEABLE),
        }
        Ok(0)
    }

    fn threshold(&mut self, value: u32) -> Result<&mut u16, Status> {
        // The composite temperature, or all sensors: there are no others.
        if !matches!(value >> 16 & 0xf, 0 | 0xf) {
            return Err(Status::INVALID_FIELD);
        }
        match value >> 20 & 3 {
            0 => Ok(&mut self.over),
            1 => Ok(&mut self.under),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn set_queues(&mut self, value: u32, in_use: bool) -> Answer {
        let (submission, completion) = (value & 0xffff, value >> 16);
        if submission == 0xffff || completion == 0xffff {
            return Err(Status::INVALID_FIELD);
        }
        if in_use {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        let wanted = submission.max(completion) as usize + 1;
        self.queues = wanted.min(MOST_QUEUES);
        Ok(self.queue_counts())
    }

    fn queue_counts(&self) -> u32 {
        let last = self.queues as u32 - 1;
        last | last << 16
    }

    /// Get Features.
    pub(crate) fn get(&mut self, command: &Command, shared: &Shared) -> Answer {
        let (feature, select) = (command.dword(10) as u8, command.dword(10) >> 8 & 7);
        if !known(feature, shared) {
            return Err(Status::INVALID_FIELD);
        }
        if !matches!(command.namespace(), 0 | NAMESPACE | ALL_NAMESPACES) {
            return Err(Status::INVALID_NAMESPACE);
        }
        let write_through = shared.write_through.load(Ordering::Relaxed);
        match select {
            0 => self.value(feature, command.dword(11), write_through),
            // Nothing is kept, so that what was saved is the default.
            1 | 2 => Self::defaults().value(feature, command.dword(11), false),
            3 => Ok(CHANGEABLE),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn value(&mut self, feature: u8, which: u32, write_through: bool) -> Answer {
        Ok(match feature {
            ARBITRATION => self.arbitration,
            POWER_MANAGEMENT => self.power,
            TEMPERATURE_THRESHOLD => u32::from(*self.threshold(which)?),
            ERROR_RECOVERY => self.error_recovery,
            VOLATILE_WRITE_CACHE => u32::from(!write_through),
            NUMBER_OF_QUEUES => self.queue_counts(),
            INTERRUPT_COALESCING => self.coalescing,
            INTERRUPT_VECTOR => {
                let vector = vector(which)?;
                u32::from(vector) | ((self.uncoalesced >> vector & 1) as u32) << 16
            }
            WRITE_ATOMICITY => self.write_atomicity,
            _ => self.async_events,
        })
    }
}

fn known(feature: u8, shared: &Shared) -> bool {
    match feature {
        VOLATILE_WRITE_CACHE => shared.cached(),
        ARBITRATION | POWER_MANAGEMENT => true,
        _ => (TEMPERATURE_THRESHOLD..=ASYNC_EVENTS).contains(&feature),
    }
}

fn vector(value: u32) -> Result<u16, Status> {
    let vector = value as u16;
    if vector < VECTORS {
        Ok(vector)
    } else {
        Err(Status::INVALID_FIELD)
    }
}

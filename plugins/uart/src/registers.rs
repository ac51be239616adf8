//! The chip: registers, receive FIFO and interrupt logic, without any surroundings.
//!
//! The transmitter has no speed: a byte written is gone at once, so its FIFO never holds anything and the line status
//! always says "empty". Line settings (baud rate, word length, parity) are kept for the guest to read and have no effect.

use crate::fifo::{DEPTH, Fifo};

/// Register offsets (PC16550D table II).
mod offset {
    pub const DATA: u8 = 0; // RBR, THR; DLL with DLAB
    pub const IER: u8 = 1; // DLM with DLAB
    pub const IIR_FCR: u8 = 2;
    pub const LCR: u8 = 3;
    pub const MCR: u8 = 4;
    pub const LSR: u8 = 5;
    pub const MSR: u8 = 6;
    pub const SCR: u8 = 7;
}

const IER_RECEIVED: u8 = 0x01;
const IER_THR_EMPTY: u8 = 0x02;
const IER_LINE_STATUS: u8 = 0x04;
const IER_MODEM_STATUS: u8 = 0x08;

const IIR_NONE: u8 = 0x01;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_RECEIVED: u8 = 0x04;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_THR_EMPTY: u8 = 0x02;
const IIR_MODEM_STATUS: u8 = 0x00;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RX: u8 = 0x02;
const FCR_TRIGGER: u8 = 0xc0;

const LCR_DLAB: u8 = 0x80;

const MCR_DTR: u8 = 0x01;
const MCR_RTS: u8 = 0x02;
const MCR_OUT1: u8 = 0x04;
const MCR_OUT2: u8 = 0x08;
const MCR_LOOP: u8 = 0x10;

const LSR_DATA: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_EMPTY: u8 = 0x60; // THRE and TEMT

const MSR_CTS: u8 = 0x10;
const MSR_DSR: u8 = 0x20;
const MSR_RI: u8 = 0x40;
const MSR_DCD: u8 = 0x80;

/// Interrupts a guest's handler may take in one go before the next "transmitter empty" is put off. A handler that refills
/// an infinitely fast transmitter while another CPU refills its buffer never ends; Linux gives up on the port after 512
/// rounds ("too much work for irq"). 256 rounds of 16 bytes are its whole 4 KiB buffer, so that normal output is never slowed.
const PASSES: u16 = 256;

/// The registers of one port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    pub(crate) ier: u8,
    pub(crate) fcr: u8,
    pub(crate) lcr: u8,
    pub(crate) mcr: u8,
    pub(crate) scratch: u8,
    pub(crate) divisor: [u8; 2],
    pub(crate) overrun: bool,
    /// Low nibble of MSR: what has changed since it was last read.
    pub(crate) msr_delta: u8,
    /// The "transmitter empty" interrupt waits to be taken.
    pub(crate) thr_empty: bool,
    /// The guest has raised RTS since power-on: it knows about flow control.
    pub(crate) rts_seen: bool,
    /// "Transmitter empty" is put off until [`Registers::transmitter_rested`].
    pub(crate) resting: bool,
    pub(crate) rx: Fifo,
    /// Interrupts taken since the guest last saw that there is none.
    pub(crate) passes: u16,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scratch: 0,
            // 115200 baud: what a guest finds that derives the console's speed from the port.
            divisor: [1, 0],
            overrun: false,
            msr_delta: 0,
            thr_empty: false,
            rts_seen: false,
            resting: false,
            rx: Fifo::default(),
            passes: 0,
        }
    }
}

impl Registers {
    /// A guest read of the register at `offset` (0 to 7; others read as all ones).
    pub fn read(&mut self, offset: u8) -> u8 {
        let dlab = self.lcr & LCR_DLAB != 0;
        match offset {
            offset::DATA if dlab => self.divisor[0],
            offset::IER if dlab => self.divisor[1],
            offset::DATA => self.rx.pop().unwrap_or(0),
            offset::IER => self.ier,
            offset::IIR_FCR => self.read_iir(),
            offset::LCR => self.lcr,
            offset::MCR => self.mcr,
            offset::LSR => {
                let mut lsr = LSR_EMPTY;
                if self.rx.len() > 0 {
                    lsr |= LSR_DATA;
                }
                if std::mem::take(&mut self.overrun) {
                    lsr |= LSR_OVERRUN;
                }
                lsr
            }
            offset::MSR => self.modem_lines() | std::mem::take(&mut self.msr_delta),
            offset::SCR => self.scratch,
            _ => 0xff,
        }
    }

    /// A guest write to the register at `offset` (0 to 7; others ignore it). Gives the byte that goes out on the line.
    pub fn write(&mut self, offset: u8, value: u8) -> Option<u8> {
        let dlab = self.lcr & LCR_DLAB != 0;
        match offset {
            offset::DATA if dlab => self.divisor[0] = value,
            offset::IER if dlab => self.divisor[1] = value,
            offset::DATA => return self.transmit(value),
            offset::IER => {
                let newly = !self.ier & value;
                self.ier = value & 0x0f;
                // Enabling the interrupt while the transmitter is empty raises it (drivers probe for that).
                if newly & IER_THR_EMPTY != 0 {
                    self.thr_empty = true;
                }
            }
            offset::IIR_FCR => self.write_fcr(value),
            offset::LCR => self.lcr = value,
            offset::MCR => {
                let before = self.modem_lines();
                self.mcr = value & 0x1f;
                self.rts_seen |= value & MCR_RTS != 0;
                self.modem_changed(before);
            }
            offset::SCR => self.scratch = value,
            _ => {}
        }
        None
    }

    /// PC16550D section 8.6.2: FIFO enable goes first, the other bits count only with it.
    fn write_fcr(&mut self, value: u8) {
        if (self.fcr ^ value) & FCR_ENABLE != 0
            || value & FCR_ENABLE != 0 && value & FCR_CLEAR_RX != 0
        {
            self.rx.clear();
        }
        self.fcr = if value & FCR_ENABLE != 0 {
            value & (FCR_ENABLE | FCR_TRIGGER)
        } else {
            0
        };
    }

    fn transmit(&mut self, byte: u8) -> Option<u8> {
        if self.passes >= PASSES && self.ier & IER_THR_EMPTY != 0 {
            self.thr_empty = false;
            self.resting = true;
        } else {
            self.thr_empty = true;
        }
        if self.mcr & MCR_LOOP == 0 {
            return Some(byte);
        }
        // Loopback: the byte comes back as received (PC16550D section 8.7). A full receiver overruns: a FIFO keeps
        // what it has, without one the new byte replaces the old (section 8.4).
        if self.rx.len() < self.depth() {
            self.rx.push(byte);
        } else {
            self.overrun = true;
            if self.fcr & FCR_ENABLE == 0 {
                self.rx.clear();
                self.rx.push(byte);
            }
        }
        None
    }

    fn read_iir(&mut self) -> u8 {
        let id = self.interrupt();
        if id == IIR_THR_EMPTY {
            self.thr_empty = false;
        }
        self.passes = if id == IIR_NONE {
            0
        } else {
            self.passes.saturating_add(1)
        };
        if self.fcr & FCR_ENABLE != 0 {
            id | IIR_FIFO
        } else {
            id
        }
    }

    /// The interrupt of highest priority, as IIR names it (PC16550D table IV).
    fn interrupt(&self) -> u8 {
        let received = self.rx.len();
        if self.ier & IER_LINE_STATUS != 0 && self.overrun {
            IIR_LINE_STATUS
        } else if self.ier & IER_RECEIVED != 0 && received >= self.trigger() {
            IIR_RECEIVED
        } else if self.ier & IER_RECEIVED != 0 && received > 0 {
            // The character timeout: four character times without one. Here input comes in bursts without a speed, so
            // whatever stays below the trigger level is the end of a burst and the timeout is over at once.
            IIR_TIMEOUT
        } else if self.ier & IER_THR_EMPTY != 0 && self.thr_empty {
            IIR_THR_EMPTY
        } else if self.ier & IER_MODEM_STATUS != 0 && self.msr_delta != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    /// Whether the port drives its interrupt pin. On a PC, OUT2 connects the chip to the pin; loopback takes OUT2 off (PC16550D section 8.7).
    #[must_use]
    pub fn interrupting(&self) -> bool {
        self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 && self.interrupt() != IIR_NONE
    }

    /// Whether "transmitter empty" is to be put off by a millisecond or so, after which [`Registers::transmitter_rested`] is due.
    #[must_use]
    pub fn resting(&self) -> bool {
        self.resting
    }

    /// Raises the "transmitter empty" interrupt that was put off.
    pub fn transmitter_rested(&mut self) {
        if std::mem::take(&mut self.resting) {
            self.passes = 0;
            self.thr_empty = true;
        }
    }

    /// Bytes that [`Registers::receive`] would take now. None in loopback, nor while the guest asks for silence: DTR on and RTS off, after it
    /// has used RTS before. (A guest that never touches RTS, as some firmware, gets its input.)
    #[must_use]
    pub fn room(&self) -> usize {
        let hushed = self.rts_seen && self.mcr & (MCR_DTR | MCR_RTS) == MCR_DTR;
        if self.mcr & MCR_LOOP != 0 || hushed {
            return 0;
        }
        self.depth() - self.rx.len()
    }

    /// Whether the receiver is empty and takes input.
    #[must_use]
    pub fn drained(&self) -> bool {
        self.rx.len() == 0 && self.room() > 0
    }

    /// Bytes from the line; more than [`Registers::room`] overrun.
    pub fn receive(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.rx.len() == self.depth() || !self.rx.push(byte) {
                self.overrun = true;
            }
        }
    }

    fn depth(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 { DEPTH } else { 1 }
    }

    fn trigger(&self) -> usize {
        if self.fcr & FCR_ENABLE == 0 {
            return 1;
        }
        [1, 4, 8, 14][usize::from(self.fcr >> 6)]
    }

    /// High nibble of MSR. The other end is always there; in loopback the outputs come back (PC16550D section 8.7).
    fn modem_lines(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [
            (MCR_RTS, MSR_CTS),
            (MCR_DTR, MSR_DSR),
            (MCR_OUT1, MSR_RI),
            (MCR_OUT2, MSR_DCD),
        ]
        .iter()
        .filter(|(out, _)| self.mcr & out != 0)
        .fold(0, |lines, (_, line)| lines | line)
    }

    /// Notes which lines changed; the ring indicator counts only when it goes off (PC16550D section 8.8).
    fn modem_changed(&mut self, before: u8) {
        let after = self.modem_lines();
        let rising_ring = after & !before & MSR_RI;
        self.msr_delta |= ((before ^ after) & !rising_ring) >> 4;
    }
}

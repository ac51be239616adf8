//! Saved state, version 1: 12 bytes of registers and flags, then the bytes in the receive FIFO.

use anyhow::{Result, bail};

use crate::fifo::{DEPTH, Fifo};
use crate::registers::Registers;

/// Version of the layout below.
pub(crate) const VERSION: u32 = 1;
const HEAD: usize = 12;

impl Registers {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let [dll, dlm] = self.divisor;
        let flags = u8::from(self.overrun)
            | u8::from(self.thr_empty) << 1
            | u8::from(self.rts_seen) << 2
            | u8::from(self.resting) << 3;
        let mut out = vec![
            self.ier,
            self.fcr,
            self.lcr,
            self.mcr,
            self.scratch,
            dll,
            dlm,
            self.msr_delta,
            flags,
            0,
            0,
            0,
        ];
        out.extend(self.rx.iter());
        out
    }

    pub(crate) fn decode(state: &[u8]) -> Result<Self> {
        let Some((
            &[
                ier,
                fcr,
                lcr,
                mcr,
                scratch,
                dll,
                dlm,
                msr_delta,
                flags,
                0,
                0,
                0,
            ],
            fifo,
        )) = state.split_first_chunk::<HEAD>()
        else {
            bail!(
                "state of a serial port has {HEAD} bytes and a FIFO, this has {} bytes of another kind",
                state.len()
            );
        };
        let depth = if fcr & 1 != 0 { DEPTH } else { 1 };
        if fifo.len() > depth
            || ier > 0x0f
            || mcr > 0x1f
            || msr_delta > 0x0f
            || fcr & !0xc1 != 0
            || flags > 0x0f
        {
            bail!("state of a serial port has a value that no port can have");
        }
        let mut rx = Fifo::default();
        for &byte in fifo {
            rx.push(byte);
        }
        Ok(Self {
            ier,
            fcr,
            lcr,
            mcr,
            scratch,
            divisor: [dll, dlm],
            overrun: flags & 1 != 0,
            msr_delta,
            thr_empty: flags & 2 != 0,
            rts_seen: flags & 4 != 0,
            resting: flags & 8 != 0,
            rx,
            ..Self::default()
        })
    }
}

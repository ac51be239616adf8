//! A PS/2 mouse with three buttons that nobody moves (IBM PS/2 Technical Reference, auxiliary device).

use super::answer::Answer;
use super::keyboard::{ACKNOWLEDGE, RESEND, TEST_GOOD};

/// A mouse without a wheel.
const ID: u8 = 0;
/// A packet that says: no button, no movement. Its bit 3 is always 1.
const AT_REST: [u8; 3] = [1 << 3, 0, 0];
const DEFAULT_RATE: u8 = 100;
const DEFAULT_RESOLUTION: u8 = 2;

/// Status byte.
const REMOTE: u8 = 1 << 6;
const REPORTING: u8 = 1 << 5;
const SCALED: u8 = 1 << 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    Rate,
    Resolution,
}

#[derive(Debug)]
pub(super) struct Mouse {
    answer: Answer,
    expects: Option<Expects>,
    /// Returns every byte that it gets.
    wrapping: bool,
    status: u8,
    rate: u8,
    resolution: u8,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            answer: Answer::default(),
            expects: None,
            wrapping: false,
            status: 0,
            rate: DEFAULT_RATE,
            resolution: DEFAULT_RESOLUTION,
        }
    }
}

impl Mouse {
    /// The next byte for the controller.
    pub fn take(&mut self) -> Option<u8> {
        self.answer.take()
    }

    /// A byte from the controller.
    pub fn command(&mut self, byte: u8) {
        if self.wrapping && !matches!(byte, 0xec | 0xff) {
            return self.answer.set(&[byte]);
        }
        match self.expects.take() {
            Some(Expects::Rate) => {
                self.rate = byte;
                return self.answer.set(&[ACKNOWLEDGE]);
            }
            Some(Expects::Resolution) if byte < 4 => {
                self.resolution = byte;
                return self.answer.set(&[ACKNOWLEDGE]);
            }
            Some(Expects::Resolution) => return self.answer.set(&[RESEND]),
            None => {}
        }
        match byte {
            0xe6 => self.status &= !SCALED,
            0xe7 => self.status |= SCALED,
            0xe8 => self.expects = Some(Expects::Resolution),
            0xe9 => {
                let answer = [ACKNOWLEDGE, self.status, self.resolution, self.rate];
                return self.answer.set(&answer);
            }
            0xea => self.status &= !REMOTE,
            0xeb => {
                let [buttons, x, y] = AT_REST;
                return self.answer.set(&[ACKNOWLEDGE, buttons, x, y]);
            }
            0xec => self.wrapping = false,
            0xee => self.wrapping = true,
            0xf0 => self.status |= REMOTE,
            0xf2 => return self.answer.set(&[ACKNOWLEDGE, ID]),
            0xf3 => self.expects = Some(Expects::Rate),
            0xf4 => self.status |= REPORTING,
            0xf5 => self.status &= !REPORTING,
            0xf6 => self.defaults(),
            0xfe => return self.answer.repeat(),
            0xff => {
                self.defaults();
                return self.answer.set(&[ACKNOWLEDGE, TEST_GOOD, ID]);
            }
            _ => return self.answer.set(&[RESEND]),
        }
        self.answer.set(&[ACKNOWLEDGE]);
    }

    fn defaults(&mut self) {
        *self = Self {
            answer: self.answer,
            ..Self::default()
        };
    }
}

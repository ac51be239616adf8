//! A PS/2 keyboard with 101 keys that nobody touches (IBM PS/2 Technical Reference, keyboard).

use super::answer::Answer;

pub(super) const ACKNOWLEDGE: u8 = 0xfa;
pub(super) const RESEND: u8 = 0xfe;
/// Basic assurance test passed.
pub(super) const TEST_GOOD: u8 = 0xaa;
const ID: [u8; 2] = [0xab, 0x83];
const ECHO: u8 = 0xee;
/// Bytes from here on are commands, even where a parameter is due.
const FIRST_COMMAND: u8 = 0xed;
const DEFAULT_SET: u8 = 2;

/// What a byte that is no command is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    /// Lights or typing rate, which nothing shows.
    Setting,
    ScanCodeSet,
    /// Keys that are to repeat or not: any number of them.
    Keys,
}

#[derive(Debug)]
pub(super) struct Keyboard {
    answer: Answer,
    expects: Option<Expects>,
    set: u8,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self {
            answer: Answer::default(),
            expects: None,
            set: DEFAULT_SET,
        }
    }
}

impl Keyboard {
    /// The next byte for the controller.
    pub fn take(&mut self) -> Option<u8> {
        self.answer.take()
    }

    /// A byte from the controller.
    pub fn command(&mut self, byte: u8) {
        let expected = self.expects.take();
        if byte < FIRST_COMMAND {
            return self.parameter(expected, byte);
        }
        match byte {
            0xed | 0xf3 => self.expects = Some(Expects::Setting),
            0xf0 => self.expects = Some(Expects::ScanCodeSet),
            0xfb..=0xfd => self.expects = Some(Expects::Keys),
            0xee => return self.answer.set(&[ECHO]),
            0xf2 => return self.answer.set(&[ACKNOWLEDGE, ID[0], ID[1]]),
            // Enable; disable and defaults; defaults; what all keys do.
            0xf4 | 0xf7..=0xfa => {}
            0xf5 | 0xf6 => self.set = DEFAULT_SET,
            0xfe => return self.answer.repeat(),
            0xff => {
                self.set = DEFAULT_SET;
                return self.answer.set(&[ACKNOWLEDGE, TEST_GOOD]);
            }
            _ => return self.answer.set(&[RESEND]),
        }
        self.answer.set(&[ACKNOWLEDGE]);
    }

    fn parameter(&mut self, expected: Option<Expects>, byte: u8) {
        match (expected, byte) {
            (Some(Expects::Setting), _) => {}
            (Some(Expects::ScanCodeSet), 0) => {
                return self.answer.set(&[ACKNOWLEDGE, self.set]);
            }
            (Some(Expects::ScanCodeSet), 1..=3) => self.set = byte,
            (Some(Expects::Keys), _) => self.expects = expected,
            _ => return self.answer.set(&[RESEND]),
        }
        self.answer.set(&[ACKNOWLEDGE]);
    }
}

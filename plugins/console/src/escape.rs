//! The key sequence by which the person at the terminal talks to vmm-host instead of the guest.

use anyhow::{Result, bail};

/// What follows the prefix to switch the machine off.
const QUIT: u8 = b'x';

/// Filters typed input.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Escape {
    prefix: Option<u8>,
    prefixed: bool,
}

impl Escape {
    /// From the option: `ctrl-` and a key, or `none`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let lower = text.to_ascii_lowercase();
        let prefix = match lower.as_bytes() {
            b"none" => None,
            [
                b'c',
                b't',
                b'r',
                b'l',
                b'-',
                key @ (b'a'..=b'z' | b'\\'..=b'_'),
            ] => Some(key & 0x1f),
            _ => bail!(
                "`escape` is `{text}`; it can be `none`, or `ctrl-` and a letter or one of ] \\ ^ _"
            ),
        };
        Ok(Self {
            prefix,
            prefixed: false,
        })
    }

    /// How to use it, for people.
    pub(crate) fn hint(&self) -> Option<String> {
        let key = char::from(self.prefix? | 0x40);
        Some(format!(
            "Ctrl-{key} x switches the machine off, Ctrl-{key} twice sends Ctrl-{key} to the guest"
        ))
    }

    /// Appends to `out` what goes to the guest; true when the sequence to quit was typed.
    pub(crate) fn filter(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        let Some(prefix) = self.prefix else {
            out.extend(typed);
            return false;
        };
        let mut quit = false;
        for &byte in typed {
            if std::mem::take(&mut self.prefixed) {
                match byte {
                    QUIT => quit = true,
                    _ if byte == prefix => out.push(byte),
                    _ => out.extend([prefix, byte]),
                }
            } else if byte == prefix {
                self.prefixed = true;
            } else {
                out.push(byte);
            }
        }
        quit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(escape: &mut Escape, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::new();
        let quit = escape.filter(typed, &mut out);
        (out, quit)
    }

    #[test]
    fn prefix_is_taken_and_everything_else_passes() {
        let mut escape = Escape::parse("ctrl-a").unwrap();
        assert_eq!(
            run(&mut escape, b"ls\r\x03\x1b[A"),
            (b"ls\r\x03\x1b[A".to_vec(), false)
        );
        assert_eq!(run(&mut escape, b"a\x01"), (b"a".to_vec(), false));
        assert_eq!(run(&mut escape, b"\x01b"), (b"\x01b".to_vec(), false));
        assert_eq!(run(&mut escape, b"\x01q"), (b"\x01q".to_vec(), false));
        assert_eq!(run(&mut escape, b"\x01"), (vec![], false));
        assert_eq!(run(&mut escape, b"x"), (vec![], true));
    }

    #[test]
    fn keys_that_can_and_can_not_be_the_prefix() {
        assert_eq!(Escape::parse("Ctrl-]").unwrap().prefix, Some(0x1d));
        assert_eq!(
            run(&mut Escape::parse("none").unwrap(), b"\x01x"),
            (b"\x01x".to_vec(), false)
        );
        for bad in ["", "a", "ctrl-", "ctrl-1", "ctrl-[", "ctrl-aa"] {
            let error = Escape::parse(bad).unwrap_err().to_string();
            assert!(error.contains("`escape`"), "{bad}: {error}");
        }
    }
}

//! Where a PCI function sits: bus, device, function.

use std::fmt;
use std::str::FromStr;

/// The address of a PCI function. Only bus 0 exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    bus: u8,
    device: u8,
    function: u8,
}

impl Bdf {
    /// A function on bus 0; `None` unless `device` is 0 to 31 and `function` 0 to 7.
    #[must_use]
    pub const fn new(device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 {
            Some(Self {
                bus: 0,
                device,
                function,
            })
        } else {
            None
        }
    }

    /// A function of the chipset, whose address is known to be good: excess bits are cut.
    pub(crate) const fn board(device: u8, function: u8) -> Self {
        Self {
            bus: 0,
            device: device & 31,
            function: function & 7,
        }
    }

    /// Bus number, 0.
    #[must_use]
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// Device number, 0 to 31.
    #[must_use]
    pub const fn device(self) -> u8 {
        self.device
    }

    /// Function number, 0 to 7.
    #[must_use]
    pub const fn function(self) -> u8 {
        self.function
    }

    /// Device and function as one number, 0 to 255, as configuration addresses carry it.
    #[must_use]
    pub const fn devfn(self) -> u8 {
        self.device << 3 | self.function
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.bus, self.device, self.function)
    }
}

/// Why a text is no PCI address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadBdf(String);

impl std::error::Error for BadBdf {}

impl fmt::Display for BadBdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Bdf {
    type Err = BadBdf;

    /// Reads `BUS.DEVICE.FUNCTION`, each decimal: bus 0, device 0 to 31, function 0 to 7.
    fn from_str(text: &str) -> Result<Self, BadBdf> {
        let parts: Vec<&str> = text.split('.').collect();
        let [bus, device, function] = parts[..] else {
            return Err(BadBdf(format!(
                "\"{text}\" is no PCI address: expected BUS.DEVICE.FUNCTION, as in \"0.4.0\""
            )));
        };
        let part = |what: &str, digits: &str, max: u8| {
            let number = digits
                .parse::<u8>()
                .ok()
                .filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit()));
            number.filter(|&number| number <= max).ok_or_else(|| {
                let range = if max == 0 {
                    "0, the only bus".to_owned()
                } else {
                    format!("0 to {max}")
                };
                BadBdf(format!(
                    "PCI address \"{text}\": {what} is \"{digits}\", expected {range}"
                ))
            })
        };
        let bus = part("the bus", bus, 0)?;
        let device = part("the device", device, 31)?;
        let function = part("the function", function, 7)?;
        Ok(Self {
            bus,
            device,
            function,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_as_it_prints() {
        for text in ["0.0.0", "0.4.0", "0.31.7"] {
            assert_eq!(text.parse::<Bdf>().unwrap().to_string(), text);
        }
        assert_eq!("0.31.7".parse::<Bdf>().unwrap().devfn(), 0xff);
    }

    #[test]
    fn a_bad_address_says_which_part() {
        for (text, part) in [
            ("", "BUS.DEVICE.FUNCTION"),
            ("0.4", "BUS.DEVICE.FUNCTION"),
            ("0.4.0.0", "BUS.DEVICE.FUNCTION"),
            ("0:4.0", "BUS.DEVICE.FUNCTION"),
            ("1.4.0", "the bus is \"1\""),
            ("0.32.0", "the device is \"32\", expected 0 to 31"),
            ("0.4.8", "the function is \"8\", expected 0 to 7"),
            ("0.+4.0", "the device is \"+4\""),
            ("0..0", "the device is \"\""),
            ("0.4.0x1", "the function is \"0x1\""),
            ("0.999.0", "the device is \"999\""),
        ] {
            let error = text.parse::<Bdf>().unwrap_err().to_string();
            assert!(
                error.contains(part) && error.contains(text),
                "{text}: {error}"
            );
        }
    }
}

//! One SMBIOS structure: a formatted area, and the strings that it refers to by number (SMBIOS 3.2 section 6.1).

/// A structure that is being written. Fields are appended in their order; each method says how wide they are.
pub(super) struct Structure {
    bytes: Vec<u8>,
    strings: Vec<u8>,
    count: u8,
}

impl Structure {
    pub fn new(kind: u8, handle: u16) -> Self {
        let [low, high] = handle.to_le_bytes();
        Self {
            bytes: vec![kind, 0, low, high],
            strings: Vec::new(),
            count: 0,
        }
    }

    pub fn bytes(mut self, values: &[u8]) -> Self {
        self.bytes.extend_from_slice(values);
        self
    }

    pub fn word(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn dword(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn qword(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// A byte that refers to `text`, or 0 if that is empty: not specified.
    pub fn text(mut self, text: &str) -> Self {
        let number = self.string(text);
        self.bytes.push(number);
        self
    }

    /// Adds a string without a field. A NUL would end it early.
    pub fn string(&mut self, text: &str) -> u8 {
        let text = text.split('\0').next().unwrap_or_default();
        if text.is_empty() || self.count == u8::MAX {
            return 0;
        }
        self.strings.extend_from_slice(text.as_bytes());
        self.strings.push(0);
        self.count += 1;
        self.count
    }

    /// Appends the structure to the table.
    pub fn put(mut self, table: &mut Vec<u8>) {
        self.bytes[1] = self.bytes.len() as u8;
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        self.strings.push(0);
        table.append(&mut self.bytes);
        table.append(&mut self.strings);
    }
}

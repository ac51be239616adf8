//! The `[smbios]` table: who the guest is told its machine is.

use super::document::{Table, Value};
use super::source::{Problems, Span};
use super::values::{Field, refuse_unknown};
use crate::machine::smbios::{Identity, OEM_STRINGS_MAX, OEM_TEXT_MAX, TEXT_MAX};

/// Keys of `[smbios]`.
const KEYS: [&str; 9] = [
    "vendor",
    "product",
    "version",
    "serial",
    "uuid",
    "sku",
    "family",
    "asset_tag",
    "oem_strings",
];

/// Reads the table over the defaults. `None`: there is none.
pub fn read(table: Option<&Table>, problems: &mut Problems) -> Identity {
    let mut identity = Identity::default();
    let Some(table) = table else {
        return identity;
    };
    refuse_unknown("smbios", table, &KEYS, problems);
    let field = |name| {
        table.get(name).map(|entry| Field {
            table: "smbios",
            name,
            entry,
        })
    };
    for (key, into) in [
        ("vendor", &mut identity.vendor),
        ("product", &mut identity.product),
        ("version", &mut identity.version),
        ("serial", &mut identity.serial),
        ("sku", &mut identity.sku),
        ("family", &mut identity.family),
        ("asset_tag", &mut identity.asset_tag),
    ] {
        if let Some(text) = field(key).and_then(|field| text(&field, problems)) {
            *into = text;
        }
    }
    if let Some(uuid) = field("uuid").and_then(|field| uuid(&field, problems)) {
        identity.uuid = uuid;
    }
    if let Some(field) = field("oem_strings") {
        identity.oem_strings = oem_strings(&field, problems);
    }
    identity
}

/// A text of the tables: printable ASCII, which is all that they are sure to carry, and not empty.
pub fn text(field: &Field<'_>, problems: &mut Problems) -> Option<String> {
    let text = field.text(problems)?;
    if printable(text, TEXT_MAX) {
        return Some(text.to_owned());
    }
    field.expected(&expected(TEXT_MAX), problems);
    None
}

fn printable(text: &str, max: usize) -> bool {
    (1..=max).contains(&text.len()) && text.bytes().all(|byte| (0x20..0x7f).contains(&byte))
}

fn expected(max: usize) -> String {
    format!("1 to {max} printable ASCII characters")
}

fn uuid(field: &Field<'_>, problems: &mut Problems) -> Option<[u8; 16]> {
    let uuid = parse_uuid(field.text(problems)?);
    if uuid.is_none() {
        let what = "a UUID such as \"6ba7b810-9dad-11d1-80b4-00c04fd430c8\"";
        field.expected(what, problems);
    }
    uuid
}

/// 32 hexadecimal digits in groups of 8, 4, 4, 4 and 12.
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let groups: Vec<&str> = text.split('-').collect();
    if groups.iter().map(|group| group.len()).ne([8, 4, 4, 4, 12]) {
        return None;
    }
    let digits = groups.concat();
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    Some(u128::from_str_radix(&digits, 16).ok()?.to_be_bytes())
}

fn oem_strings(field: &Field<'_>, problems: &mut Problems) -> Vec<String> {
    let Value::Array(items) = &field.entry.value else {
        field.expected("an array of strings", problems);
        return Vec::new();
    };
    if items.len() > OEM_STRINGS_MAX {
        let what = format!("at most {OEM_STRINGS_MAX} strings");
        field.expected(&what, problems);
    }
    let mut texts = Vec::new();
    for (at, item) in items {
        match item {
            Value::Text(text) if printable(text, OEM_TEXT_MAX) => texts.push(text.clone()),
            other => bad_item(field, *at, other, problems),
        }
    }
    texts
}

fn bad_item(field: &Field<'_>, at: Span, found: &Value, problems: &mut Problems) {
    problems.error(
        at,
        format!(
            "`{}` in [smbios]: expected a string of {}, found {}",
            field.name,
            expected(OEM_TEXT_MAX),
            found.describe()
        ),
    );
}

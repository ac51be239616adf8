//! `[cpuid.NAME]`: what the CPUID instruction tells the guest. Read from a VM file, and written to be pasted into one.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use super::cpus::Profiles;
use super::document::{Entry, Table, Value};
use super::options::check_name;
use super::source::{Problems, Source, Span};
use super::spelling::{misspelt, suggestion};
use super::values::Field;
use super::vm_config::Place;
use crate::hypervisor::cpuid::{CpuidEntry, CpuidProfile, ENTRIES_MAX, Vendor};

const GROUP: &str = "cpuid";
const VENDOR: &str = "vendor";
const VENDORS: [(&str, Vendor); 2] = [("amd", Vendor::Amd), ("intel", Vendor::Intel)];

/// Reads all profiles of a file, those that nothing names too.
pub fn read(group: &Table, sources: &[Source], problems: &mut Problems) -> Profiles {
    let mut profiles = Profiles::new();
    for (name, entry) in group {
        check_name(GROUP, name, entry, problems);
        let field = Field {
            table: GROUP,
            name,
            entry,
        };
        let label = format!("{GROUP}.{name}");
        let profile = field
            .table(problems)
            .and_then(|table| profile(&label, table, entry, sources, problems));
        profiles.insert(name.clone(), profile.map(Arc::new));
    }
    profiles
}

fn profile(
    label: &str,
    table: &Table,
    entry: &Entry,
    sources: &[Source],
    problems: &mut Problems,
) -> Option<CpuidProfile> {
    let mut entries: BTreeMap<(u32, Option<u32>), (Span, [u32; 4])> = BTreeMap::new();
    let mut good = true;
    // In the order of the file, so that of two the later is refused.
    let mut leaves: Vec<_> = table.iter().filter(|(key, _)| *key != VENDOR).collect();
    leaves.sort_by_key(|(_, entry)| entry.key);
    for (key, entry) in leaves {
        let read = request(label, key, entry, problems)
            .and_then(|name| Some((name, registers(label, key, entry, problems)?)));
        let Some((name, values)) = read else {
            good = false;
            continue;
        };
        if let Some((at, _)) = entries.get(&name) {
            problems
                .error(entry.key, format!("[{label}] has leaf `{key}` twice"))
                .help(format!("there: {}", Place::of(*at, sources)));
            good = false;
            continue;
        }
        entries.insert(name, (entry.key, values));
    }
    if entries.len() > ENTRIES_MAX {
        problems.error(
            entry.key,
            format!(
                "[{label}] has {} leaves: at most {ENTRIES_MAX} are possible",
                entries.len()
            ),
        );
        good = false;
    }
    let vendor = vendor(label, table, entry, problems)?;
    let entries = entries
        .into_iter()
        .map(|((leaf, subleaf), (_, values))| CpuidEntry {
            leaf,
            subleaf,
            values,
        });
    let profile = CpuidProfile::new(vendor, entries.collect());
    if good && profile.named_vendor().is_some_and(|named| named != vendor) {
        problems
            .warning(
                table.get(VENDOR).map_or(entry.key, |entry| entry.at),
                format!("`{VENDOR}` in [{label}] is not the vendor that its leaf 0 names"),
            )
            .help("guests go by leaf 0, and so does KVM for leaves that the profile lacks");
    }
    good.then_some(profile)
}

fn vendor(label: &str, table: &Table, entry: &Entry, problems: &mut Problems) -> Option<Vendor> {
    let words = VENDORS.map(|(word, _)| word);
    let Some(vendor) = table.get(VENDOR) else {
        if !misspelt(VENDOR, table.keys(), [VENDOR].into_iter()) {
            problems
                .error(entry.key, format!("[{label}] lacks the key `{VENDOR}`"))
                .help("\"amd\" or \"intel\": which one's rules hold for leaves that are not given")
                .absent();
        }
        return None;
    };
    let field = Field {
        table: label,
        name: VENDOR,
        entry: vendor,
    };
    let word = field.word(&words, problems)?;
    VENDORS
        .iter()
        .find(|(known, _)| *known == word)
        .map(|(_, vendor)| *vendor)
}

/// EAX and perhaps ECX of the request that "LEAF" or "LEAF-SUBLEAF" stands for.
fn request(
    label: &str,
    key: &str,
    entry: &Entry,
    problems: &mut Problems,
) -> Option<(u32, Option<u32>)> {
    let parsed = match key.split_once('-') {
        None => hex(key).map(|leaf| (leaf, None)),
        Some((leaf, subleaf)) => hex(leaf).zip(hex(subleaf).map(Some)),
    };
    if parsed.is_none() {
        let problem = problems.error(entry.key, format!("[{label}] has no key `{key}`"));
        if let Some(help) = suggestion(key, [VENDOR]) {
            problem.help(help);
        }
        problem.help(format!(
            "accepted: {VENDOR}, and leaves in hexadecimal: \"LEAF\" as \"80000001\", or \"LEAF-SUBLEAF\" as \"d-1\""
        ));
    }
    parsed
}

fn hex(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    // from_str_radix takes a sign.
    digits
        .bytes()
        .all(|byte| byte.is_ascii_hexdigit())
        .then_some(())?;
    u32::from_str_radix(digits, 16).ok()
}

fn registers(label: &str, key: &str, entry: &Entry, problems: &mut Problems) -> Option<[u32; 4]> {
    let field = Field {
        table: label,
        name: key,
        entry,
    };
    let what = "an array of four 32-bit integers: eax, ebx, ecx, edx";
    let Value::Array(items) = &entry.value else {
        field.expected(what, problems);
        return None;
    };
    let Ok(items) = <&[(Span, Value); 4]>::try_from(items.as_slice()) else {
        problems.error(
            entry.at,
            format!(
                "`{key}` in [{label}]: expected {what}, found an array of {}",
                items.len()
            ),
        );
        return None;
    };
    let mut values = [0; 4];
    for (value, (at, item)) in values.iter_mut().zip(items) {
        match item {
            Value::Int(number) if u32::try_from(*number).is_ok() => *value = *number as u32,
            other => {
                problems.error(
                    *at,
                    format!(
                        "`{key}` in [{label}]: expected an integer from 0 to 0xffffffff, found {}",
                        other.describe()
                    ),
                );
                return None;
            }
        }
    }
    Some(values)
}

/// Leaves with what they tell, for people who read a profile.
const LEAVES: [(u32, &str); 30] = [
    (0, "highest basic leaf, vendor"),
    (1, "family, model, stepping; features"),
    (2, "caches and TLBs, as descriptors"),
    (4, "caches"),
    (5, "MONITOR and MWAIT"),
    (6, "thermal and power management"),
    (7, "more features"),
    (0xa, "performance monitoring"),
    (0xd, "XSAVE state components"),
    (0xf, "resource monitoring"),
    (0x10, "resource allocation"),
    (0x12, "SGX"),
    (0x14, "processor trace"),
    (0x15, "frequency of the time stamp counter"),
    (0x16, "frequencies"),
    (0x18, "TLBs"),
    (0x19, "key locker"),
    (0x1d, "tiles"),
    (0x1e, "tile multiplication"),
    (0x24, "AVX10"),
    (0x8000_0000, "highest extended leaf"),
    (0x8000_0001, "extended features"),
    (0x8000_0002, "name, in three leaves"),
    (0x8000_0005, "level 1 caches and TLBs"),
    (0x8000_0006, "level 2 and 3 caches"),
    (0x8000_0007, "invariant time stamp counter"),
    (0x8000_0008, "address widths, more features"),
    (0x8000_000a, "SVM"),
    (0x8000_001d, "caches"),
    (0x8000_0021, "more features"),
];

/// The table `[cpuid.NAME]` of a profile, as a VM file has it.
pub fn to_toml(name: &str, profile: &CpuidProfile) -> String {
    let vendor = VENDORS
        .iter()
        .find(|(_, vendor)| *vendor == profile.vendor())
        .map_or("", |(word, _)| *word);
    let mut text = format!("[{GROUP}.{name}]\n{VENDOR} = \"{vendor}\"\n");
    let mut before = None;
    for entry in profile.entries() {
        let [eax, ebx, ecx, edx] = entry.values;
        let named = LEAVES.iter().find(|(leaf, _)| *leaf == entry.leaf);
        // Writing to a String can't fail.
        if let Some((_, what)) = named.filter(|_| before != Some(entry.leaf)) {
            let _ = writeln!(text, "# {what}");
        }
        before = Some(entry.leaf);
        let subleaf = entry.subleaf.map(|subleaf| format!("-{subleaf:x}"));
        let _ = writeln!(
            text,
            "\"{:x}{}\" = [{eax:#010x}, {ebx:#010x}, {ecx:#010x}, {edx:#010x}]",
            entry.leaf,
            subleaf.unwrap_or_default()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::document;

    fn parse(text: &str, problems: &mut Problems) -> Profiles {
        let root = document::parse(text, 0, problems);
        match &root["cpuid"].value {
            Value::Table(group) => read(group, &[], problems),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn more_leaves_than_hypervisors_take_are_refused() {
        let mut text = String::from("[cpuid.x]\nvendor = \"amd\"\n");
        for leaf in 0..ENTRIES_MAX {
            let _ = writeln!(text, "{leaf:x} = [{leaf}, 0, 0, 0]");
        }
        let mut problems = Problems::default();
        assert!(parse(&text, &mut problems)["x"].is_some(), "{problems:?}");
        text.push_str("ffffffff = [1, 0, 0, 0]\n");
        assert!(parse(&text, &mut problems)["x"].is_none());
        let report = &problems.list[0].text;
        assert_eq!(report, "[cpuid.x] has 241 leaves: at most 240 are possible");
    }

    #[test]
    fn what_is_written_is_read_back() {
        let entry = |leaf, subleaf, values| CpuidEntry {
            leaf,
            subleaf,
            values,
        };
        let entries = vec![
            entry(0, None, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            entry(0xd, Some(0), [7, 0x240, 0x240, 0]),
            entry(0xd, Some(0x3e), [u32::MAX, 0, 0, 0]),
            entry(0xd, None, [0; 4]),
            entry(0x8000_001d, Some(3), [1, 2, 3, 4]),
        ];
        let profile = CpuidProfile::new(Vendor::Amd, entries);
        let text = to_toml("host", &profile);
        assert!(
            text.contains("# XSAVE state components\n\"d-0\" = [0x00000007,"),
            "{text}"
        );
        let mut problems = Problems::default();
        let read = parse(&text, &mut problems);
        assert!(problems.list.is_empty(), "{problems:?}");
        assert_eq!(read["host"].as_deref(), Some(&profile));
    }
}

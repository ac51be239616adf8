//! What devices and backends have counted, as text.

use std::fmt::Write;

use super::instance::Instance;

/// A line for each object that has counted something, and one for each of its histograms. Counters that are 0 are left out.
/// Objects come in the order given, counters in that of their names.
pub fn report<'a>(instances: impl IntoIterator<Item = &'a Instance>) -> String {
    let mut text = String::new();
    for instance in instances {
        describe(&mut text, instance.label(), &instance.counters());
    }
    text
}

fn describe(text: &mut String, label: &str, counters: &[(String, u64)]) {
    let used: Vec<_> = counters.iter().filter(|(_, value)| *value > 0).collect();
    let plain = used.iter().filter(|(name, _)| bucket(name).is_none());
    let plain: Vec<String> = plain
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    if !plain.is_empty() {
        let _ = writeln!(text, "{label}: {}", plain.join(", "));
    }
    let buckets: Vec<_> = used
        .iter()
        .filter_map(|(name, value)| bucket(name).map(|(name, bits)| (name, bits, value)))
        .collect();
    for histogram in buckets.chunk_by(|a, b| a.0 == b.0) {
        let all: u64 = histogram.iter().map(|bucket| bucket.2).sum();
        let parts: Vec<String> = histogram
            .iter()
            .map(|(_, bits, value)| format!("< {} {value}", time(*bits)))
            .collect();
        let name = histogram.first().map_or("", |bucket| bucket.0);
        let _ = writeln!(text, "{label}: {name} of {all}: {}", parts.join(", "));
    }
}

/// The histogram that a counter is part of, and the power of two of nanoseconds that its part ends at.
fn bucket(name: &str) -> Option<(&str, u32)> {
    let (name, bits) = name.split_once('/')?;
    Some((name, bits.parse().ok()?))
}

/// 2^`bits` nanoseconds. A thousand is 1024 here, as in sizes of memory.
fn time(bits: u32) -> String {
    let (unit, name) = match bits {
        0..10 => (0, "ns"),
        10..20 => (10, "us"),
        20..30 => (20, "ms"),
        _ => (30, "s"),
    };
    format!("{} {name}", 1u64.checked_shl(bits - unit).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_a_line_and_histograms_one_each() {
        let counters: Vec<(String, u64)> = [
            ("errors", 0),
            ("latency/08", 0),
            ("latency/09", 2),
            ("latency/14", 40),
            ("latency/33", 1),
            ("odd/name", 7),
            ("reads", 43),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        let mut text = String::new();
        describe(&mut text, "block_dev.a", &counters);
        assert_eq!(
            text,
            "block_dev.a: odd/name 7, reads 43\n\
             block_dev.a: latency of 43: < 512 ns 2, < 16 us 40, < 8 s 1\n"
        );
        let mut text = String::new();
        describe(&mut text, "dev.b", &[("interrupts".to_owned(), 0)]);
        assert_eq!(text, "");
    }
}
